"""The yardstick itself: it computes the law, is wrong by rounding alone, and leaves nothing of its own in an output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness import models
from harness.weights import DTYPES, Tokens, make_tokens, make_weights
from reference.moe import Stages, forward
from reference.naive import naive
from reference.rounding import analyse
from reference.routes import undecided_rows
from reference.spec import Experts, MoESpec, RouterPrecision

MODEL = RouterPrecision(logits="model", scores="model", weights="model")
FP32 = RouterPrecision(logits="fp32", scores="fp32", weights="fp32")


def _given(spec: MoESpec, dtype: str, tokens: int) -> tuple[dict[str, Tensor], Tokens, Stages]:
    weights, drawn = make_weights(spec, 1, DTYPES[dtype]), make_tokens(spec, tokens, 2, DTYPES[dtype])
    return weights, drawn, forward(spec, weights, drawn.hidden_states, is_vision_M=drawn.is_vision)


def _error_over_bound(
    spec: MoESpec, dtype: str, tokens: int, tp: int, precision: RouterPrecision, shared_tp: int | None = None
) -> float:
    """The larger run's worst element in units of the certified bound: above 1, oracle or yardstick is wrong."""
    weights, drawn, stages = _given(spec, dtype, tokens)
    given = (spec, weights, drawn.hidden_states, stages, tp, precision, drawn.is_vision)
    keep_M = torch.ones(tokens, dtype=torch.bool)
    if spec.routing.scoring_func == "sparsemixer":  # leave out masks that rounding of the logits may change
        keep_M = ~undecided_rows(spec.routing, stages.logits_ME, None, torch.full_like(stages.logits_ME, 0.05))
    bound_MH, runs = analyse(*given, shared_tp=shared_tp).bound_MH, naive(*given, shared_tp=shared_tp)
    return max(float(((run.double() - stages.output_MH).abs() / bound_MH)[keep_M].amax()) for run in runs)


@pytest.mark.parametrize("model", models.names())
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_runs_follow_the_law_of_every_model_within_the_certified_bound(model: str, dtype: str) -> None:
    spec = models.load(model).twin
    for tp in (1, 8):
        assert _error_over_bound(spec, dtype, 7, tp, FP32 if dtype == "fp32" else MODEL) < 1


WITH_SHARED = [name for name in models.names() if models.load(name).twin.shared is not None]


@pytest.mark.parametrize("model", WITH_SHARED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_experts_cut_otherwise_than_the_routed_ones_follow_the_law(model: str, dtype: str) -> None:
    spec = models.load(model).twin
    for tp, shared_tp in ((8, 1), (8, 2), (4, 2), (1, 4)):
        assert _error_over_bound(spec, dtype, 7, tp, FP32 if dtype == "fp32" else MODEL, shared_tp) < 1


@pytest.mark.parametrize("model", ["deepseek_v3", "nemotron_h"])
def test_a_cut_that_the_shared_experts_share_is_the_default(model: str) -> None:
    spec = models.load(model).twin
    weights, drawn, stages = _given(spec, "bf16", 7)
    given = (spec, weights, drawn.hidden_states, stages, 4, MODEL)
    for named, plain in zip(naive(*given, shared_tp=4), naive(*given), strict=True):
        assert torch.equal(named, plain)
    one, other = (naive(*given, shared_tp=count)[1] for count in (1, 4))
    assert not torch.equal(one, other)  # or the number would not count


def _changed(experts: Experts, change: str) -> Experts:
    return {
        "transposed": replace(experts, transposed=True),
        "interleaved": replace(experts, layout="interleaved"),
        "bias": replace(experts, bias=True),
        "latent": replace(experts, latent_size=32, latent_bias=True, bias=True),
    }[change]


@pytest.mark.parametrize("change", ["transposed", "interleaved", "bias", "latent"])
@pytest.mark.parametrize("model", ["deepseek_v3", "llama4"])
def test_storage_biases_and_latent_widths_change_nothing_but_rounding(model: str, change: str) -> None:
    spec = models.load(model).twin
    changed = replace(spec, experts=_changed(spec.experts, change))
    assert _error_over_bound(changed, "fp32", 7, 4, FP32) < 1


def test_zero_experts_with_s_and_an_average_follow_the_law() -> None:
    spec = models.load("deepseek_v3").twin
    routing = replace(spec.routing, num_experts=12, num_zero_experts=4)
    spec = replace(spec, routing=routing, output=replace(spec.output, combine="average"))
    assert (_given(spec, "fp32", 7)[2].topk_ids_MK >= 12).any()
    for dtype in DTYPES:
        assert _error_over_bound(spec, dtype, 7, 4, FP32) < 1


def test_few_tokens_take_one_expert_a_slot_and_get_the_same_rows() -> None:
    spec = models.load("deepseek_v3").twin
    weights, drawn, stages = _given(spec, "bf16", 33)
    one = forward(spec, weights, drawn.hidden_states[:1])
    whole = naive(spec, weights, drawn.hidden_states, stages, 4, FP32)
    alone = naive(spec, weights, drawn.hidden_states[:1], one, 4, FP32)
    for run, row in zip(whole, alone, strict=True):
        error_H = (run[0].double() - stages.output_MH[0]).norm()
        assert float((row[0].double() - run[0].double()).norm()) <= 2 * float(error_H)


@pytest.mark.parametrize("model", models.names())
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_give_no_rows_in_the_dtype(model: str, dtype: str) -> None:
    spec = models.load(model).twin
    weights, drawn, stages = _given(spec, dtype, 0)
    for run in naive(spec, weights, drawn.hidden_states, stages, 2, FP32, drawn.is_vision):
        assert run.shape == (0, spec.hidden_size)
        assert run.dtype == DTYPES[dtype]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_router_in_the_dtype_makes_a_longer_yardstick(dtype: str) -> None:
    spec = models.load("mixtral").twin
    weights, drawn, stages = _given(spec, dtype, 33)
    errors = []
    for precision in (FP32, MODEL):
        run, _ = naive(spec, weights, drawn.hidden_states, stages, 1, precision)
        errors.append(float((run.double() - stages.output_MH).norm()))
    assert errors[1] > 1.1 * errors[0]


def test_an_expert_that_no_token_chose_cannot_spoil_the_yardstick() -> None:
    spec = models.load("mixtral").twin
    weights, drawn, stages = _given(spec, "fp32", 2)
    unused = next(e for e in range(spec.routing.num_experts) if not (stages.topk_ids_MK == e).any())
    weights["w13"][unused] = torch.nan
    for run in naive(spec, weights, drawn.hidden_states, stages, 2, FP32):
        assert run.isfinite().all()


def test_a_sparsemixer_mask_that_rounding_changes_makes_no_yardstick_longer() -> None:
    spec = models.load("phimoe").twin
    longest = 0.0
    for seed in range(1000, 1010):
        weights, drawn = make_weights(spec, seed, DTYPES["bf16"]), make_tokens(spec, 200, seed, DTYPES["bf16"])
        stages = forward(spec, weights, drawn.hidden_states)
        for run in naive(spec, weights, drawn.hidden_states, stages, 2, MODEL):
            error_M = (run.double() - stages.output_MH).norm(dim=1) / stages.output_MH.norm(dim=1)
            longest = max(longest, float(error_M.amax()))
    assert longest < 0.05  # a changed mask moves a row by a fifth or more
