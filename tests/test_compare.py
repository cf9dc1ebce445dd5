"""The rule on rows: near ties by their legal routes, the shortcut past the error analysis, and what neither may excuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.case import Case, Grid, parse, parse_grid
from harness.check import check
from harness.compare import DEVIATION_LIMIT, RUN_LIMIT, compare, near_ties, tolerance_needed
from harness.execution import RankOutput
from harness.finding import Verdict
from harness.outputs import whole_output
from harness.problem import Problem, problem, ways
from harness.systems import resolve
from reference.moe import Choice, forward
from reference.rounding import analyse, router_error
from reference.routes import legal_routes


def _routes(given: Problem, row: int) -> list[Choice]:
    routing, x_1H = given.spec.routing, given.tokens.hidden_states[row : row + 1]
    bias_E, factor_E = (given.exact.get(name) for name in ("e_score_correction_bias", "per_expert_scale"))
    delta_E = router_error(given.spec, given.exact, x_1H, routing.precision)[0]
    return legal_routes(routing, given.stages.logits_ME[row], bias_E, delta_E, factor_E) or []


def _on_route(given: Problem, row: int, route: Choice) -> Tensor:
    """The right output, but for one row on another route; rounded to the dtype."""
    output_MH = given.stages.output_MH.clone()
    output_MH[row] = forward(given.spec, given.exact, given.tokens.hidden_states[row : row + 1], choice=route).output_MH
    return output_MH.to(given.dtype)


def _judged(given: Problem, *outputs: Tensor):
    """Outputs of as many tensor-parallel ranks."""
    cut = ways(given.spec, Grid(tp=len(outputs)))
    return compare(given, [output.double() for output in outputs], cut, given.spec.routing.precision)


@pytest.mark.parametrize("model", ["gemma4", "lfm2_moe", "phimoe", "granitemoehybrid"])
def test_every_legal_route_of_a_near_tie_is_right_and_ten_per_cent_beside_it_is_wrong(model: str) -> None:
    given = problem(Case(model=model, dtype="bf16", tokens=200, seed=1))
    tried = 0
    for row in near_ties(given, given.spec.routing.precision).nonzero()[:40, 0].tolist():
        for route in _routes(given, row):
            right_MH = _on_route(given, row, route)
            assert not _judged(given, right_MH).wrong, (row, route.topk_ids_MK)
            wrong_MH = right_MH.clone()
            wrong_MH[row] *= 1.1
            assert _judged(given, wrong_MH).wrong_RM[0, row], (row, route.topk_ids_MK)
            tried += route.topk_ids_MK.tolist()[0] != given.stages.topk_ids_MK[row].tolist()
    assert tried >= 2


def test_an_expert_that_no_rounding_can_choose_is_wrong() -> None:
    given = problem(Case(model="mixtral", dtype="bf16", tokens=33, seed=1))
    for row in range(33):
        ids = given.stages.topk_ids_MK[row].tolist()
        ids[-1] = int(given.stages.logits_ME[row].argmin())
        chosen = Choice(torch.tensor([ids]), given.stages.topk_weights_MK[row : row + 1], torch.zeros(1))
        assert _judged(given, _on_route(given, row, chosen)).wrong_RM[0, row]


def test_a_route_that_weighs_its_experts_more_may_err_more() -> None:
    """Token 155 changes a mask, and with it from a weight of 0.5 to 1; its error is 1.24 times what the oracle's may be."""
    finding = check(parse("phimoe@tp2.bf16.tokens200.seed3170"), resolve("runner"))
    assert finding.verdict is Verdict.OK, finding.diagnosis
    assert finding.figures["rows_on_another_legal_route"] >= 1


def test_ranks_that_disagree_with_every_route_are_wrong_though_one_of_them_is_right() -> None:
    given = problem(Case(model="gemma4", dtype="bf16", tokens=33, seed=1))
    row = int(near_ties(given, given.spec.routing.precision).nonzero()[0, 0])
    right_MH = given.stages.output_MH.to(given.dtype)
    wrong_MH = right_MH.clone()
    wrong_MH[row] *= 1.5
    assert _judged(given, right_MH, wrong_MH).wrong_RM.any(0).tolist() == [m == row for m in range(33)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["jamba", "nemotron_h", "llama4", "qwen3_next"])
