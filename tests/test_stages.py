"""A mismatch is placed at the first stage that is wrong, in our runner and in modules of transformers alike."""

from __future__ import annotations

import pytest
import torch

from harness import models
from harness.case import parse
from harness.check import check
from harness.execution import run_system
from harness.finding import Verdict
from harness.problem import problem, ways
from harness.stages import first_wrong
from harness.systems import resolve
from harness.systems.hf import TransformersSystem


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_no_stage_of_a_right_layer_is_called_wrong(dtype: str):
    reached = 0
    for model in models.names():
        for name in ("runner", "transformers"):
            case, system = parse(f"{model}@{dtype}.tokens33"), resolve(name)
            if system.supports(case) is not None:
                continue
            given, precision = problem(case), system.precision(case.spec)
            told = run_system(case, system, given).ranks[0].layer.stages()
            naive_M = given.naive_error(ways(case.spec, case.grid), precision)
            assert first_wrong(given, told, precision, naive_M) in (None, "sum"), f"{name} {case}: {sorted(told)}"
            reached += name == "transformers" and {"topk_ids", "topk_weights", "routed"} <= told.keys()
    assert reached >= 20


class Changed(TransformersSystem):
    """transformers' deepseek_v3 with a method of one submodule replaced."""

    def __init__(self, path: str, change) -> None:
        self.path, self.change = path, change

    def build(self, case, weights, comm):
        layer = super().build(case, weights, comm)
        module = layer.module.get_submodule(self.path) if self.path else layer.module
        right, change = module.forward, self.change
        module.forward = lambda *given, **named: change(right(*given, **named))
        return layer


CHANGES = {
    "topk_weights": ("experts", None),
    "routed": ("experts", lambda y: y.flip(-1)),
    "shared": ("shared_experts", lambda y: 2 * y),
    "sum": ("", lambda y: 1.5 * y),
}


@pytest.mark.parametrize("stage", [stage for stage, (_, change) in CHANGES.items() if change])
def test_a_change_of_one_submodule_of_transformers_is_placed_there(stage: str):
    path, change = CHANGES[stage]
    finding = check(parse("deepseek_v3@tokens33"), Changed(path, change))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.stage == stage, f"{finding.stage}: {finding.diagnosis}"


def test_wrong_weights_wrong_experts_and_wrong_logits_come_before_what_follows_from_them():
    case, system = parse("deepseek_v3@tokens33"), resolve("runner")
    given, precision = problem(case), system.precision(case.spec)
    told = run_system(case, system, given).ranks[0].layer.stages()
    wrong = {
        "logits": {**told, "logits": told["logits"] + 0.01},
        "topk_ids": {**told, "topk_ids": (told["topk_ids"] + 1) % case.spec.routing.num_experts},
        "topk_weights": {**told, "topk_weights": told["topk_weights"] * 1.01},
    }
    for stage, changed in wrong.items():
        assert first_wrong(given, changed, precision, None) == stage
    unsorted = {**told, "topk_ids": told["topk_ids"].flip(1), "topk_weights": told["topk_weights"].flip(1)}
    assert first_wrong(given, unsorted, precision, None) is None
    assert first_wrong(given, {"logits": torch.zeros(1, 1)}, precision, None) is None
