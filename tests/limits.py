"""The figures of docs/tolerance.md, measured again.

python -m tests.limits clean 100 108              right layers of three systems and twelve foreign styles, by dtype
python -m tests.limits clean 0 2 grids=dp2,tp2.ep4.dp2   the same on those grids, with shares of tokens of all kinds
python -m tests.limits clean 0 6 size=wide        the same on the wide twins
python -m tests.limits clean 1000 1100 models=phimoe tokens=200
python -m tests.limits faults 40 44               the share of small faults found
python -m tests.limits routers 200 204            choices of experts that rounding changes, and whether they are listed
python -m tests.limits split 50 52                products that are not accumulated in float32
python -m tests.limits projection 0 2 tokens=128,200,512   what many rows show: clean layers, and parts x1.01 and x1.001
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from harness import models
from harness.case import DTYPES, Case, Grid, parse_grid
from harness.check import judge
from harness.compare import DEVIATION_LIMIT, RUN_LIMIT, compare, near_ties, project_outputs
from harness.errors import UsageError
from harness.execution import Run, run_system
from harness.finding import Verdict
from harness.outputs import whole_output
from harness.problem import Problem, Ways, problem, ways
from harness.projection import DTYPES as PROJECTED
from harness.projection import LIMIT as PROJECTION_LIMIT
from harness.systems import System, resolve
from harness.systems.foreign import ForeignSystem
from reference.moe import select_experts
from reference.rounding import analyse, router_error
from reference.routes import legal_routes, undecided_rows
from reference.spec import MoESpec, RouterPrecision
from tests.clean_layers import STYLES, Layer, Style

FAULTS: dict[str, tuple[str, float]] = {
    "nothing": ("none", 1.0),
    "routed part x1.001": ("routed", 1.001),
    "routed part x1.01": ("routed", 1.01),
    "routed part x1.05": ("routed", 1.05),
    "one expert x1.01": ("expert", 1.01),
    "one expert x1.05": ("expert", 1.05),
    "one expert x1.2": ("expert", 1.2),
    "shared part x1.01": ("shared", 1.01),
    "shared part x1.05": ("shared", 1.05),
    "b2 missing": ("b2", 1.0),
    "routed part rounded to bf16": ("rounded", 1.0),
    "router weights rounded to bf16": ("weights", 1.0),
}


class Faulty(Layer):
    """A right layer with one small fault, planted in float32; loud is the expert that most tokens visit."""

    fault: tuple[str, float]
    loud: int

    def route(self, x, routing, named):
        w_MK, ids_MK = super().route(x, routing, named)
        kind, factor = self.fault
        w_MK = w_MK.float()
        if kind == "weights":
            w_MK = w_MK.bfloat16().float()
        if kind in ("routed", "expert"):
            w_MK = torch.where((ids_MK == self.loud) | (kind == "routed"), w_MK * factor, w_MK)
        return w_MK, ids_MK

    def branch(self, x, *of):
        routed, zero = super().branch(x, *of)
        return routed.bfloat16().to(routed.dtype) if self.fault[0] == "rounded" else routed, zero

    def shared(self, x, shared):
        y = super().shared(x, shared)
        return (y.float() * self.fault[1]).to(y.dtype) if self.fault[0] == "shared" else y

    def cut(self, experts, weights):
        return super().cut(experts, weights) | ({"b2": None} if self.fault[0] == "b2" else {})


class SplitSums(Layer):
    """Each product in some pieces that are rounded to the dtype before they are added."""

    pieces: int

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if w.shape[0] == self.spec.routing.num_logits:
            return super().linear(x, w, bias)
        pieces = zip(x.tensor_split(self.pieces, -1), w.tensor_split(self.pieces, -1), strict=True)
        total: Tensor = sum(functional.linear(*piece) for piece in pieces)
        return total if bias is None else total + bias


class Subclass:
    """A class of layers as a system."""

    foreign = True

    def __init__(self, base: type[Layer], style: Style, **fields: object) -> None:
        self.name, self._layer, self._style = base.__name__, type(base.__name__, (base,), fields), style

    def precision(self, spec: MoESpec) -> RouterPrecision:
        return spec.routing.precision

    def build(self, case, weights, comm):
        return self._layer(case.spec, weights, comm, self._style)


TP_SIZES = tuple(Grid(tp=tp) for tp in (1, 2, 3, 4, 8))


def cases(
    seeds: Sequence[int], tokens: Sequence[int], grids: Sequence[Grid], size: str, names: Sequence[str]
) -> Iterator[Case]:
    """All that exist. Data-parallel ranks get even shares; then the last one gets all; then the first all but one."""
    for seed, model, dtype, count, grid in itertools.product(seeds, names, DTYPES, tokens, grids):
        others = grid.dp - 1
        uneven = [(*[0] * others, count), (count - 1, *[0] * (others - 1), 1)] if others and count else []
        for split in (None, *uneven):
            try:
                yield Case(model=model, dtype=dtype, tokens=count, seed=seed, grid=grid, size=size, split=split)
            except UsageError:
                break


def outputs_of(run: Run, given: Problem) -> list[Tensor]:
    return [whole_output(out, given) for out in run.ranks]


def acquitted(given: Problem, outputs: list[Tensor], cut: Ways, precision: RouterPrecision) -> list[float]:
    """Deviations of the rows past the first limit whose choice of experts is no near tie."""
    error_M = (torch.stack(outputs) - given.stages.output_MH).norm(dim=-1).amax(0)
    past_M = ~(error_M <= RUN_LIMIT * given.naive_error(cut, precision))
    rows = (past_M & ~near_ties(given, precision)).nonzero()[:, 0]
    if not len(rows):
        return []
    x_MH, is_vision = given.tokens.hidden_states, given.tokens.is_vision
    rounding = analyse(
        given.spec, given.exact, x_MH, given.stages, cut.routed, precision, is_vision, rows, shared_tp=cut.shared
    )
    return (error_M[rows] / rounding.deviation_M).tolist()


def right_systems() -> list[System]:
    file = Path(__file__).with_name("clean_layers.py")
    styles = [style for style in STYLES if style != "chain"]  # slow; tests/test_clean_layers.py has it
    return [
        *(ForeignSystem(f"{file}:{style}", style) for style in styles),
        *map(resolve, ("runner", "legacy", "transformers")),
    ]


def clean(
    seeds: Sequence[int], *, tokens: Sequence[int], grids: Sequence[Grid], size: str, names: Sequence[str]
) -> None:
    systems = right_systems()
    counted, ties, past, most = Counter(), Counter(), Counter(), Counter()
    for case, system in itertools.product(cases(seeds, tokens, grids, size, names), systems):
        if system.supports(case) is not None:
            continue
        given, key = problem(case), (system.name, case.dtype)
        run = run_system(case, system, given)
        if run.broken is not None:
            print(case, system.name, run.broken, flush=True)
            counted[*key, Verdict.MISMATCH] += 1
            continue
        finding = judge(case, system, given, run)
        counted[*key, finding.verdict] += 1
        if finding.verdict not in (Verdict.OK, Verdict.KNOWN):
            print(finding.verdict.value, case, system.name, finding.diagnosis, flush=True)
        elif finding.verdict is Verdict.OK:
            ties[key] += "rows_on_another_legal_route" in finding.figures
            cut, precision = ways(case.spec, case.grid), system.precision(case.spec)
            rows = acquitted(given, outputs_of(run, given), cut, precision)
            past[key] += len(rows)
            most[key] = max([most[key], *rows])
    for name, dtype in itertools.product([system.name for system in systems], DTYPES):
        told = ", ".join(f"{v.value} {counted[name, dtype, v]}" for v in Verdict if counted[name, dtype, v])
        print(
            f"{name:20} {dtype}  {told};  another route {ties[name, dtype]}, rows past {RUN_LIMIT} naive errors "
            f"{past[name, dtype]}, of {most[name, dtype]:.2f} deviations at most (limit {DEVIATION_LIMIT})"
        )
    print(f"{counted.total()} checks")


def faults(seeds: Sequence[int]) -> None:
    tried, found = Counter(), Counter()
    for case in cases(seeds, (7, 33), [Grid(tp=tp) for tp in (1, 2, 4)], "twin", models.names()):
        given, spec, ids_MK = problem(case), case.spec, problem(case).stages.topk_ids_MK
        loud = int(ids_MK[ids_MK < spec.routing.num_experts].mode().values)
        style = STYLES[("loop", "dense", "folded")[(case.seed + case.grid.tp.bit_length()) % 3]]
        for name, fault in FAULTS.items():
            missing = {"shared": spec.shared is None, "b2": not spec.experts.bias}.get(fault[0], False)
            if missing or (case.dtype == "bf16" and fault[0] in ("rounded", "weights")):
                continue
            system, key = Subclass(Faulty, style, fault=fault, loud=loud), (name, case.dtype, case.tokens)
            outputs = outputs_of(run_system(case, system, given), given)
            tried[key] += 1
            found[key] += compare(given, outputs, ways(spec, case.grid), system.precision(spec)).wrong
    for name in FAULTS:
        told = [(d, m, found[name, d, m], tried[name, d, m]) for d in DTYPES for m in (7, 33) if tried[name, d, m]]
        print(f"{name:32}", "  ".join(f"{d} M={m} {100 * f / n:5.1f} % of {n}" for d, m, f, n in told))


def routers(seeds: Sequence[int], *, names: Sequence[str]) -> None:
    """A router in the dtype against the oracle's, on 8,192 tokens a seed."""
    for model, dtype in itertools.product(names, DTYPES):
        spec, counts, most = models.load(model).twin, Counter(), 0
        for seed in seeds:
            given = problem(Case(model=model, dtype=dtype, tokens=8192, seed=seed))
            exact, x_MH, routing = given.exact, given.tokens.hidden_states, spec.routing
            layer = Layer.__new__(Layer)
            layer.spec, layer.style = spec, STYLES["everything_in_dtype"]
            weights_MK, ids_MK = layer.route(x_MH, routing, given.weights)
            logits_ME, scores_ME = given.stages.logits_ME, given.stages.scores_ME
            if spec.vision is not None:  # the text branch on all tokens
                logits_ME = x_MH.double() @ exact["router_weight"].T
                scores_ME = logits_ME.softmax(-1)
            bias_E, factor_E = exact.get("e_score_correction_bias"), exact.get("per_expert_scale")
            chosen = select_experts(logits_ME, scores_ME, bias_E, routing)
            delta_ME = router_error(spec, exact, x_MH, routing.precision)
            tie_M = undecided_rows(routing, logits_ME, bias_E, delta_ME)

            def same(ids: Tensor, weights: Tensor, others: Tensor, their: Tensor, masks: bool) -> Tensor:
                if not masks:
                    return (ids.sort(-1).values == others.sort(-1).values).all(-1)
                return (ids == others).all(-1) & ((weights.double() / their - 1).abs() < 2**-5).all(-1)

            masks = routing.scoring_func == "sparsemixer"
            other_M = ~same(ids_MK, weights_MK, chosen.topk_ids_MK, chosen.topk_weights_MK, masks)
            counts.update(tokens=len(x_MH), near_ties=int(tie_M.sum()), other_choice=int(other_M.sum()))
            for row in other_M.nonzero()[:, 0].tolist():
                routes = legal_routes(routing, logits_ME[row], bias_E, delta_ME[row], factor_E)
                if routes is None:
                    counts["too_many_routes"] += 1
                    continue
                most = max(most, len(routes))
                legal = [
                    same(ids_MK[row], weights_MK[row], r.topk_ids_MK[0], r.topk_weights_MK[0], masks) for r in routes
                ]
                counts["not_listed"] += not (tie_M[row] and any(legal))
        print(f"{model:18} {dtype}", dict(counts), "most routes", most, flush=True)


