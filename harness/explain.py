"""One case in full: what the layer is, what it decided, what each token went through, who was counted how often."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import TextIO

import torch

from harness.algebra import Evidence, Reading, law, read_shares, read_whole, read_with_input
from harness.case import SIZES, Case, groups_of
from harness.check import check
from harness.comm import Entry
from harness.compare import compare
from harness.execution import Run, run_system
from harness.finding import Finding, exit_code
from harness.outputs import evidence, handed, whole_output
from harness.problem import Problem, problem, ways
from harness.stages import Looked, first_wrong
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
        finding = check(case, system)
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
    probe = finding.figures.get("probe")
    if isinstance(probe, dict):
        yield f"labelled probe ({probe['case']}): {probe['told']}"
    yield (
        f"layer: hidden {spec.hidden_size}, experts {routing.num_experts} x {spec.experts.intermediate_size}, top {routing.top_k}, "
        f"{routing.scoring_func}{' + bias' if routing.correction_bias else ''}, s={routing.routed_scaling_factor}, "
        f"shared {spec.shared.intermediate_size if spec.shared else 'none'}"
    )
    yield from _grid(case)


def _measured(case: Case, system: System, given: Problem, run: Run) -> Iterator[str]:
    yield from _plan(run)
    yield from _placed(run, case)
    yield from _stages(given)
    unit, precision = run.ranks[0].unit, system.precision(given.spec)
    outputs = [whole_output(out, given) for out in run.ranks]
    compared = compare(given, outputs, ways(given.spec, case.grid), precision)
    seen = evidence(case, system, given, run, outputs, compared.wrong_RM)
    if unit != 1.0:
        yield f"output unit: the layer returns y times {unit:g}"
    yield "errors: " + ", ".join(f"{name} {value}" for name, value in compared.figures().items() if name != "routes")
    for certificate in compared.certificates:
        yield from certificate.lines()
    yield from _errors(seen)
    if case.tokens == 0:
        yield "attribution: no tokens, nothing to attribute"
        return
    looked = Looked(given, outputs, seen.wrong_RM, case.grid, precision, not system.foreign)
    stages = first_wrong(looked, handed(case, run)).read
    yield f"stages handed out: {'; '.join(f'{name} {how}' for name, how in stages.items()) or 'none'}"
    yield f"attribution (law: {', '.join(f'{name} x {symbol}' for name, symbol in law(given).items())}):"
    told: dict[str, list[int]] = {}
    for rank in range(case.grid.ranks):
        reading = read_whole(seen, rank) or read_shares(seen, rank) or read_with_input(seen, rank)
        told.setdefault(_reading(seen, rank, reading), []).append(rank)
    for sentence, ranks in told.items():
        yield f"  {_ranks(ranks)}: {sentence}"


def _reading(seen: Evidence, rank: int, reading: Reading | None) -> str:
    if not bool(seen.held_RM[rank].any()):
        return "no tokens of its own"
    return "no sum of the parts explains this output" if reading is None else str(reading)


def _plan(run: Run) -> Iterator[str]:
    layer = run.ranks[0].layer
    plan = getattr(layer, "plan", None)
    if not is_dataclass(plan):
        return
    yield "plan of this call:"
    for field in fields(plan):
        value = getattr(plan, field.name)
        if field.name == "announced":
            yield f"  announced by its kernel: {_announced(value)}"
        elif isinstance(value, tuple):
            yield f"  {field.name}: {', '.join(map(str, value)) or 'nobody'}"
        else:
            yield f"  {field.name}: {_plain(value)}"
    announced = getattr(layer, "announced", None)
    if announced is not None:
        yield f"announced by all calls together: {_announced(announced)}"


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
        shared_tp=cut.shared, packed=given.is_quantised,
    )  # fmt: skip
    bound_m = (miss_RmH / rounding.bound_MH).amax((0, 2))
    naive_M = seen.naive_M
    yield "error of each token on its worst rank: length; over the worse naive run; over the deviation; over the bound"
    for m in range(shown):
        ratios = (error_m[m] / naive_M[m], error_m[m] / rounding.deviation_M[m], bound_m[m])
        yield f"  {m}: {error_m[m]:.2g}; " + "; ".join(f"{float(ratio):.2g}" for ratio in ratios)


def _grid(case: Case) -> Iterator[str]:
    grid = case.grid
    sizes = ", ".join(f"{name}={getattr(grid, name)}" for name in SIZES)
    yield f"grid: {sizes}, moe.tp={grid.moe_tp}; {grid.ranks} rank{'s' if grid.ranks > 1 else ''}; dtype {case.dtype}"
    if grid.ranks == 1:
        return
    for name, members in groups_of(grid).items():
        if len(members[0]) > 1:
            yield f"  {name} groups: {' '.join(f'[{_numbers(ranks)}]' for ranks in members)}"
    if grid.moe_tp > 1:
        pieces = [range(e * grid.moe_tp, (e + 1) * grid.moe_tp) for e in range(grid.ep)]
        yield f"  each expert is cut over the ranks of one of {' '.join(f'[{_numbers(ranks)}]' for ranks in pieces)}"
    told: dict[str, list[int]] = {}
    for rank, rows in enumerate(case.rows):
        told.setdefault(_rows(rows, grid.sp), []).append(rank)
    yield "  tokens: " + "; ".join(f"{_ranks(ranks)}: {rows}" for rows, ranks in told.items())


def _rows(rows: slice, sp: int) -> str:
    """'3 to 6'; under sequence parallelism '3 to 6, of which each takes 2 rows'."""
    count = rows.stop - rows.start
    each = f", of which each takes {-(-count // sp)} row{'s' if count > sp else ''}" if sp > 1 and count else ""
    return (_numbers(range(rows.start, rows.stop)) or "none") + each


def _numbers(numbers: Sequence[int]) -> str:
    """'0 to 3' or '0, 2'."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_numbers(ranks)}"


