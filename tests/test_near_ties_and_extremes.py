"""Tokens on near ties and routers at the ends of their range: a right layer is never accused there, and never NaN.

Hypothesis is led to the worst: to the smallest margin in units of the router's error, and to the largest logit.

The law ends where float64 or the dtype does, and so do the draws: a logit is off by less than half a unit in the dtype
that the page keeps it in (else its exponential, and with it the weights, is anybody's guess), and no score that is
divided by the sum of the chosen ones underflows float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, target
from hypothesis import strategies as st
from torch import Tensor

from harness import models
from harness.case import DTYPES, Case, parse_grid
from harness.check import judge
from harness.comm import Communicator
from harness.compare import near_ties
from harness.execution import run_system
from harness.faults.fault import layers_of
from harness.finding import Finding, Verdict
from harness.problem import Problem, problem
from harness.runner.router import FusedMoERouter
from harness.systems import Layer
from harness.systems.runner import RunnerSystem
from harness.weights import Tokens
from harness.yardstick import loose_logits
from reference.moe import forward, router_logits, score, select_experts
from reference.rounding import router_error

RUNNER = RunnerSystem()
GRIDS = ("tp1", "tp2", "tp4.ep2", "dp2", "tp2.ep4.dp2")
ROUTER = ("router_weight", "router_bias")
LEAST_LOGIT = -80.0  # exp of less than -87 is no normal float32 number
LOUDEST = {"fp32": 2.0**12, "bf16": 2.0**7, "fp16": 2.0**10}  # logits kept in that dtype
_FAR = 4.0  # how far a token may move, in differences of two router rows


def altered(plain: Problem, weights: Mapping[str, Tensor], tokens_MH: Tensor) -> Problem:
    """The problem with other router weights and other tokens, in the same dtypes."""
    exact = {name: tensor.double() for name, tensor in weights.items()}
    stages = forward(plain.spec, exact, tokens_MH, is_vision_M=plain.tokens.is_vision)
    return replace(
        plain, weights=dict(weights), exact=exact, tokens=Tokens(tokens_MH, plain.tokens.is_vision), stages=stages,
        _errors={},
    )  # fmt: skip


def judged(case: Case, plain: Problem, system: RunnerSystem = RUNNER) -> Finding:
    """The finding; every output is a number."""
    run = run_system(case, system, plain)
    assert run.broken is None, (str(case), run.broken)
    assert system is not RUNNER or all(bool(rank.output.isfinite().all()) for rank in run.ranks), str(case)
    return judge(case, system, plain, run)


# -- near ties


def leaned(plain: Problem, lean: int) -> Tensor:
    """Each text token moved to where its choice of experts changes, but for 2**-lean of the way.

    Towards the best of the experts that are not chosen and away from the last that is, by bisection in float64: what ties
    there are two experts, or two groups. A token stays where the choice does.
    """
    routing = plain.spec.routing
    bias_E = plain.exact.get("e_score_correction_bias")

    def chosen(x_MH: Tensor) -> Tensor:
        logits_ME = router_logits(x_MH, plain.exact, routing)
        return select_experts(logits_ME, score(logits_ME, routing), bias_E, routing).topk_ids_MK.sort(1).values

    x_MH = plain.tokens.hidden_states.double()
    logits_ME, ids_MK = router_logits(x_MH, plain.exact, routing), chosen(x_MH)
    last_M = logits_ME.masked_fill(~_among(ids_MK, routing.num_logits), math.inf).argmin(1)
    next_M = logits_ME.masked_fill(_among(ids_MK, routing.num_logits), -math.inf).argmax(1)
    way_MH = plain.exact["router_weight"][next_M] - plain.exact["router_weight"][last_M]
    low_M1, high_M1 = x_MH.new_zeros(len(x_MH), 1), x_MH.new_full((len(x_MH), 1), _FAR)
    for _ in range(60):
        middle_M1 = (low_M1 + high_M1) / 2
        same_M1 = (chosen(x_MH + middle_M1 * way_MH) == ids_MK).all(1, keepdim=True)
        low_M1, high_M1 = torch.where(same_M1, middle_M1, low_M1), torch.where(same_M1, high_M1, middle_M1)
    stays_M1 = low_M1 > 0.99 * _FAR
    if plain.tokens.is_vision is not None:
        stays_M1 = stays_M1 | plain.tokens.is_vision[:, None]
    return torch.where(stays_M1, x_MH, x_MH + low_M1 * (1 - 2.0**-lean) * way_MH).to(plain.dtype)


def _among(ids_MK: Tensor, count: int) -> Tensor:
    return torch.zeros(len(ids_MK), count, dtype=torch.bool).scatter(1, ids_MK, True)


def twins(plain: Problem) -> dict[str, Tensor]:
    """Router weights in which every second expert has the row, the bias and the factor of the one before it: exact ties."""
    names = (*ROUTER, "e_score_correction_bias", "per_expert_scale")
    return {
        name: tensor[::2].repeat_interleave(2, 0) if name.removeprefix("vision_") in names else tensor
        for name, tensor in plain.weights.items()
    }


def nearest(plain: Problem) -> float:
    """The smallest margin of a token, in units of what a legal router's score may be off there."""
    precision = RUNNER.precision(plain.spec)
    x_MH, is_vision = plain.tokens.hidden_states, plain.tokens.is_vision
    delta_ME = router_error(plain.spec, plain.exact, x_MH, precision, is_vision)
    return float((plain.stages.margin_M / delta_ME.amax(1)).amin())


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    name=st.sampled_from(models.names()), grid=st.sampled_from(GRIDS), seed=st.integers(0, 50), lean=st.integers(0, 30),
    place=st.integers(0, 39), ulps=st.integers(-8, 8), tied=st.booleans(),
)  # fmt: skip
def test_a_token_on_a_near_tie_is_never_accused(
    dtype: str, name: str, grid: str, seed: int, lean: int, place: int, ulps: int, tied: bool
):
    case = Case(model=name, grid=parse_grid(grid), dtype=dtype, tokens=9, seed=seed)
    plain = problem(case)
    if tied:
        plain = altered(plain, twins(plain), plain.tokens.hidden_states)
    x_MH = leaned(plain, lean)
    x_MH[:, place] *= 1 + ulps * torch.finfo(plain.dtype).eps
    near = altered(plain, plain.weights, x_MH)
    target(-math.log2(nearest(near) + 2.0**-30), label="closeness of the nearest tie")
    finding = judged(case, near)
    assert finding.verdict in (Verdict.OK, Verdict.UNDECIDED), (str(case), finding.diagnosis)
    assert tied or finding.verdict is Verdict.OK, (str(case), finding.diagnosis)


