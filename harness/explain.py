"""One case in full: what the layer is, what it decided, what each token went through, who was counted how often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import TextIO

import torch

from harness.algebra import Evidence, law, read_shares, read_whole
from harness.case import Case
from harness.check import check, evidence, judge, whole_output
from harness.comm import Entry
from harness.compare import compare
from harness.execution import Run, run_system
from harness.finding import Finding, exit_code
from harness.problem import Problem, problem, ways
from harness.systems import System, resolve
from reference.rounding import analyse

TOKENS_SHOWN = 8


def explain(case: Case, system_name: str, out: TextIO) -> int:
    """Write the explanation to out; returns the exit code that check gives the case."""
    system = resolve(system_name)
    if system.supports(case) is not None:
        finding = check(case, system)
        print(f"{case} on {system.name}: {finding.verdict}: {finding.diagnosis}", file=out)
        return exit_code([finding.verdict])
    given = problem(case)
    run = run_system(case, system, given)
    if run.broken is not None:
        finding = check(case, system)
        lines: Iterator[str] = iter([])
    else:
        finding = judge(case, system, given, run)
        lines = _measured(case, system, given, run)
    for line in (*_head(case, system, given, finding), *lines, *_ledger(run)):
        print(line, file=out)
    return exit_code([finding.verdict])


def _head(case: Case, system: System, given: Problem, finding: Finding) -> Iterator[str]:
    spec, routing = given.spec, given.spec.routing
    yield f"{case} on {system.name}: {finding.verdict}"
    if finding.diagnosis:
        yield f"  {finding.diagnosis}"
    if finding.reference:
        yield f"  known: {finding.reference}"
    yield (
        f"layer: hidden {spec.hidden_size}, experts {routing.num_experts} x {spec.experts.intermediate_size}, top {routing.top_k}, "
        f"{routing.scoring_func}{' + bias' if routing.correction_bias else ''}, s={routing.routed_scaling_factor}, "
        f"shared {spec.shared.intermediate_size if spec.shared else 'none'}"
    )
    yield f"grid: tp={case.grid.tp} (ranks {', '.join(map(str, range(case.grid.tp)))}), ep=1, dp=1, sp=1; dtype {case.dtype}"


def _measured(case: Case, system: System, given: Problem, run: Run) -> Iterator[str]:
    plan = getattr(run.ranks[0].layer, "plan", None)
    if is_dataclass(plan):
        yield "plan of this call:"
        for field in fields(plan):
            yield f"  {field.name}: {_plain(getattr(plan, field.name))}"
    yield from _stages(given)
    unit, precision = run.ranks[0].unit, system.precision(given.spec)
    outputs = [whole_output(out, given) for out in run.ranks]
    compared = compare(given, outputs, ways(given.spec, case.grid), precision)
    seen = evidence(case, system, given, run, outputs, compared)
    if unit != 1.0:
        yield f"output unit: the layer returns y times {unit:g}"
    yield "errors: " + ", ".join(f"{name} {value}" for name, value in compared.figures().items())
    yield from _errors(seen)
    if case.tokens == 0:
        yield "attribution: no tokens, nothing to attribute"
        return
    yield f"attribution (law: {', '.join(f'{name} x {symbol}' for name, symbol in law(given).items())}):"
    for rank in range(case.grid.ranks):
        reading = read_whole(seen, rank) or read_shares(seen, rank)
        yield f"  rank {rank}: {'no sum of the parts explains this output' if reading is None else reading}"


def _stages(given: Problem) -> Iterator[str]:
    stages = given.stages
    yield "oracle, token by token: experts with their weights before s, margin of the choice, lengths of R, S and y"
    for m in range(min(TOKENS_SHOWN, len(stages.output_MH))):
        chosen = zip(stages.topk_ids_MK[m].tolist(), stages.topk_weights_MK[m].tolist(), strict=True)
        told = " ".join(f"{e}:{weight:.4f}" for e, weight in chosen)
        norms = " ".join(f"{part[m].norm():.3f}" for part in (stages.routed_MH, stages.shared_MH, stages.output_MH))
        yield f"  {m}: {told}  margin {stages.margin_M[m]:.2g}  {norms}"
    if len(stages.output_MH) > TOKENS_SHOWN:
        yield f"  ... {len(stages.output_MH) - TOKENS_SHOWN} more tokens"


def _errors(seen: Evidence) -> Iterator[str]:
    """Each shown token's error on its worst rank, in the three units in which it is judged."""
    given, outputs = seen.given, seen.outputs
    shown, cut = min(TOKENS_SHOWN, len(outputs[0])), ways(given.spec, seen.layout.grid)
    if shown == 0:
        return
    miss_RmH = (torch.stack(list(outputs)) - given.stages.output_MH)[:, :shown].abs()
    error_m = miss_RmH.norm(dim=-1).amax(0)
    x_MH, is_vision = given.tokens.hidden_states, given.tokens.is_vision
    rounding = analyse(
        given.spec, given.exact, x_MH, given.stages, cut.routed, seen.precision, is_vision, torch.arange(shown),
        shared_tp=cut.shared,
    )  # fmt: skip
    bound_m = (miss_RmH / rounding.bound_MH).amax((0, 2))
    naive_M = seen.naive_M
    yield "error of each token on its worst rank: length; over the worse naive run; over the deviation; over the bound"
    for m in range(shown):
        ratios = (error_m[m] / naive_M[m], error_m[m] / rounding.deviation_M[m], bound_m[m])
        yield f"  {m}: {error_m[m]:.2g}; " + "; ".join(f"{float(ratio):.2g}" for ratio in ratios)


def _ledger(run: Run) -> Iterator[str]:
    ledgers = set(run.ledger)
    alike = "the same on all ranks" if len(ledgers) == 1 else "not the same on all ranks"
    yield f"collectives in order ({alike}):" if any(run.ledger) else "collectives: none"
    for rank, entries in enumerate(run.ledger if len(ledgers) > 1 else run.ledger[:1]):
        for index, entry in enumerate(entries):
            yield f"  {f'rank {rank}, ' if len(ledgers) > 1 else ''}{index}: {_entry(entry)}"


def _entry(entry: Entry) -> str:
    ranks = ", ".join(map(str, entry.ranks))
    return f"{entry.op} {entry.dtype}{list(entry.shape)} over group {entry.group} (ranks {ranks})"


def _plain(value: object) -> str:
    if isinstance(value, Enum):
        return f"{value.name}: {value.value}" if isinstance(value.value, str) else value.name
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "nobody"
    return f"{value:g}" if isinstance(value, float) else str(value)
