"""Many rows together: one expert, the shared part or the routed part counted 1 % too often, in bf16, with its name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness import models
from harness.case import Case, Grid, parse
from harness.check import check, judge, whole_output
from harness.compare import Comparison, compare, near_ties, project_outputs
from harness.execution import run_system
from harness.faults import plant
from harness.faults.fault import Fault, FaultyRunner
from harness.finding import Finding, Verdict
from harness.problem import Problem, Ways, problem, ways
from harness.projection import LIMIT, Projected, project
from harness.systems import resolve
from reference.moe import Choice, forward
from reference.spec import RouterPrecision
from tests.clean_layers import STYLES
from tests.limits import Faulty, Subclass


def _outputs(case: Case, system) -> tuple[Problem, list[Tensor], Ways, RouterPrecision]:
    given = problem(case)
    run = run_system(case, system, given)
    assert run.broken is None
    outputs = [whole_output(out, given) for out in run.ranks]
    return given, outputs, ways(case.spec, case.grid), system.precision(case.spec)


def _compared(case: Case, system) -> Comparison:
    return compare(*_outputs(case, system))


def _faulty(part: str, factor: float, expert: int = 0) -> Subclass:
    return Subclass(Faulty, STYLES["loop"], fault=(part, factor), loud=expert)


def _planted(case: Case, part: str, factor: float, expert: int) -> Comparison:
    return _compared(case, _faulty(part, factor, expert))


def _planted_told(case: Case, part: str, factor: float, expert: int = 0) -> Projected:
    """What many rows say, whether or not a row is beyond its limit already."""
    told = project_outputs(*_outputs(case, _faulty(part, factor, expert)))
    assert told is not None
    return told


@functools.cache
def _most_used(case: Case) -> int:
    ids_MK = problem(case).stages.topk_ids_MK
    return int(ids_MK[ids_MK < case.spec.routing.num_experts].mode().values)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("model", [name for name in models.names() if models.load(name).twin.vision is None])
def test_one_per_cent_on_one_expert_is_found_and_the_expert_named(model: str, dtype: str) -> None:
    case = Case(model=model, dtype=dtype, tokens=128, seed=11)
    expert = _most_used(case)
    told = _planted_told(case, "expert", 1.01, expert)
    (found,) = told.found
    assert (found.part, found.expert, found.vision) == ("expert", expert, False)
    if case.spec.routing.weight_on == "output":
        assert found.factor == pytest.approx(1.01, abs=0.004)
        assert f"expert {expert} counts {found.factor:.3f} times (expected 1)" in told.sentence


@pytest.mark.parametrize(
    ("part", "factor", "name"),
    [
        ("shared", 1.01, "the shared part"),
        ("shared", 0.99, "the shared part"),
        ("routed", 1.01, "the routed part"),
        ("routed", 0.99, "the routed part"),
    ],
)
@pytest.mark.parametrize("model", ["deepseek_v3", "ernie4_5_vl_moe", "qwen2_moe", "nemotron_h"])
def test_one_per_cent_on_a_whole_part_is_named_as_that_part(model: str, part: str, factor: float, name: str) -> None:
    (found,) = _planted_told(Case(model=model, dtype="bf16", tokens=128, seed=3), part, factor).found
    assert (found.name, found.expert) == (name, None)
    assert found.factor == pytest.approx(factor, abs=0.003)


@pytest.mark.parametrize("case", ["deepseek_v3@bf16.tokens200.seed2", "olmoe@fp16.tokens128.seed2"])
def test_several_experts_are_named_together_and_not_as_the_routed_part(case: str) -> None:
    given = problem(parse(case))
    loud = {1: 1.02, 4: 0.98, 6: 1.02}
    found = _told(given, _with_factors(given, loud))
    assert {each.expert: each.factor > 1 for each in found} == {e: factor > 1 for e, factor in loud.items()}


def test_an_expert_of_the_vision_branch_is_told_from_the_text_expert_of_that_number() -> None:
    given = problem(parse("ernie4_5_vl_moe@bf16.tokens512.seed2"))
    expert = int(given.stages.topk_ids_MK[given.tokens.is_vision].flatten().mode().values)
    for vision in (True, False):
        output_MH = given.stages.output_MH.clone()
        rows_M = given.tokens.is_vision if vision else ~given.tokens.is_vision
        output_MH[rows_M] = _with_factors(given, {expert: 1.01})[rows_M]
        (found,) = _told(given, output_MH)
        assert found.name == f"{'vision ' * vision}expert {expert}"


def test_a_factor_on_everything_is_named_as_the_whole_output() -> None:
    given = problem(parse("deepseek_v3@bf16.tokens128.seed2"))
    (found,) = _told(given, 0.99 * given.stages.output_MH)
    assert found.part == "output"
    assert found.factor == pytest.approx(0.99, abs=0.001)


def _with_factors(given: Problem, loud: dict[int, float]) -> Tensor:
    """The law with some experts' router weights times a factor, float64."""
    stages, weights_MK = given.stages, given.stages.topk_weights_MK.clone()
    for e, factor in loud.items():
        weights_MK[stages.topk_ids_MK == e] *= factor
    choice = Choice(stages.topk_ids_MK, weights_MK, stages.margin_M)
    tokens = given.tokens
    return forward(given.spec, given.exact, tokens.hidden_states, is_vision_M=tokens.is_vision, choice=choice).output_MH