@pytest.mark.parametrize("name", models.names())
def test_leaning_tokens_are_near_ties(name: str):
    """So that the test above is about what it says."""
    case = Case(model=name, tokens=33)
    plain = problem(case)
    near = altered(plain, plain.weights, leaned(plain, 28))
    precision = RUNNER.precision(plain.spec)
    assert near_ties(near, precision).float().mean() > near_ties(plain, precision).float().mean() + 0.2
    assert nearest(near) < 1


class _TakesTheWorst:
    """A router that puts the expert with the least logit in the place of the best one."""

    def __init__(self, right: FusedMoERouter) -> None:
        self._right = right

    @property
    def scales(self) -> bool:
        return self._right.scales

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        weights_MK, ids_MK = self._right.select_experts(router_logits_ME)
        worst_M1 = router_logits_ME.argmin(1, keepdim=True)
        return weights_MK, ids_MK.scatter(1, weights_MK.argmax(1, keepdim=True), worst_M1)


class _WrongChoice(RunnerSystem):
    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        built = super().build(case, weights, comm)
        for layer in layers_of(built):
            layer.runner.router = _TakesTheWorst(layer.runner.router)
        return built


@pytest.mark.parametrize("name", models.names())
def test_a_choice_that_no_tie_excuses_is_accused_among_near_ties(name: str):
    case = Case(model=name, tokens=9)
    plain = problem(case)
    near = altered(plain, plain.weights, leaned(plain, 28))
    assert judged(case, near, _WrongChoice()).verdict is Verdict.MISMATCH


# -- extreme logits

SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda t: t,
    "all above 0": torch.abs,
    "all below 0": lambda t: -t.abs(),
}


def extreme(plain: Problem, sign: str, power: int, token_power: int) -> Problem:
    """Router weights times 2**power, tokens times 2**token_power, as far as the layer can follow.

    sign: of all logits, by that of the weights, tokens then being positive.
    """
    routing = plain.spec.routing
    bare = {n: SIGNS[sign](t) if n.removeprefix("vision_") in ROUTER else t for n, t in plain.weights.items()}
    x_MH = plain.tokens.hidden_states if sign == "any" else plain.tokens.hidden_states.abs()
    x_MH = (x_MH.double() * 2.0**token_power).to(plain.dtype)
    logits_ME = altered(plain, bare, x_MH).stages.logits_ME
    kept_in = {"model": plain.dtype, "fp32": torch.float32}[routing.precision.logits]
    most = LOUDEST[{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[kept_in]]
    room = most / max(float(logits_ME.abs().amax()), 1e-30)
    if routing.scoring_func in ("sigmoid", "sqrtsoftplus"):
        room = min(room, LEAST_LOGIT / min(float(logits_ME.amin()), -1e-30))
    factor = 2.0 ** min(power, math.floor(math.log2(room)))
    weights = {
        n: (t.double() * factor).to(t.dtype) if n.removeprefix("vision_") in ROUTER else t for n, t in bare.items()
    }
    return altered(plain, weights, x_MH)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    name=st.sampled_from(models.names()), grid=st.sampled_from(GRIDS), seed=st.integers(0, 50),
    sign=st.sampled_from(tuple(SIGNS)), power=st.integers(-20, 14), token_power=st.integers(-6, 2),
)  # fmt: skip
def test_extreme_logits_give_numbers_and_no_accusation(
    dtype: str, name: str, grid: str, seed: int, sign: str, power: int, token_power: int
):
    case = Case(model=name, grid=parse_grid(grid), dtype=dtype, tokens=9, seed=seed)
    loud = extreme(problem(case), sign, power, token_power)
    target(float(loud.stages.logits_ME.abs().amax()), label="largest logit")
    finding = judged(case, loud)
    assert finding.verdict in (Verdict.OK, Verdict.UNDECIDED), (str(case), sign, power, token_power, finding.diagnosis)


@pytest.mark.parametrize(("dtype", "least"), [("fp32", 89.0), ("bf16", 64.0), ("fp16", 89.0)])
def test_extremes_reach_where_a_naive_exponential_overflows(dtype: str, least: float):
    """exp(89) is no float32 number; logits kept in bf16 stop at 128, where they are off by a quarter."""
    for name in models.names():
        loud = extreme(problem(Case(model=name, dtype=dtype, tokens=9)), "all above 0", 14, 0)
        assert float(loud.stages.logits_ME.amax()) >= least, name


@pytest.mark.parametrize("sign", SIGNS)
def test_a_wrong_choice_is_accused_among_extreme_logits(sign: str):
    case = Case(model="deepseek_v3", tokens=9)
    assert judged(case, extreme(problem(case), sign, 2, 0), _WrongChoice()).verdict is Verdict.MISMATCH


# -- beyond the ends: where a yardstick cannot judge


def times(plain: Problem, factor: float) -> Problem:
    """All logits of one sign, that of the factor, on the average this large at the first tokens.

    The tokens behind them lose what makes them loud: their logits stay below 1.
    """
    bare = {n: t.double().abs() if n.removeprefix("vision_") in ROUTER else t for n, t in plain.weights.items()}
    x_MH = plain.tokens.hidden_states.abs()
    middle = float(altered(plain, bare, x_MH).stages.logits_ME.mean())
    weights = {
        n: (t * (factor / middle)).to(plain.weights[n].dtype) if n.removeprefix("vision_") in ROUTER else t
        for n, t in bare.items()
    }
    x_MH[QUIET:] *= 1e-3 / abs(factor)
    return altered(plain, weights, x_MH)


