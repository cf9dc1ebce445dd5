"""The decodable probe reads right layers as right, exactly, and says of wrong ones who was counted how often."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness import models
from harness.case import Case, Grid, parse
from harness.check import check
from harness.errors import UsageError
from harness.faults.fault import Fault, FaultyRunner
from harness.finding import Verdict
from harness.labels.plan import visits
from harness.labels.tensors import fold
from harness.probe import labelled_case, probe
from harness.problem import problem
from harness.systems import resolve

RUNNER = resolve("runner")
GRIDS = ("tp1", "tp3", "tp4", "tp4.ep2", "tp2.ep4.dp2", "tp4.ep4.sp4")


def labelled(text: str) -> Case:
    return labelled_case(parse(text))


def wrong(text: str, **hooks: object) -> str:
    """What the probe says of a runner with that fault, which has to be wrong."""
    fault = Fault(name="", family="", computes="", references=(), case=text, words="", **hooks)  # type: ignore[arg-type]
    found = probe(labelled(text), FaultyRunner(fault))
    assert found.verdict == "wrong", found
    return f"{found.sentence} [{found.family}]"


@pytest.mark.parametrize("model", models.names())
def test_every_coefficient_of_the_runner_is_read_and_right(model: str):
    for grid in GRIDS:
        for dtype in ("fp32", "bf16", "fp16"):
            found = probe(labelled(f"{model}@{grid}.{dtype}"), RUNNER)
            assert found.verdict in ("exact", "rounded"), f"{grid} {dtype}: {found.sentence}"
            assert not found.not_exercised
            # tokens with equal weights are exact, but for thirds, an epsilon, or a clamped gate that is not 7 exactly
            spec = models.load(model).twin
            exact = spec.routing.top_k in (1, 2, 4, 8) and spec.routing.renormalize_epsilon < 1e-9
            if exact and spec.experts.activation.limit is None:
                assert found.exact >= 0.3 * found.coefficients, f"{grid} {dtype}: {found.sentence}"


@pytest.mark.parametrize("model", ["deepseek_v3", "mixtral", "gpt_oss", "qwen3_next", "nemotron_h"])
def test_transformers_own_modules_pass_in_every_dtype(model: str):
    for dtype in ("fp32", "bf16", "fp16"):
        found = probe(labelled(f"{model}@{dtype}"), resolve("transformers"))
        assert found.verdict in ("exact", "rounded"), found
        assert found.worst <= 4.0


@pytest.mark.parametrize("model", models.names())
def test_the_planned_tokens_reach_every_expert_with_equal_and_with_distinct_weights(model: str):
    given = problem(labelled(f"{model}@tp2"))
    assert given.labels is not None
    columns = [range(block.first, block.stop) for block in given.labels.blocks if not block.copied]
    reached_H = (given.stages.output_MH != 0).any(0)
    assert all(bool(reached_H[list(own)].all()) for own in columns)
    kinds = {visit.kind for visit in visits(models.load(model).twin.routing)}
    assert {"equal", "distinct"} <= kinds


def test_whose_copy_of_a_bias_is_added_is_free_but_not_how_often():
    given = problem(labelled("gpt_oss@tp4"))
    block = given.labels.block("b2")
    y_MH = torch.zeros(1, given.spec.hidden_size)
    y_MH[0, block.first + 2] = 1.0
    assert fold(given.labels, y_MH)[0, block.first] == 1.0
    y_MH[0, block.first : block.first + 4] = 1.0
    assert fold(given.labels, y_MH)[0, block.first] == 4.0
    assert given.weights_of(2)["b2"][0, block.first + 2] == given.weights["b2"][0, block.first] == 1.0


def routing(**changes):
    return {"spec": lambda spec: replace(spec, routing=replace(spec.routing, **changes))}


def experts(**changes):
    return {"spec": lambda spec: replace(spec, experts=replace(spec.experts, **changes))}


def weights(change):
    def changed(spec, stored, comm):
        made = {name: tensor.clone() for name, tensor in stored.items()}
        change(made, comm)
        return made

    return {"weights": changed}


def answer(change):
    def planted(layer, comm):
        right = layer.runner.forward
        layer.runner.forward = lambda *given: change(right(*given), given[0], comm)

    return {"layer": planted}


def zeroed(name: str):
    return weights(lambda made, comm: made[name].zero_())


def _swap_experts(made, comm):
    made["w2"][[0, 1]] = made["w2"][[1, 0]]


def _lost_on_rank_1(made, comm):
    if comm.rank == 1:
        made["w2"][3].zero_()


def _lost_last_row(made, comm):
    made["w2"][:, :, -1] = 0.0


def _expert_0_for_1(made, comm):
    made["w2"][1] = made["w2"][0]


def _wrong_shard(made, comm):
    if comm.rank == 2:
        made["w13"].copy_(made["w13"].roll(2, 1))


WRONG = {
    "scale never": ("deepseek_v3@tp4", routing(routed_scaling_factor=None), "y = R + S instead of s*R + S", "A2"),
    "scale squared": ("deepseek_v3@tp4", routing(routed_scaling_factor=2.4375**2), "y = s^2*R + S", "A1"),
    "all reduced twice": ("mixtral@tp4", answer(lambda y, x, comm: comm.all_reduce(y)), "y = tp*R instead of R", "B2"),
    "halved on rank 0": ("mixtral@tp4", answer(lambda y, x, comm: y / 2 if comm.rank == 0 else y), "on rank 0", None),
    "an expert lost on one rank": ("mixtral@tp4", weights(_lost_on_rank_1), "R of expert 3, the share of rank 1, counts 0 instead of 1", None),
    "a piece of a share lost": ("mixtral@tp4", weights(_lost_last_row), "intermediate row 7 of 8 (the share of rank 3), counts 0", None),
    "another expert's output": ("mixtral@tp1", weights(_expert_0_for_1), "R of expert 1 counts 0 instead of 1 in", None),
    "two experts' w2 exchanged": ("mixtral@tp1", weights(_swap_experts), "R of expert 0 counts 2 instead of 1 in tokens 0", None),
    "another rank's w13": ("mixtral@tp4", weights(_wrong_shard), "counts", None),
    "gate and up exchanged": ("mixtral@tp1", weights(lambda m, c: m["w13"].copy_(m["w13"].roll(2, 1))), "counts", None),
    "interleaved read as halves": ("gpt_oss@tp1", experts(layout="halved"), "R of experts", None),
    "clamp lost": ("gpt_oss@tp2", experts(activation=replace(models.load("gpt_oss").twin.experts.activation, clamp="none", limit=None)), "counts", None),
    "router bias lost": ("gpt_oss@tp1", zeroed("router_bias"), "R of experts", None),
    "first bias lost": ("gpt_oss@tp1", zeroed("b13"), "R of experts", None),
    "second bias lost": ("gpt_oss@tp2", zeroed("b2"), "the second expert bias is dropped", "F5"),
    "latent output bias lost": ("nemotron_h@tp2", zeroed("fc2_latent_bias"), "the bias of the latent output projection is dropped", "F5"),
    "latent input bias lost": ("nemotron_h@tp1", zeroed("fc1_latent_bias"), "y = ", None),
    "correction bias dropped": ("deepseek_v3@tp1", zeroed("e_score_correction_bias"), "R of experts", None),
    "not renormalised": ("deepseek_v3@tp1", routing(renormalize=False), "y = ", None),
    "per-expert factors lost": ("gemma4@tp1", weights(lambda m, c: m["per_expert_scale"].fill_(1.0)), "counts", None),
    "shared gate lost": ("qwen3_next@tp1", {"spec": lambda spec: replace(spec, shared=replace(spec.shared, sigmoid_gate=False))}, "S counts 2 instead of 1", None),
    "residual added": ("mixtral@tp2", answer(lambda y, x, comm: y + x), "columns that no expert writes are not 0", None),
    "rows exchanged": ("mixtral@tp1", answer(lambda y, x, comm: y.roll(1, 0)), "comes in", None),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layer_is_read_as_what_it_is(name: str):
    case, hooks, words, family = WRONG[name]
    if words == "y = ":  # a factor that no symbol has: by source
        words = "counts"
    told = wrong(case, **hooks)
    assert words in told, told
    if family is not None:
        assert told.endswith(f"[{family}]"), told


def test_a_check_of_tokens_that_miss_the_fault_still_finds_it_by_the_probe():
    lost = Fault(name="", family="", computes="", references=(), case="", words="", **weights(_lost_on_rank_1))  # type: ignore[arg-type]
    quiet = [check(parse(f"mixtral@tp4.tokens1.seed{seed}"), FaultyRunner(lost)) for seed in range(3)]
    assert {finding.verdict for finding in quiet} == {Verdict.MISMATCH}
    shown = [
        finding
        for finding in quiet
        if "labelled probe: moe-harness check 'mixtral@tp4+size=labels'" in finding.diagnosis
    ]
    assert shown, [finding.diagnosis for finding in quiet]


def test_a_labelled_case_is_a_case_like_any_other():
    case = parse("mixtral@tp4.bf16.tokens99.seed3+size=labels")
    assert str(case) == "mixtral@tp4.bf16+size=labels"
    finding = check(case, RUNNER)
    assert finding.verdict is Verdict.OK
    assert "coefficients" in str(finding.figures["told"])
    with pytest.raises(UsageError, match="Leave one out"):
        replace(case, quant="int8")


def test_every_rank_count_has_as_many_pieces_as_ranks():
    for ranks in (1, 2, 3, 4, 8):
        spec = labelled_case(Case(model="deepseek_v3", grid=Grid(tp=ranks))).spec
        assert spec.experts.intermediate_size % ranks == 0