def _told(given: Problem, output_MH: Tensor):
    """What the projection says of an output after one rounding."""
    error_MH = output_MH.to(given.dtype).double() - given.stages.output_MH
    precision = given.spec.routing.precision
    told = project(given, error_MH, ~near_ties(given, precision), ways(given.spec, Grid()), precision)
    assert told is not None
    return told.found


@pytest.mark.parametrize("model", models.names())
def test_no_released_or_refactored_layer_is_accused_by_many_rows(model: str) -> None:
    for dtype in ("bf16", "fp16"):
        for system in map(resolve, ("runner", "transformers")):
            case = Case(model=model, dtype=dtype, tokens=128, seed=5)
            if system.supports(case) is None:
                compared = _compared(case, system)
                assert compared.projected is not None
                assert compared.projected.largest < LIMIT, compared.figures()


@pytest.mark.parametrize(
    "case",
    [
        "deepseek_v3@bf16.tokens128+shared=fused",
        "deepseek_v3@tp4.bf16.tokens128+shared=fused.scale=output",
        "glm4_moe@bf16.tokens200+s=real",
        "deepseek_v3@tp2.ep4.dp2.bf16.tokens200+kernel=deepep_ht",
        "deepseek_v2@tp2.bf16.tokens128+scale=kernel",
        "nemotron_h@tp2.bf16.tokens128+experts=batched.scale=output",
        "qwen3_next@bf16.tokens200+size=wide",
    ],
)
def test_options_of_the_runner_that_round_otherwise_are_not_accused(case: str) -> None:
    compared = _compared(parse(case), resolve("runner"))
    assert compared.projected is not None
    assert compared.projected.largest < LIMIT, compared.figures()


@pytest.mark.parametrize("case", ["deepseek_v3@tokens128", "deepseek_v3@bf16.tokens127"])
def test_fp32_and_few_tokens_are_left_to_the_rows(case: str) -> None:
    compared = _compared(parse(case), resolve("runner"))
    assert compared.projected is None
    assert "projection" not in compared.figures()


def test_where_a_row_is_wrong_nothing_is_projected() -> None:
    case = Case(model="deepseek_v3", dtype="bf16", tokens=128)
    compared = _planted(case, "expert", 1.5, _most_used(case))
    assert compared.wrong
    assert compared.projected is None