class _Louder(RunnerSystem):
    """Multiplies its output by 1.05, in the given rows alone."""

    def __init__(self, rows: slice, factor: float = 1.05) -> None:
        self._rows, self._factor = rows, factor

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        block, rows, factor = super().build(case, weights, comm), self._rows, self._factor

        def call(hidden_states: Tensor, **inputs: Tensor) -> Tensor:
            y_MH = block(hidden_states, **inputs).clone()
            y_MH[rows] *= factor
            return y_MH

        return call  # type: ignore[return-value]  # no stages, no plan: a layer may have none


QUIET = 30  # tokens from here on are ordinary
# models that divide by the sum of the chosen sigmoids alone; the others add 1e-20, and the law's own weights vanish
UNDERFLOWS = [("minimax_m2", "fp32", -120.0), ("step3p5", "bf16", -150.0), ("minimax_m2", "fp16", -130.0)]
ARBITRARY = [("gpt_oss", "bf16", 10_000.0)]


def beyond(name: str, dtype: str, logit: float) -> tuple[Case, Problem]:
    case = Case(model=name, dtype=dtype, tokens=40, grid=parse_grid("tp2"))
    return case, times(problem(case), logit)


@pytest.mark.parametrize(("name", "dtype", "logit"), [*UNDERFLOWS, *ARBITRARY])
def test_a_right_layer_is_undecided_where_the_router_leaves_its_range_and_the_finding_says_why(name, dtype, logit):
    case, loud = beyond(name, dtype, logit)
    assert loud.stages.output_MH.isfinite().all()
    run = run_system(case, RUNNER, loud)
    finding = judge(case, RUNNER, loud, run)
    assert finding.verdict is Verdict.UNDECIDED, finding.diagnosis
    why = "a yardstick that is no number cannot judge" if logit < 0 else "makes the router weights arbitrary"
    assert why in finding.diagnosis


# in fp16 the outputs of ordinary rows vanish here, and gpt_oss's router bias is as loud for them as for the others
@pytest.mark.parametrize(("name", "dtype", "logit"), UNDERFLOWS[:2])
def test_a_wrong_layer_is_found_on_ordinary_rows_of_a_case_whose_other_rows_nobody_can_judge(name, dtype, logit):
    case, loud = beyond(name, dtype, logit)
    system = _Louder(slice(QUIET, None), 1.2)
    finding = judge(case, system, loud, run_system(case, system, loud))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.figures["wrong_rows"] == 40 - QUIET
    assert math.isfinite(finding.figures["row_error_over_naive"])
    assert math.isfinite(finding.figures["tolerance_needed"])


@pytest.mark.parametrize(("name", "dtype", "logit"), ARBITRARY)
def test_nan_is_wrong_where_law_and_yardstick_are_finite_however_large_the_logits(name, dtype, logit):
    case, loud = beyond(name, dtype, logit)
    system = _Louder(slice(3, 4), math.nan)
    finding = judge(case, system, loud, run_system(case, system, loud))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.figures["wrong_rows"] == 1


def test_nan_of_a_layer_on_ordinary_numbers_is_wrong_in_every_row():
    case = Case(model="glm4_moe", tokens=9)
    system = _Louder(slice(None), math.nan)
    finding = judge(case, system, problem(case), run_system(case, system, problem(case)))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.figures["wrong_rows"] == 9


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 127.0), ("fp16", 1000.0), ("fp32", 2.0**22)])
def test_logits_whose_neighbours_are_closer_than_1_excuse_nothing(dtype: str, most: float):
    plain = problem(Case(model="gpt_oss", dtype=dtype, tokens=9))
    assert not loose_logits(plain, RUNNER.precision(plain.spec)).any()
    biggest = float(plain.stages.logits_ME.abs().amax())
    weights = {n: (t.double() * (most / biggest)).to(t.dtype) if n in ROUTER else t for n, t in plain.weights.items()}
    loud = altered(plain, weights, plain.tokens.hidden_states)
    assert not loose_logits(loud, RUNNER.precision(plain.spec)).any()
    twice = {n: (t.double() * 4).to(t.dtype) if n in ROUTER else t for n, t in weights.items()}
    assert (
        dtype == "fp32"
        or loose_logits(altered(plain, twice, plain.tokens.hidden_states), RUNNER.precision(plain.spec)).any()
    )