def _placed(run: Run, case: Case) -> Iterator[str]:
    """Which experts each set of ranks holds, where they are whole."""
    grid, layer = case.grid, run.ranks[0].layer
    if grid.ep == 1:
        return
    held, owners = getattr(layer, "held", None), getattr(layer, "owners", None)
    if held is None and owners is not None:
        held = [[e for e, owner in enumerate(owners) if owner == ep_rank] for ep_rank in range(grid.ep)]
    if held is None:
        yield "placement of the experts: the layer does not tell"
        return
    yield "placement of the experts:"
    for ep_rank, experts in enumerate(held):
        ranks = range(ep_rank * grid.moe_tp, (ep_rank + 1) * grid.moe_tp)
        yield f"  {_ranks(ranks)}: {_numbers(experts) or 'none'}"


def _ledger(run: Run) -> Iterator[str]:
    """One line for each collective, of all ranks together if they made the same ones, else of those that did."""
    until = " until then" if run.broken else ""
    if not any(run.ledger):
        yield f"collectives{until}: none"
        return
    alike: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for rank, entries in enumerate(run.ledger):
        alike.setdefault(tuple((each.op, each.group, each.dtype) for each in entries), []).append(rank)
    yield f"collectives{until} in order ({'the same on all ranks' if len(alike) == 1 else 'not the same on all ranks'}):"
    for ranks in alike.values():
        indent = "  "
        if len(alike) > 1:
            yield f"  {_ranks(ranks)}:" + ("" if run.ledger[ranks[0]] else " none")
            indent = "    "
        for number, entries in enumerate(zip(*(run.ledger[rank] for rank in ranks), strict=True)):
            yield f"{indent}{number}: {_entry(ranks, entries)}"


def _entry(ranks: Sequence[int], entries: Sequence[Entry]) -> str:
    """'all_reduce fp32[M, 64] over tp [0, 1] [2, 3]; M = 4 on ranks 0, 1; 3 on ranks 2, 3'. entries: of these ranks."""
    first = entries[0]
    groups = " ".join(f"[{_numbers(members)}]" for members in dict.fromkeys(entry.ranks for entry in entries))
    sizes = dict.fromkeys(entry.shape for entry in entries)
    if len(sizes) == 1:
        return f"{first.op} {first.dtype}{list(first.shape)} over {first.group} {groups}"
    if len({shape[1:] for shape in sizes}) > 1:
        told = "; ".join(f"{list(entry.shape)} on rank {rank}" for rank, entry in zip(ranks, entries, strict=True))
        return f"{first.op} {first.dtype} over {first.group} {groups}: {told}"
    by_rows: dict[int, list[int]] = {}
    for rank, entry in zip(ranks, entries, strict=True):
        by_rows.setdefault(entry.shape[0], []).append(rank)
    shape = ", ".join(["M", *map(str, first.shape[1:])])
    told = "; ".join(f"{rows} on {_ranks(those)}" for rows, those in by_rows.items())
    return f"{first.op} {first.dtype}[{shape}] over {first.group} {groups}; M = {told}"


def _plain(value: object) -> str:
    if isinstance(value, Enum):
        return f"{value.name}: {value.value}" if isinstance(value.value, str) else value.name
    return f"{value:g}" if isinstance(value, float) else str(value)


def _announced(pairs: Sequence[tuple[str, str]]) -> str:
    """'all_gather over dp (4 times), reduce_scatter over dp'."""
    told = []
    for (op, group), run in itertools.groupby(pairs):
        times = len(list(run))
        told.append(f"{op} over {group}" + (f" ({times} times)" if times > 1 else ""))
    return ", ".join(told) or "none"