def split(seeds: Sequence[int]) -> None:
    for pieces in (1, 2, 4):
        tried, accused = Counter(), Counter()
        for case in cases(seeds, (33,), [Grid(), Grid(tp=4)], "twin", models.names()):
            if case.dtype != "fp32":
                system = Subclass(SplitSums, Style(act="plain", weights_in="dtype"), pieces=pieces)
                outputs, cut = (
                    outputs_of(run_system(case, system, problem(case)), problem(case)),
                    ways(case.spec, case.grid),
                )
                tried[case.dtype] += 1
                wrong = compare(problem(case), outputs, cut, system.precision(case.spec)).wrong
                accused[case.dtype] += wrong
        print(f"{pieces} pieces:", ", ".join(f"{d} accused {accused[d]} of {n}" for d, n in tried.items()))


def projection(
    seeds: Sequence[int], *, tokens: Sequence[int], grids: Sequence[Grid], size: str, names: Sequence[str]
) -> None:
    systems, styles = right_systems(), [STYLES[name] for name in ("loop", "dense", "folded", "everything_in_dtype")]
    sigmas: dict[tuple[str, str, int], list[float]] = {}
    closest, named = {}, Counter()
    for number, case in enumerate(cases(seeds, tokens, grids, size, names)):
        given, spec = problem(case), case.spec
        if given.dtype not in PROJECTED or case.split is not None:
            continue
        for system in systems:
            if system.supports(case) is not None:
                continue
            outputs, precision = outputs_of(run_system(case, system, given), given), system.precision(spec)
            compared = compare(given, outputs, ways(spec, case.grid), precision)
            if compared.projected is not None:  # else a row is wrong: a known fault of legacy
                key = ("clean", case.dtype, case.tokens)
                sigmas.setdefault(key, []).append(compared.projected.largest)
                closest[key] = max(closest.get(key, (0.0, "")), (compared.projected.largest, f"{case} {system.name}"))
        style, ids_MK = styles[number % len(styles)], given.stages.topk_ids_MK
        visits_E = ids_MK.flatten().bincount(minlength=spec.routing.num_experts)[: spec.routing.num_experts]
        on_input = spec.routing.weight_on == "input"  # there a factor of the weight is none of the result
        planted = [("routed", 1.01, 0)] + [("shared", 1.01, 0)] * (spec.shared is not None)
        # images visit other experts under the same numbers, and one of these is not the whole fault
        experts = [] if spec.vision else (visits_E >= 8).nonzero()[:, 0].tolist()
        planted += [("expert", factor, e) for e in experts for factor in (1.01, 1.001)]
        for part, factor, e in planted:
            system = Subclass(Faulty, style, fault=(part, factor), loud=e)
            outputs = outputs_of(run_system(case, system, given), given)
            told = project_outputs(given, outputs, ways(spec, case.grid), system.precision(spec))  # row rule or not
            assert told is not None
            kinds = [f"{part} x{factor}"]
            if part == "expert":
                kinds += [f"most used {kinds[0]}"] * (e == int(visits_E.argmax()))
            for kind in kinds:
                key = (kind, case.dtype, case.tokens)
                sigmas.setdefault(key, []).append(told.largest)
                right = bool(told.found) and (told.found[0].part, told.found[0].expert or 0) == (part, e)
                named[key] += (
                    right and len(told.found) == 1 and (on_input or abs(told.found[0].factor - factor) < 0.005)
                )
    for key in sorted(sigmas):
        values = sorted(sigmas[key])
        found = sum(value > PROJECTION_LIMIT for value in values)
        print(
            f"{key[0]:26} {key[1]} M={key[2]:4} {len(values):6} cases: sigma {values[0]:.1f} to {values[-1]:.1f}, median "
            f"{values[len(values) // 2]:.1f}; found {100 * found / len(values):.1f} %, named {100 * named[key] / len(values):.1f} %"
            f" {closest.get(key, '')}",
            flush=True,
        )


def main(what: str, first: str, last: str, *options: str) -> None:
    seeds, given = range(int(first), int(last)), dict(option.split("=") for option in options)
    names = given["models"].split(",") if "models" in given else models.names()
    size = given.get("size", "twin")
    if size == "wide":
        names = [name for name in names if models.load(name).wide is not None]
    with torch.inference_mode():
        if what == "clean":
            tokens = [int(m) for m in given.get("tokens", "1,7,33,64").split(",")]
            grids = [parse_grid(text) for text in given["grids"].split(",")] if "grids" in given else TP_SIZES
            clean(seeds, tokens=tokens, grids=grids, size=size, names=names)
        elif what == "projection":
            tokens = [int(m) for m in given.get("tokens", "128,200,512").split(",")]
            grids = [parse_grid(text) for text in given.get("grids", "tp1,tp4").split(",")]
            projection(seeds, tokens=tokens, grids=grids, size=size, names=names)
        elif what == "routers":
            routers(seeds, names=names)
        else:
            {"faults": faults, "split": split}[what](seeds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
