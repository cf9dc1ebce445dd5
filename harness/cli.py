"""The command line: parse, call, exit code. No arithmetic, and no import of torch before a verb needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from harness import __version__
from harness.case import DTYPES, OPTIONS, SIZES, Grid, check_affordable, parse, parse_grid
from harness.errors import HarnessError, UsageError, unknown

SYSTEM_HELP = "runner, legacy, transformers, or your own: path/to/file.py:build or package.module:build"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 well, 1 mismatch, 2 wrong usage, 3 something could not run."""
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        return int(arguments.verb(arguments))
    except HarnessError as error:
        first, *rest = str(error).splitlines() or [""]
        print(f"moe-harness: {first}", *(f"  {line}" for line in rest), sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("moe-harness: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as `| head` does
        return 0
    except Exception as error:
        if os.environ.get("MOE_HARNESS_DEBUG"):
            raise
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"moe-harness: a defect of the harness: {told}", file=sys.stderr)
        print("  nothing can be concluded from this run; MOE_HARNESS_DEBUG=1 shows where it happened", file=sys.stderr)
        return HarnessError.exit_code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help")

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse does, but an unknown option is answered with the nearest ones of its verb."""
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            verb = getattr(known, "parser", self)
            options = [
                option for action in verb._actions for option in action.option_strings if option.startswith("--")
            ]
            raise unknown("option", rest[0].partition("=")[0], options, f"{verb.prog} --help")
        return known


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moe-harness", description="Puts any Mixture-of-Experts layer beside an independent oracle.")
    parser.add_argument("--version", action="version", version=f"moe-harness {__version__}")
    parser.set_defaults(verb=lambda _: _no_verb(parser))
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=_Parser)
    _check_parser(verbs)
    _models_parser(verbs)
    _explain_parser(verbs)
    _certify_parser(verbs)
    _faults_parser(verbs)
    _bench_parser(verbs)
    return parser


def _no_verb(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return UsageError.exit_code


def _check_parser(verbs: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    check = verbs.add_parser(
        "check", help="the main job: every model and grid against the oracle; or one case, or a part of it"
    )
    check.add_argument(
        "cases", nargs="*", metavar="CASE", help="deepseek_v3@tp4.bf16.tokens7.seed42+scale=output; see docs/cases.md"
    )
    check.add_argument("--system", type=_words, action="extend", help=SYSTEM_HELP)
    check.add_argument("--model", type=_words, help="model types, joined by commas; moe-harness models lists them")
    check.add_argument("--grid", type=_grids, help="whole grids, as in tp2.ep4.dp2.sp1,tp4.ep2 (docs/grids.md)")
    for name in SIZES:
        check.add_argument(f"--{name}", type=_numbers(name), help="sizes to combine, as in 1,2,4")
    check.add_argument("--dtype", type=_words, help=", ".join(DTYPES))
    check.add_argument(
        "--tokens", type=_tokens, help="rows of the input, as in 0,1,7,33; 3_0_4: for each data-parallel rank"
    )
    check.add_argument("--seed", type=_numbers("seed"), help="seeds of weights and tokens")
    for name, (values, what) in OPTIONS.items():
        check.add_argument(f"--{name}", type=_words, help=f"{what}: {', '.join(values)}")
    check.add_argument(
        "--json", action="store_true", help="one JSON object a finding on stdout, and nothing else there"
    )
    check.add_argument(
        "--jobs", type=_count("jobs"), default=None, help="worker processes (default: one a core); 0 runs in this one"
    )
    check.add_argument(
        "--limit", type=float, default=10.0, help="seconds a single case may take before its layer counts as hung"
    )
    check.add_argument(
        "--profile", choices=("main", "nightly"), default="main",
        help="nightly: right layers at random, from all legal variants of the runner; reports how many were accused",
    )  # fmt: skip
    check.add_argument(
        "--cases", dest="count", type=_count("cases", 10**8), default=None, help="how many, with --profile nightly"
    )
    check.set_defaults(verb=_check, parser=check)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.profile == "nightly":
        return _nightly(arguments)
    if arguments.count is not None:
        raise UsageError("--cases is how many random layers --profile nightly draws. Type --profile nightly as well")
    from harness import campaign, selection
    from harness.finding import Finding, exit_code
    from harness.report import jsonl, table
    from harness.report.progress import Progress
    from harness.systems import check_name

    systems = tuple(arguments.system) if arguments.system else None
    for name in systems or ():
        check_name(name)
    if arguments.grid and any(getattr(arguments, name) for name in SIZES):
        named = ", ".join(f"--{name}" for name in SIZES if getattr(arguments, name))
        raise UsageError(
            f"--grid names whole grids and {named} combines sizes. Type all sizes in --grid, as in --grid tp2.ep4.dp2, or none"
        )
    request = selection.Request(
        systems=systems, models=_known_models(arguments.model), grids=arguments.grid,
        tp=arguments.tp, ep=arguments.ep, dp=arguments.dp, sp=arguments.sp,
        dtypes=arguments.dtype, tokens=arguments.tokens, seeds=arguments.seed,
        options=tuple((name, getattr(arguments, name)) for name in OPTIONS if getattr(arguments, name)),
    )  # fmt: skip
    if arguments.cases:
        if not request.is_main_job:
            raise UsageError("name cases or select them with --model, --tp, ..., not both: a case says all of it")
        batches = selection.of_cases([parse(text) for text in arguments.cases], systems)
    else:
        batches = selection.select(request)
    if not 0 < arguments.limit < float("inf"):
        raise UsageError(f"--limit {arguments.limit:g}: expected a number of seconds above 0")
    jobs = arguments.jobs if arguments.jobs is not None else min(os.cpu_count() or 1, len(batches))
    with Progress(sum(len(batch.cases) for batch in batches)) as progress:

        def tell(finding: Finding) -> None:
            progress.advance(finding)
            if arguments.json:
                print(jsonl.line(finding), flush=sys.stdout.isatty())

        report = campaign.run(batches, jobs=jobs, limit_s=arguments.limit, on_finding=tell)
    if not arguments.json:
        table.show(report, progress.console_for(sys.stdout))
    return exit_code(finding.verdict for finding in report.findings)


def _nightly(arguments: argparse.Namespace) -> int:
    taken = [name for name in ("system", "grid", "dtype", "tokens", *SIZES, *OPTIONS) if getattr(arguments, name)]
    if arguments.cases or taken:
        told = f"--{taken[0]}" if taken else f"the case {arguments.cases[0]}"
        raise UsageError(
            f"--profile nightly draws its cases itself: leave out {told}. It takes --cases, --seed, --model, --jobs"
        )
    if arguments.seed and len(arguments.seed) > 1:
        raise UsageError(f"--profile nightly takes one --seed, got {len(arguments.seed)}")
    from harness.nightly import nightly

    jobs = arguments.jobs if arguments.jobs is not None else os.cpu_count() or 1
    count = 20_000 if arguments.count is None else arguments.count
    seed = arguments.seed[0] if arguments.seed else 0
    return nightly(count, seed=seed, models=_known_models(arguments.model), jobs=jobs, as_json=arguments.json)


def _models_parser(verbs: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    listing = verbs.add_parser(
        "models", help="the configurations: shapes, routing rule, scale, shared experts, sources"
    )
    listing.add_argument("names", nargs="*", metavar="MODEL", help="show whole pages instead of the table")
    listing.add_argument("--json", action="store_true", help="one JSON object a model")
    listing.set_defaults(verb=_models, parser=listing)


def _models(arguments: argparse.Namespace) -> int:
    from harness.report import pages

    print(pages.text(_known_models(arguments.names) or None, as_json=arguments.json))
    return 0


def _explain_parser(verbs: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    explain = verbs.add_parser(
        "explain", help="one case in full: plan, stages, margins, errors, attribution, collectives"
    )
    explain.add_argument("case", metavar="CASE")
    explain.add_argument("--system", default="runner", help=SYSTEM_HELP)
    explain.set_defaults(verb=_explain, parser=explain)


def _explain(arguments: argparse.Namespace) -> int:
    from harness.systems import check_name

    check_name(arguments.system)
    case = parse(arguments.case)
    check_affordable(case)
    from harness.explain import explain

    return explain(case, arguments.system, sys.stdout)


def _certify_parser(verbs: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    certify = verbs.add_parser(
        "certify", help="the runner's whole space of decisions, exactly, and a certificate of it; or a replay of one"
    )
    certify.add_argument("--output", default="certificate.json.gz", metavar="FILE", help="where the certificate goes")
    certify.add_argument(
        "--replay", type=_count("replay", 100000), metavar="N", help="run N states of the certificate in FILE again"
    )
    certify.add_argument("--seed", type=_count("seed", 2**32), default=0, help="which states a replay draws")
    certify.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else there")
    certify.add_argument("--jobs", type=_count("jobs"), default=None, help="worker processes (default: one a core)")
    certify.set_defaults(verb=_certify, parser=certify)


def _certify(arguments: argparse.Namespace) -> int:
    from harness.certify import certify, replay

    jobs = arguments.jobs if arguments.jobs is not None else os.cpu_count() or 1
    if arguments.replay is not None:
        return replay(arguments.output, count=arguments.replay, seed=arguments.seed, as_json=arguments.json)
    return certify(arguments.output, jobs=jobs, as_json=arguments.json)


def _faults_parser(verbs: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    faults = verbs.add_parser(
        "faults", help="real bugs, planted one by one: found? named? and under whose tolerance do they pass?"
    )
    faults.add_argument("names", nargs="*", metavar="FAULT", help="families (A1) or names of faults; all by default")
    faults.add_argument("--model", type=_words, help="model types, joined by commas; all by default")
    faults.add_argument("--grid", type=_grids, help="grids, as in tp4,tp2.ep4.dp2; by default those that show faults")
    faults.add_argument(
        "--list", action="store_true", help="the bank itself: each fault and each public bug, nothing run"
    )
    faults.add_argument("--json", action="store_true", help="JSON lines on stdout, and nothing else there")
    faults.add_argument("--jobs", type=_count("jobs"), default=None, help="worker processes (default: one a core)")
    faults.set_defaults(verb=_faults, parser=faults)


def _faults(arguments: argparse.Namespace) -> int:
    models, names = _known_models(arguments.model), tuple(arguments.names)
    jobs = arguments.jobs if arguments.jobs is not None else os.cpu_count() or 1
    if arguments.list:
        from harness.faults.listing import listing

        return listing(names, as_json=arguments.json)
    from harness.faults.verb import faults

    return faults(names, models=models, grids=arguments.grid, jobs=jobs, as_json=arguments.json)


def _bench_parser(verbs: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    bench = verbs.add_parser("bench", help="speed of the harness, measured on this machine, beside its limits")
    bench.add_argument("--json", action="store_true", help="one JSON object a figure")
    bench.set_defaults(verb=_bench, parser=bench)


def _bench(arguments: argparse.Namespace) -> int:
    from harness.bench import bench

    return bench(as_json=arguments.json)


def _known_models(names: Sequence[str] | None) -> tuple[str, ...] | None:
    from harness import models

    for name in names or ():
        models.load(name)
    return tuple(names) if names else None


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise UsageError(f"{text!r} names nothing: expected one name or more, joined by commas")
    return words


def _grids(text: str) -> tuple[Grid, ...]:
    return tuple(map(parse_grid, _words(text)))


def _tokens(text: str) -> tuple[int | tuple[int, ...], ...]:
    """'7,3_0_4': a number, or one for each data-parallel rank."""
    try:
        return tuple(tuple(map(int, word.split("_"))) if "_" in word else int(word) for word in _words(text))
    except ValueError:
        raise UsageError(
            f"--tokens {text}: expected whole numbers joined by commas, as in --tokens 1,2,4; or 3_0_4, one for each "
            "data-parallel rank"
        ) from None


def _numbers(name: str) -> Callable[[str], tuple[int, ...]]:
    def read(text: str) -> tuple[int, ...]:
        try:
            return tuple(int(word) for word in _words(text))
        except ValueError:
            raise UsageError(
                f"--{name} {text}: expected whole numbers joined by commas, as in --{name} 1,2,4"
            ) from None

    return read


def _count(name: str, most: int = 256) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) > most:
            raise UsageError(f"--{name} {text}: expected a whole number from 0 to {most}")
        return int(text)

    return read