def test_the_shortcut_past_the_analysis_changes_no_verdict(model: str, dtype: str) -> None:
    given = problem(Case(model=model, dtype=dtype, tokens=33, seed=2))
    spec, x_MH, stages, precision = given.spec, given.tokens.hidden_states, given.stages, given.spec.routing.precision
    deviation_M = analyse(spec, given.exact, x_MH, stages, 1, precision).deviation_M
    decided_M = ~near_ties(given, precision)
    generator = torch.Generator().manual_seed(0)
    for factor in (0.5, 1.4, 1.6, 3.0, 10.0, 30.0, 100.0, 1000.0):
        noise_MH = torch.randn(stages.output_MH.shape, generator=generator, dtype=torch.float64)
        error_MH = noise_MH / noise_MH.norm(dim=1, keepdim=True) * (factor * deviation_M)[:, None]
        error_M = error_MH.norm(dim=1)
        naive_M = given.naive_error(ways(spec, Grid()), precision)
        expected_M = (error_M > RUN_LIMIT * naive_M) & (error_M > DEVIATION_LIMIT * deviation_M)
        found_M = _judged(given, stages.output_MH + error_MH).wrong_RM[0]
        assert found_M[decided_M].equal(expected_M[decided_M])


def test_nan_and_infinity_are_wrong_on_near_ties_too() -> None:
    given = problem(Case(model="gemma4", dtype="bf16", tokens=7, seed=1))
    for value in (float("nan"), float("inf")):
        assert _judged(given, torch.full_like(given.tokens.hidden_states, value)).wrong_RM.all()


@pytest.mark.parametrize("split", ["5_2", "0_7", "1_0", "0_0"])
def test_a_rank_with_tokens_of_its_own_is_judged_by_those_alone(split: str) -> None:
    case = parse(f"mixtral@tp2.dp2.tokens{split}")
    given, cut = problem(case), ways(case.spec, case.grid)
    for wrong in range(4):
        outputs = []
        for rank, rows in enumerate(case.rows):
            y_mH = given.stages.output_MH[rows].float() * (2.0 if rank == wrong else 1.0)
            outputs.append(whole_output(RankOutput(y_mH * 0.25, rows, 0.25, None, lambda x: x), given))
        expected_RM = torch.zeros(4, case.tokens, dtype=torch.bool)
        expected_RM[wrong, case.rows[wrong]] = True
        assert compare(given, outputs, cut, given.spec.routing.precision).wrong_RM.equal(expected_RM)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [("tp4", (4, 4)), ("dp2", (2, 1)), ("tp2.ep4.dp2", (4, 2)), ("tp4.ep4.sp4", (4, 1)), ("tp4.ep8.dp2.sp4", (8, 1))],
)
def test_the_yardstick_has_a_partial_sum_for_each_rank_with_experts_and_for_each_piece_of_shared_ones(grid, expected):
    assert ways(Case(model="deepseek_v3").spec, parse_grid(grid)) == expected


def test_a_yardstick_never_cuts_a_width_unevenly() -> None:
    spec = Case(model="ernie4_5_vl_moe").spec
    for tp in (5, 7, 16):
        cut = ways(spec, Grid(tp=tp, ep=tp)).routed
        assert all(width % cut == 0 for name, width in spec.tp_widths().items() if not name.startswith("shared"))
        assert 1 <= cut <= tp


# -- what a verdict rests on


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss", "mixtral", "nemotron_h"])
def test_a_gross_fault_is_certain_and_a_right_output_never_is(model: str, dtype: str) -> None:
    given = problem(Case(model=model, dtype=dtype, tokens=7, seed=1))
    y_MH = given.stages.output_MH.to(given.dtype)
    assert not _judged(given, y_MH).certain
    for wrong_MH in (torch.zeros_like(y_MH), -y_MH, 2 * y_MH, torch.full_like(y_MH, torch.nan)):
        judged = _judged(given, wrong_MH)
        assert judged.wrong
        nan_in_fp16 = dtype == "fp16" and bool(wrong_MH.isnan().all())
        assert judged.certain != nan_in_fp16  # fp16 may overflow on its way, which no bound covers


def test_a_small_fault_in_bf16_is_wrong_but_not_certain() -> None:
    given = problem(Case(model="deepseek_v3", dtype="bf16", tokens=7, seed=1))
    judged = _judged(given, (1.03 * given.stages.output_MH).to(given.dtype))
    assert judged.wrong
    assert not judged.certain
    assert judged.figures()["certain"] is False
    assert judged.figures()["error_over_certified_bound"] < 1


def test_a_near_tie_is_no_proof_however_far_its_route_leads() -> None:
    """Beyond the bound of the oracle's choice is every other legal choice too."""
    given = problem(Case(model="gemma4", dtype="bf16", tokens=33, seed=1))
    row = int(near_ties(given, given.spec.routing.precision).nonzero()[0, 0])
    wrong_MH = given.stages.output_MH.clone()
    wrong_MH[row] *= -1
    judged = _judged(given, wrong_MH.to(given.dtype))
    assert judged.wrong_RM[0].nonzero()[:, 0].tolist() == [row]
    assert not judged.certain