def test_a_rank_that_counts_too_much_is_found_on_its_own_tokens() -> None:
    """Ranks of another data-parallel group hold the law's own rows for these."""
    case = parse("deepseek_v3@dp2.bf16.tokens256.seed4")
    given, outputs = problem(case), []
    for rank, rows in enumerate(case.rows):
        output_MH = given.stages.output_MH.clone()
        loud = _with_factors(given, {_most_used(case): 1.01}) if rank == 1 else output_MH
        output_MH[rows] = loud[rows].to(given.dtype).double()
        outputs.append(output_MH)
    compared = compare(given, outputs, ways(case.spec, case.grid), case.spec.routing.precision)
    assert not compared.wrong
    assert compared.projection is not None
    assert compared.projection.found[0].expert == _most_used(case)


def test_figures_say_which_factor_was_found() -> None:
    case = Case(model="deepseek_v3", dtype="bf16", tokens=128, seed=11)
    figures = _planted(case, "expert", 1.01, _most_used(case)).figures()
    assert figures["projection"] > figures["projection_limit"] == LIMIT
    assert figures[f"factor of expert {_most_used(case)}"] == pytest.approx(1.01, abs=0.003)


def test_zero_error_everywhere_is_no_finding() -> None:
    given = problem(Case(model="mixtral", dtype="bf16", tokens=128))
    rows_M = torch.ones(128, dtype=torch.bool)
    nothing_MH = torch.zeros_like(given.stages.output_MH)
    told = project(given, nothing_MH, rows_M, ways(given.spec, Grid()), given.spec.routing.precision)
    assert told is not None
    assert told.found == ()
    assert told.largest == 0.0


# ---- a name where rows are wrong, and none where the factor is not all


def _found(case: Case, **hooks) -> Finding:
    fault = Fault(name="planted", family="-", computes="", references=(), case=str(case), words="", **hooks)
    finding = check(case, FaultyRunner(fault), alone=True)
    assert finding.verdict is Verdict.MISMATCH
    return finding


def _counting(expert: int, factor: float) -> plant.Plant:
    """On grids where every rank has a piece of all experts."""
    return plant.experts(
        lambda inner, right: (
            lambda x, w_NK, ids_NK: right(x, torch.where(ids_NK == expert, w_NK * factor, w_NK), ids_NK)
        )
    )


def _weights(name: str, change: Callable[[Tensor], None], expert: int) -> Callable[..., dict[str, Tensor]]:
    def changed(spec, given, comm):
        stored = given[name].clone()
        change(stored[expert])
        return {**given, name: stored}

    return changed


def _rows(start: float, stop: float, factor: float) -> Callable[[Tensor], None]:
    def change(matrix: Tensor) -> None:
        matrix[int(start * len(matrix)) : int(stop * len(matrix))] *= factor

    return change


@pytest.mark.parametrize(
    ("case", "factor"),
    [
        ("deepseek_v3@fp16.tokens33.seed11", 1.01),
        ("deepseek_v3@fp16.tokens200.seed11", 1.01),
        ("nemotron_h@fp16.tokens33.seed11", 0.97),
        ("deepseek_v3@tp4.bf16.tokens33.seed11", 1.05),
        ("mixtral@tp4.bf16.tokens200.seed11", 0.97),
        ("qwen3_next@tp2.bf16.tokens200.seed11", 1.05),
    ],
)
def test_an_expert_whose_rows_are_wrong_by_a_few_per_cent_is_named_with_its_factor(case: str, factor: float) -> None:
    expert = _most_used(parse(case))
    finding = _found(parse(case), layer=_counting(expert, factor))
    assert finding.diagnosis.startswith(f"expert {expert} counts {factor:.2f}"[:-1]), finding.diagnosis
    assert "without it rounding is left" in finding.diagnosis
    assert (finding.family, finding.stage) == ("F7", "routed")


NOT_A_FACTOR = {
    "gate": ("w13", _rows(0, 0.5, 1.03)),
    "half of the columns": ("w2", _rows(0, 0.5, 1.05)),
    "two columns": ("w2", _rows(0, 0.04, 0.0)),
}


