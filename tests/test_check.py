"""What the instruments say together: which of them decides, and whose name is believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import check as story
from harness.case import parse
from harness.check import check
from harness.faults.bank import by_name
from harness.faults.fault import Fault, FaultyRunner
from harness.finding import Finding, Verdict
from harness.problem import problem
from harness.systems import resolve
from tests.bite import state_faults

STATE = Path(state_faults.__file__)


def expert_times(factor: float, expert: int = 3) -> FaultyRunner:
    def changed(spec, weights, comm):
        w2 = weights["w2"].clone()
        w2[expert] = (w2[expert].float() * factor).to(w2.dtype)
        return {**weights, "w2": w2}

    return FaultyRunner(Fault(name="", family="", computes="", references=(), case="", words="", weights=changed))


def test_many_rows_of_bf16_name_an_expert_that_counts_one_per_cent_too_often():
    finding = check(parse("deepseek_v3@bf16.tokens200"), expert_times(1.0078125 + 2.0**-7), alone=True)
    assert finding.verdict is Verdict.MISMATCH
    assert "expert 3 counts 1.01" in finding.diagnosis


def test_a_wrong_coefficient_is_a_mismatch_where_the_rows_cannot_decide(monkeypatch: pytest.MonkeyPatch):
    case = parse("mixtral")

    def undecided(*given: object) -> Finding:
        return Finding(case="mixtral", model="mixtral", system="runner", verdict=Verdict.UNDECIDED)

    monkeypatch.setattr(story, "judge", undecided)
    assert check(case, resolve("runner")).verdict is Verdict.UNDECIDED
    assert check(case, expert_times(2.0)).verdict is Verdict.MISMATCH


def test_a_law_that_is_not_finite_judges_nobody(monkeypatch: pytest.MonkeyPatch):
    given = problem(parse("mixtral"))
    nothing = replace(given, stages=replace(given.stages, output_MH=torch.full_like(given.stages.output_MH, torch.nan)))
    monkeypatch.setattr(story, "problem", lambda case: nothing)
    finding = check(parse("mixtral"), resolve("runner"), alone=True)
    assert finding.verdict is Verdict.COULD_NOT_RUN
    assert "the law itself is not finite" in finding.diagnosis


def test_a_build_that_writes_into_its_weights_spoils_no_other_case():
    case = parse(state_faults.FAULTS["folds_into_the_given"].case)
    before = {name: tensor.clone() for name, tensor in problem(case).weights.items()}
    check(case, resolve(f"{STATE}:folds_into_the_given"))
    assert all(torch.equal(before[name], tensor) for name, tensor in problem(case).weights.items())


def test_many_calls_find_what_one_call_cannot_and_the_repro_names_them():
    system = resolve(f"{STATE}:output_by_count")
    assert check(parse("mixtral"), system).verdict is Verdict.OK
    finding = check(parse("mixtral+calls=many"), system)
    assert (finding.verdict, finding.stage) == (Verdict.MISMATCH, "calls")
    assert "had returned" in finding.diagnosis
    assert "mixtral+calls=many" in finding.repro


def test_of_a_layer_that_gets_one_call_wrong_no_more_is_said():
    wrong = check(parse("mixtral@tp2+calls=many"), FaultyRunner(by_name()["nothing_reduced"]))
    assert (wrong.verdict, wrong.family) == (Verdict.MISMATCH, "B1")
    assert wrong.case == "mixtral@tp2+calls=many"


# Once told by another family's name: by the probe of other tokens, by a rank that serves nobody, by tokens that are alike.
ONCE_MISNAMED = (
    ("experts_overwrite_what_the_shared_read", "deepseek_v3@tp4.ep4+order=3"),
    ("kernel_overwrites_what_the_shared_read", "kimi_linear@tp2.bf16+order=3"),
    ("experts_add_to_what_the_shared_read", "glm4_moe@tp2.bf16+order=3"),
    ("nothing_reduced", "deepseek_v2@tp4.ep4"),
    ("kernel_wrongly_says_reduced", "llama4@tp4.ep4"),
    ("scattered_over_dp_without_a_sum", "deepseek_v2@ep4.dp4.tokens32"),
    ("scattered_over_dp_without_a_sum", "llama4@tp2.ep4.dp2.tokens5_2"),
    ("bias_taken_off_again", "glm4_moe_lite@tp2.bf16.tokens33"),
)


@pytest.mark.parametrize(("name", "case"), ONCE_MISNAMED)
def test_a_fault_that_was_once_misnamed_is_named_or_nameless(name: str, case: str):
    fault = by_name()[name]
    finding = check(parse(case), FaultyRunner(fault))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.family in (None, fault.family, *fault.also), finding.diagnosis
