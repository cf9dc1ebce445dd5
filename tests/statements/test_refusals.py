"""Statement 38: what would silently compute something else is refused at construction: value, expectation, remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness import models
from harness.case import parse_grid
from harness.comm.simulated import run_ranks
from harness.runner.experts import MonolithicExperts
from harness.runner.layer import FusedMoE, LayerSettings
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import physical, replicated, round_robin
from harness.runner.router import make_router
from harness.weights import make_weights
from reference.spec import Activation, MoESpec
from tests.drawn_layers import ZERO_EXPERTS
from tests.statements.layers import ROUTER_SCALES, RUNNER_SCALES

DEEPSEEK, MIXTRAL = models.load("deepseek_v3").twin, models.load("mixtral").twin
NEMOTRON, PHIMOE, LLAMA4 = (models.load(name).twin for name in ("nemotron_h", "phimoe", "llama4"))
GPT_OSS = models.load("gpt_oss").twin


def building(spec: MoESpec, settings: LayerSettings, grid: str = "tp1", **weights: torch.Tensor) -> Callable[[], Any]:
    stored = make_weights(spec, 1, torch.float32) | weights
    return lambda: run_ranks(parse_grid(grid), lambda comm: FusedMoE(spec, settings, stored, comm)).unwrap()


def routing(spec: MoESpec, **changes: object) -> Callable[[], Any]:
    return lambda: replace(spec.routing, **changes)  # type: ignore[arg-type]


def activation(**changes: object) -> Callable[[], Any]:
    fields = {"kind": "silu", "gated": True, "clamp": "none", "limit": None, "alpha": 1.0, "up_offset": 0.0}
    return lambda: Activation(**fields | changes)  # type: ignore[arg-type]


def joined_halves() -> Any:
    def body(comm: Any) -> None:
        settings = replace(ROUTER_SCALES, kernel="deepep_ht")
        layer = FusedMoE(DEEPSEEK, settings, make_weights(DEEPSEEK, 1, torch.float32), comm)
        transport, weights = layer.runner.kernel.prepare_finalize, layer.runner.kernel.experts.weights
        FusedMoEKernel(transport, MonolithicExperts(weights, layer.runner.router, None, False))

    return run_ranks(parse_grid("tp2.ep2"), body).unwrap()


NO_BIAS = replace(ZERO_EXPERTS, routing=replace(ZERO_EXPERTS.routing, correction_bias=False))
NO_S = replace(DEEPSEEK, routing=replace(DEEPSEEK.routing, routed_scaling_factor=0.0))
CUSTOM_GROUPS = replace(GPT_OSS.routing, n_group=2, topk_group=1, top_k=2)
DEFERRED = replace(ROUTER_SCALES, reduce_results=False)
# what is refused -> how it is made, and words of the answer: the value that came, what was expected, what to do
REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, str, str]]] = {
    # num_redundant_experts, enable_eplb, expert_placement_strategy
    "redundant experts without places": (
        building(DEEPSEEK, replace(ROUTER_SCALES, placement=replicated(16, 1, 2)), "tp2"),
        ("ep=1", "a piece of all experts", "Use ep > 1"),
    ),
    "balanced slots that ranks do not share evenly": (
        building(DEEPSEEK, replace(ROUTER_SCALES, placement=replicated(16, 4, 2)), "tp4.ep4"),
        ("18 physical slots (2 of them redundant) on ep=4", "every rank has as many", "Use 2 more"),
    ),
    "a placement for other experts": (
        building(DEEPSEEK, replace(ROUTER_SCALES, placement=round_robin(8, 4)), "tp4.ep4"),
        ("placement of 8 experts on 4 ranks", "expected", "16 experts on ep=4"),
    ),
    "an expert without a slot": (lambda: physical([0, 1, 1], 3, 1), ("no slot for expert 2", "3 experts", "needs one")),
    "balanced experts in a kernel that routes": (
        building(DEEPSEEK, replace(ROUTER_SCALES, experts="monolithic", placement=replicated(16, 2, 2)), "tp2.ep2"),
        ("experts=monolithic", "load balancing cannot", "Use modular experts"),
    ),
    # top_k
    "more picks than experts": (routing(MIXTRAL, top_k=99), ("top_k=99", "expected 1 to 8", "number of experts")),
    "no pick": (routing(MIXTRAL, top_k=0), ("top_k=0", "expected 1 to 8", "number of experts")),
    "sparsemixer with three picks": (routing(PHIMOE, top_k=3), ("top_k=3", "exactly 2", "sparsemixer")),
    "two weights on one input": (routing(LLAMA4, top_k=2), ("top_k=2", "needs top_k=1", "two weights")),
    # intermediate_size
    "a width that moe.tp does not divide": (
        building(DEEPSEEK, ROUTER_SCALES, "tp5"),
        ("tp=5", "does not divide intermediate_size=48", "choose a tp that does"),
    ),
    "a width that dp ranks do not divide": (
        building(MIXTRAL, ROUTER_SCALES, "dp5"),
        ("moe.tp=5", "does not divide intermediate_size", "choose a moe.tp that does"),
    ),
    # use_grouped_topk, custom_routing_function
    "groups of unequal size": (routing(DEEPSEEK, n_group=3), ("n_group=3", "does not divide", "num_experts=16")),
    "more groups than there are": (routing(DEEPSEEK, topk_group=9), ("topk_group=9", "expected 1 to", "n_group=4")),
    "groups with a custom function": (
        lambda: make_router(CUSTOM_GROUPS, None, None, 1.0),
        ("n_group=2", "custom routing function", "no place for it"),
    ),
    "a bias that a custom function would drop": (
        lambda: make_router(GPT_OSS.routing, torch.zeros(GPT_OSS.routing.num_experts), None, 1.0),
        ("custom routing function", "correction bias", "would drop"),
    ),
    # scoring_func, activation
    "an unknown score": (routing(MIXTRAL, scoring_func="tanh"), ("'tanh'", "expected one of", "sigmoid")),
    "an unknown activation": (activation(kind="mish"), ("'mish'", "expected one of", "gelu_tanh")),
    "an ungated activation with a clamp": (
        activation(gated=False, clamp="before", limit=7.0),
        ("without a gate", "neither clamp", "up_offset"),
    ),
    "a clamp without its limit": (activation(clamp="before"), ("limit=None", "needs a limit", "no clamp needs None")),
    # e_score_correction_bias
    "a bias in half precision": (
        building(DEEPSEEK, ROUTER_SCALES, e_score_correction_bias=torch.zeros(16, dtype=torch.bfloat16)),
        ("torch.bfloat16", "expected float32", "would change the choice"),
    ),
    # routed_scaling_factor, apply_routed_scale_to_output
    "a factor of 0": (building(NO_S, RUNNER_SCALES), ("routed_scaling_factor=0", "would vanish", "Pass None")),
    "two that scale": (
        building(DEEPSEEK, replace(RUNNER_SCALES, kernel_scales=True)),
        ("kernel_scales", "s would be applied twice", "Choose one"),
    ),
    # is_sequence_parallel
    "rows split over one rank": (
        building(DEEPSEEK, replace(ROUTER_SCALES, sequence_parallel=True), "dp2"),
        ("tp=1", "no ranks to split the rows over", "Leave it False"),
    ),
    "rows split without whole experts": (
        building(DEEPSEEK, replace(ROUTER_SCALES, sequence_parallel=True), "tp4.ep2"),
        ("ep=2", "need whole experts", "Use ep=4"),
    ),
    # zero_expert_type
    "zero experts without a bias": (
        building(NO_BIAS, ROUTER_SCALES),
        ("zero experts need an e_score_correction_bias", "their router", "the biased one"),
    ),
    "zero experts and the flag": (
        building(ZERO_EXPERTS, RUNNER_SCALES),
        ("4 zero experts", "R would be scaled and Z not", "apply_routed_scale_to_output=False"),
    ),
    "zero experts and a kernel that scales": (
        building(ZERO_EXPERTS, replace(ROUTER_SCALES, kernel_scales=True)),
        ("4 zero experts", "never sees Z", "Let the router scale"),
    ),
    "zero experts in a kernel that routes": (
        building(ZERO_EXPERTS, replace(ROUTER_SCALES, experts="monolithic")),
        ("experts=monolithic with zero experts", "never sees Z", "Use modular experts"),
    ),
    # n_shared_experts
    "no shared experts to fuse": (
        building(MIXTRAL, replace(ROUTER_SCALES, fuse_shared_experts=True)),
        ("fuse_shared_experts", "there are no shared experts", "Leave it False"),
    ),
    "fused shared experts on ranks with whole experts": (
        building(DEEPSEEK, replace(ROUTER_SCALES, fuse_shared_experts=True), "tp2.ep2"),
        ("ep=2", "a copy of them", "Leave it False"),
    ),
    # reduce_results
    "a partial of what the kernel reduced": (
        building(DEEPSEEK, replace(DEFERRED, kernel="reduced"), "tp2"),
        ("reduce_results=False", "the kernel reduces", "Leave it True"),
    ),
    "a partial before an ordered transform": (
        building(NEMOTRON, DEFERRED, "tp2"),
        ("reduce_results=False", "needs the complete sum", "Leave it True"),
    ),
    "a partial under sequence parallelism": (
        building(DEEPSEEK, replace(DEFERRED, sequence_parallel=True), "tp2.ep2"),
        ("reduce_results=False", "rows are complete", "Leave it True"),
    ),
    "a partial with zero experts": (
        building(ZERO_EXPERTS, DEFERRED, "tp2"),
        ("reduce_results=False", "would add it tp times", "Leave it True"),
    ),
    # all2all_backend
    "all-to-all without whole experts": (
        building(DEEPSEEK, replace(ROUTER_SCALES, kernel="deepep_ht"), "tp4.ep2"),
        ("kernel=deepep_ht with ep=2", "whole experts on other ranks", "Use ep = tp * dp = 4"),
    ),
    "low latency without batches": (
        building(DEEPSEEK, replace(ROUTER_SCALES, kernel="deepep_ll", experts="slots"), "tp2.ep2"),
        ("experts=slots", "rows sorted by expert", "Use experts=batched"),
    ),
    "rows where batches are taken": (
        building(DEEPSEEK, replace(ROUTER_SCALES, kernel="nvlink_one_sided", experts="batched"), "tp2.ep2"),
        ("experts=batched", "it hands over rows", "Use experts=auto or slots"),
    ),
    "a monolithic half and a modular one": (joined_halves, ("DeepEPHTPrepareAndFinalize", "both modular", "Choose")),
    "an order of no shared experts": (
        building(MIXTRAL, replace(ROUTER_SCALES, shared_order="3")),
        ("shared_order=3", "without shared experts", "nothing to order"),
    ),
    "shared experts in a finalize that is none": (
        building(DEEPSEEK, replace(ROUTER_SCALES, shared_order="2", experts="monolithic")),
        ("shared_order=2", "no finalize to run them in", "Use 1 or 3"),
    ),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=list(REFUSED))
def test_38_a_combination_that_would_compute_something_else_is_refused_when_it_is_built(make, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are held against the table
        make()
    text = str(caught.value)
    places = [text.find(word) for word in words]
    assert min(places) >= 0, text
    assert not re.search(r"\n\s*\n", text)


def test_38_what_is_nearest_to_each_refused_layer_can_be_built():
    for spec in (DEEPSEEK, MIXTRAL, NEMOTRON, GPT_OSS, LLAMA4, PHIMOE):
        building(spec, ROUTER_SCALES, "tp2.ep2")()
        building(spec, RUNNER_SCALES, "tp2")()
    building(ZERO_EXPERTS, ROUTER_SCALES, "tp2.ep2")()
    building(DEEPSEEK, replace(ROUTER_SCALES, kernel="deepep_ht", experts="slots"), "tp4.ep4")()
    building(DEEPSEEK, replace(ROUTER_SCALES, placement=replicated(16, 4, 4)), "tp4.ep4")()
    building(DEEPSEEK, DEFERRED, "tp2")()
    building(DEEPSEEK, replace(ROUTER_SCALES, fuse_shared_experts=True), "tp2")()