@pytest.mark.parametrize("case", ["mixtral@fp16.tokens200.seed11", "deepseek_v3@tp4.bf16.tokens200.seed11"])
@pytest.mark.parametrize("what", NOT_A_FACTOR)
def test_an_expert_that_is_wrong_in_another_way_than_by_a_factor_is_not_said_to_count_wrongly(
    what: str, case: str
) -> None:
    (name, change), expert = NOT_A_FACTOR[what], _most_used(parse(case))
    finding = _found(parse(case), weights=_weights(name, change, expert))
    assert "counts 1.0" not in finding.diagnosis
    assert "counts 0.9" not in finding.diagnosis
    assert finding.family is None
    assert finding.stage == "routed"


def test_an_expert_that_counts_wrongly_in_every_second_token_is_not_given_one_factor() -> None:
    case = parse("mixtral@tp2.bf16.tokens200.seed11")
    expert = _most_used(case)

    def sometimes(inner, right):
        def apply(x, w_NK, ids_NK):
            factor_N1 = torch.where(torch.arange(len(x)) % 2 == 0, 1.1, 1.0)[:, None]
            return right(x, torch.where(ids_NK == expert, w_NK * factor_N1, w_NK), ids_NK)

        return apply

    finding = _found(case, layer=plant.experts(sometimes))
    assert finding.family is None
    assert "rounding is left" not in finding.diagnosis


# ---- what a projection alone finds: family and stage


@pytest.mark.parametrize(
    ("part", "stage", "family"), [("expert", "routed", "F7"), ("shared", "shared", None), ("routed", "routed", None)]
)
def test_a_part_that_only_many_rows_show_has_its_stage_and_an_expert_its_family(
    part: str, stage: str, family: str | None
) -> None:
    case = parse("deepseek_v3@bf16.tokens200.seed3")
    factor = {"expert": 1.01, "shared": 1.004, "routed": 1.005}[part]
    system, given = _faulty(part, factor, _most_used(case)), problem(case)
    finding = judge(case, system, given, run_system(case, system, given))
    assert finding.verdict is Verdict.MISMATCH
    assert "no token alone is beyond rounding" in finding.diagnosis
    assert (finding.stage, finding.family) == (stage, family)


def test_the_stages_of_the_layer_tell_an_expert_from_its_router_weight() -> None:
    case = parse("deepseek_v3@tp2.bf16.tokens200.seed11")
    expert = _most_used(case)
    weighed = plant.rerouted(lambda w_MK, ids_MK: (torch.where(ids_MK == expert, w_MK * 1.01, w_MK), ids_MK))
    for layer, stage in ((weighed, "topk_weights"), (_counting(expert, 1.01), "routed")):
        finding = _found(case, layer=layer)
        assert "no token alone is beyond rounding" in finding.diagnosis
        assert (finding.stage, finding.family) == (stage, "F7")


@pytest.mark.parametrize(
    ("stage", "layer"),
    [
        ("sum", plant.scaling(lambda S, R, s, plan: (S, R * 1.006))),
        ("output", plant.answering(lambda y, x, layer, comm: y * 0.994)),
    ],
)
def test_the_stages_of_the_layer_tell_a_part_from_what_is_made_of_it(stage: str, layer: plant.Plant) -> None:
    finding = _found(parse("deepseek_v3@tp4.bf16.tokens200.seed11"), layer=layer)
    assert "no token alone is beyond rounding" in finding.diagnosis
    assert (finding.stage, finding.family) == (stage, None)


def test_a_factor_that_is_not_the_whole_story_gives_no_family() -> None:
    case = parse("deepseek_v3@tp4.bf16.tokens200.seed11")
    finding = _found(case, weights=_weights("w2", _rows(0, 0.5, 1.02), _most_used(case)))
    assert "no token alone is beyond rounding" in finding.diagnosis
    assert (finding.stage, finding.family) == ("routed", None)
