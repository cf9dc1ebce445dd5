"""Tokens made to tie, in all systems and styles: none is accused, and an expert that no tie excuses is found among them.

By name of the tie: twin rows of the router make scores equal to the last bit, and one unit in the last place of a
row's largest number sets them just apart; a token is moved to a fraction of the router's own error from where its
choice changes; a loud router saturates its scores; equal rows make all logits equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from harness import known, models
from harness.case import DTYPES, Case
from harness.compare import compare, near_ties
from harness.execution import run_system
from harness.outputs import whole_output
from harness.problem import Problem, problem, ways
from harness.route_certificates import routes_of
from harness.systems import System, resolve
from tests.clean_layers import STYLES, Layer
from tests.limits import Subclass
from tests.test_near_ties_and_extremes import altered, leaned, twins

TOKENS = 24
LOUD = {"softmax": 4, "sigmoid": 32, "sqrtsoftplus": 4, "sparsemixer": 4}


def _rows(plain: Problem, change: Callable[[str, Tensor], Tensor]) -> Problem:
    """With other router weights, those of a vision branch too."""
    weights = {n: change(n.removeprefix("vision_"), t.clone()) for n, t in plain.weights.items()}
    return altered(plain, weights, plain.tokens.hidden_states)


def _exact(plain: Problem) -> Problem:
    return altered(plain, twins(plain), plain.tokens.hidden_states)


def _last_place(plain: Problem) -> Problem:
    """Every second twin is off by one unit in the last place of its row's largest number."""

    def change(name: str, t: Tensor) -> Tensor:
        if name == "router_weight":
            odd, largest = torch.arange(1, len(t), 2), t[1::2].abs().argmax(1)
            t[odd, largest] *= 1 + torch.finfo(t.dtype).eps
        return t

    return _rows(_exact(plain), change)


def _leaning(plain: Problem) -> Problem:
    """A third of the tokens on the tie, a third 2**-12 of the way from it, a third 2**-6."""
    x_MH = torch.stack([leaned(plain, lean) for lean in (40, 12, 6)])
    third_M = torch.arange(TOKENS) % 3
    return altered(plain, plain.weights, x_MH[third_M, torch.arange(TOKENS)])


def _saturated(plain: Problem) -> Problem:
    """Many sigmoids are 1.0, in bf16 and in fp32; with one bias for all experts they tie."""
    loud = LOUD[plain.spec.routing.scoring_func]

    def change(name: str, t: Tensor) -> Tensor:
        if name == "router_weight":
            return t * loud
        return torch.full_like(t, -2.0) if name == "e_score_correction_bias" else t

    return _rows(plain, change)


def _all_equal(plain: Problem) -> Problem:
    def change(name: str, t: Tensor) -> Tensor:
        if name in ("router_weight", "router_bias", "e_score_correction_bias"):
            return t[:1].expand_as(t).contiguous()
        return t

    return _rows(plain, change)


TIES: Mapping[str, Callable[[Problem], Problem]] = {
    "exact": _exact,
    "last place": _last_place,
    "leaning": _leaning,
    "saturated": _saturated,
    "all equal": _all_equal,
}
CLEAN = [Subclass(Layer, STYLES[name]) for name in ("wide", "everything_in_dtype")]
RELEASED = [resolve(name) for name in ("runner", "legacy", "transformers")]


def _compared(case: Case, given: Problem, system: System):
    run = run_system(case, system, given)
    assert run.broken is None, run.broken
    outputs = [whole_output(out, given) for out in run.ranks]
    return compare(given, outputs, ways(case.spec, case.grid), system.precision(case.spec))


def _has(system: System | Subclass, case: Case, given: Problem) -> bool:
    """Whether it computes this case, and without a known fault."""
    if isinstance(system, Subclass):
        return True
    return system.supports(case) is None and known.expected(case, system.name, given) is None


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("model", models.names())
def test_no_right_layer_is_accused_on_tokens_that_tie(model: str, tie: str) -> None:
    for dtype in DTYPES:
        case = Case(model=model, dtype=dtype, tokens=TOKENS, seed=7)
        given = TIES[tie](problem(case))
        for system in (*RELEASED, *CLEAN):
            if _has(system, case, given):
                compared = _compared(case, given, system)
                assert not compared.wrong, f"{system.name} {dtype}: {compared.figures()}"


@pytest.mark.parametrize("tie", TIES)
def test_ties_are_there_and_other_choices_than_the_oracles_are_made(tie: str) -> None:
    """So that the test above is about what it says. Where every expert ties, choices are too many, or all are chosen."""
    tied = other = 0
    for model in models.names():
        case = Case(model=model, dtype="bf16", tokens=TOKENS, seed=7)
        given = TIES[tie](problem(case))
        tied += int(near_ties(given, case.spec.routing.precision).sum())
        compared = _compared(case, given, CLEAN[1])
        other += compared.ties + int(compared.undecided_RM.sum())
    assert tied >= 4 * len(models.names())
    assert other >= 20


def test_sigmoids_saturate_at_one() -> None:
    given = _saturated(problem(Case(model="deepseek_v3", dtype="bf16", tokens=TOKENS, seed=7)))
    ones_M = (given.stages.scores_ME.float() == 1.0).sum(1)
    assert (ones_M > given.spec.routing.top_k).any()


class Elsewhere(Layer):
    """Gives each token, in the place of its best expert, one that is on none of its legal routes."""

    elsewhere_M: Tensor  # its number, or -1 where there is none or where the routes are too many to list

    def route(self, x, routing, named):
        w_MK, ids_MK = super().route(x, routing, named)
        best_M1, elsewhere_M1 = w_MK.argmax(1, keepdim=True), self.elsewhere_M[:, None]
        wrong_M1 = torch.where(elsewhere_M1 < 0, ids_MK.gather(1, best_M1), elsewhere_M1)
        return w_MK, ids_MK.scatter(1, best_M1, wrong_M1)


def _elsewhere(given: Problem) -> Tensor:
    routing, found = given.spec.routing, []
    for token in range(TOKENS):
        routes = routes_of(given, token, routing.precision)
        legal = {e for route in routes or () for e in route.topk_ids_MK[0].tolist()}
        others = [e for e in range(routing.num_experts) if e not in legal] if routes else []
        found.append(min(others, key=lambda e: float(given.stages.scores_ME[token, e]), default=-1))
    return torch.tensor(found)


@pytest.mark.parametrize("tie", [tie for tie in TIES if tie != "all equal"])  # there every choice is legal
@pytest.mark.parametrize("model", [name for name in models.names() if models.load(name).twin.vision is None])
def test_an_expert_on_no_legal_route_is_found_on_tokens_that_tie(model: str, tie: str) -> None:
    for dtype in DTYPES:
        case = Case(model=model, dtype=dtype, tokens=TOKENS, seed=7)
        given = TIES[tie](problem(case))
        elsewhere_M = _elsewhere(given)
        compared = _compared(case, given, Subclass(Elsewhere, STYLES["loop"], elsewhere_M=elsewhere_M))
        planted_M = elsewhere_M >= 0
        assert compared.wrong_RM[0][planted_M].all(), f"{dtype}: {compared.figures()}"
        assert not compared.wrong_RM[0][~planted_M].any()
        assert all(each.holds is not True for each in compared.certificates if planted_M[each.token])