@pytest.mark.parametrize("factor", [1.0, 1.001, 1.5, -1.0])
def test_the_tolerance_needed_is_the_least_that_assert_close_accepts(factor: float) -> None:
    given = problem(Case(model="mixtral", tokens=7))
    law_MH = given.stages.output_MH
    found_MH = (factor * law_MH).float().double()
    needed = tolerance_needed((found_MH - law_MH)[None], law_MH)
    torch.testing.assert_close(found_MH, law_MH, rtol=needed * (1 + 1e-9), atol=needed * (1 + 1e-9))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found_MH, law_MH, rtol=needed * 0.999, atol=needed * 0.999)


def test_no_tolerance_lets_nan_pass() -> None:
    law_MH = problem(Case(model="mixtral", tokens=7)).stages.output_MH
    assert tolerance_needed(torch.full_like(law_MH, torch.nan)[None], law_MH) == float("inf")


def test_figures_of_a_wrong_output_say_what_it_would_have_taken_to_miss_it() -> None:
    given = problem(Case(model="deepseek_v3", dtype="bf16", tokens=7, seed=1))
    figures = _judged(given, (1.2 * given.stages.output_MH).to(given.dtype)).figures()
    assert figures["tolerance_needed"] > 3 * figures["tolerance_of_naive_run"] > 0
    assert figures["row_error"] > figures["row_error_allowed"] > 0
    assert figures["element_error"] / figures["certified_bound"] == pytest.approx(
        figures["error_over_certified_bound"], rel=2e-3
    )
    right = _judged(given, given.stages.output_MH.to(given.dtype)).figures()
    assert "tolerance_of_naive_run" not in right  # a naive run more for each right case would be dear
    assert right["tolerance_needed"] < figures["tolerance_of_naive_run"]


# -- route certificates


@pytest.mark.parametrize("model", ["gemma4", "phimoe", "granitemoehybrid"])
def test_a_certificate_lists_the_legal_choices_and_says_which_one_the_output_equals(model: str) -> None:
    given = problem(Case(model=model, dtype="bf16", tokens=200, seed=1))
    told = 0
    for row in near_ties(given, given.spec.routing.precision).nonzero()[:40, 0].tolist():
        for number, route in enumerate(_routes(given, row)):
            for each in _judged(given, _on_route(given, row, route)).certificates:
                assert (each.token, each.holds, each.nearest_R) == (row, True, (number,))
                assert each.routes is not None
                assert len(each.routes) == len(_routes(given, row))
                assert each.routes[number].experts == tuple(route.topk_ids_MK[0].tolist())
                assert each.as_dict()["equals"] == number
                told += 1
    assert told >= 2


def test_an_output_on_no_legal_route_is_told_so_with_the_routes_as_data() -> None:
    given = problem(Case(model="gemma4", dtype="bf16", tokens=33, seed=1))
    row = int(near_ties(given, given.spec.routing.precision).nonzero()[0, 0])
    wrong_MH = given.stages.output_MH.clone()
    wrong_MH[row] *= 1.5
    judged = _judged(given, wrong_MH.to(given.dtype))
    (figure,) = judged.figures()["routes"]
    assert (figure["token"], figure["equals"]) == (row, "none")
    assert len(figure["legal_routes"]) == len(_routes(given, row)) >= 2
    for told, route in zip(figure["legal_routes"], _routes(given, row), strict=True):
        assert told["experts"] == route.topk_ids_MK[0].tolist()
        assert told["weights"] == pytest.approx(route.topk_weights_MK[0].tolist(), rel=1e-5)
    first, *choices = judged.certificates[0].lines()
    assert f"token {row}: {len(choices)} legal choices of experts; the output equals none; nearest is choice" in first


def test_too_many_legal_choices_are_told_as_unknown() -> None:
    """All logits equal: 1,820 choices of 4 in 16 experts are right."""
    plain = problem(Case(model="olmoe", tokens=3))
    weights = plain.weights | {"router_weight": torch.zeros_like(plain.weights["router_weight"])}
    given = replace(plain, weights=weights, exact={n: t.double() for n, t in weights.items()}, _errors={})
    given = replace(given, stages=forward(given.spec, given.exact, given.tokens.hidden_states))
    choice = Choice(given.stages.topk_ids_MK + 1, given.stages.topk_weights_MK, given.stages.margin_M)
    other_MH = forward(given.spec, given.exact, given.tokens.hidden_states, choice=choice).output_MH
    judged = _judged(given, other_MH.float())
    assert not judged.wrong
    assert judged.undecided_RM.all()
    assert [each.as_dict()["equals"] for each in judged.certificates] == ["unknown"] * 3
    assert "more legal choices of experts than can be listed" in next(judged.certificates[0].lines())
