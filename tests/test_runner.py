"""What the refactored runner must do beyond its decisions: widths, orders, hazards, routers, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness import models
from harness.case import Grid
from harness.comm import Communicator
from harness.comm.simulated import run_ranks
from harness.runner.experts import TorchExperts, shard
from harness.runner.layer import FusedMoE, LayerSettings
from harness.runner.modular_kernel import finish
from harness.runner.plan import SharedExpertsOrder
from harness.runner.router import FusedTopKBiasRouter, FusedTopKRouter, GroupedTopKRouter, make_router
from harness.runner.shared_experts import SharedExperts
from harness.weights import make_tokens, make_weights
from reference.moe import forward
from reference.spec import MoESpec

DEEPSEEK = models.load("deepseek_v3").twin
NEMOTRON = models.load("nemotron_h").twin
MIXTRAL = models.load("mixtral").twin
GPT_OSS = models.load("gpt_oss").twin
ROUTER_SCALES = LayerSettings(apply_routed_scale_to_output=False)
RUNNER_SCALES = LayerSettings(apply_routed_scale_to_output=True)
LONGCAT = replace(
    DEEPSEEK,
    shared=None,
    routing=replace(
        DEEPSEEK.routing, num_zero_experts=4, n_group=1, topk_group=1, scoring_func="softmax", renormalize=False, top_k=6
    ),
)  # fmt: skip


def on_ranks(
    spec: MoESpec,
    settings: LayerSettings,
    tp: int,
    *,
    tokens: int = 9,
    dtype: torch.dtype = torch.float32,
    use: Callable[[FusedMoE, Tensor, Communicator], Tensor] = lambda layer, x, comm: layer(x),
) -> list[Tensor]:
    """What each rank returns, in units of y, float64; the layer is built anew and handed to `use`."""
    weights, x = make_weights(spec, 1, dtype), make_tokens(spec, tokens, 1, dtype).hidden_states

    def body(comm: Communicator) -> Tensor:
        layer = FusedMoE(spec, settings, weights, comm)
        return use(layer, x.clone(), comm).double() / layer.output_unit

    with torch.inference_mode():
        return list(run_ranks(Grid(tp=tp), body).unwrap())


def oracle(spec: MoESpec, tokens: int = 9, dtype: torch.dtype = torch.float32):
    return forward(spec, make_weights(spec, 1, dtype), make_tokens(spec, tokens, 1, dtype).hidden_states)


def agrees(got: Tensor, expected: Tensor, limit: float = 2e-6) -> bool:
    return bool(((got - expected).norm(dim=-1) <= limit * expected.norm(dim=-1)).all())


# ------------------------------------------------------------------------------------------------ the call


def test_a_kernel_swapped_between_two_calls_changes_the_collectives():
    counts = []

    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        before = comm.tp.calls
        layer(x)
        first = comm.tp.calls - before
        layer.swap_kernel("reduced")
        y = layer(x)
        counts.append((first, comm.tp.calls - before - first))
        return y

    outputs = on_ranks(DEEPSEEK, RUNNER_SCALES, 2, use=use)
    assert all(agrees(y, oracle(DEEPSEEK).output_MH) for y in outputs)
    assert counts == [(1, 2), (1, 2)]  # R + S at the end; then R in the kernel and S alone


def test_experts_put_in_between_two_calls_compute_the_next_one():
    loud = dict(make_weights(DEEPSEEK, 1, torch.float32))
    loud["w2"] = loud["w2"] * 2
    stages = oracle(DEEPSEEK)

    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        layer(x)
        layer.runner.kernel.experts = TorchExperts(shard(loud, DEEPSEEK.experts, comm.tp.rank, comm.tp.size, pad=0))
        return layer(x)

    for y in on_ranks(DEEPSEEK, RUNNER_SCALES, 2, use=use):
        assert agrees(y, stages.output_MH + DEEPSEEK.scale * stages.routed_MH)


def test_a_second_call_with_fewer_tokens_sees_nothing_of_the_first():
    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        layer(x)
        return layer(x[:3])

    for y in on_ranks(DEEPSEEK, RUNNER_SCALES, 2, use=use):
        assert agrees(y, oracle(DEEPSEEK).output_MH[:3])


@pytest.mark.parametrize(
    "spec", [DEEPSEEK, NEMOTRON, MIXTRAL, GPT_OSS, LONGCAT], ids=["s+S", "latent", "plain", "biases", "zero"]
)
@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("tp", [1, 4])
def test_the_result_has_width_h_whatever_the_kernel_s_width(spec, padding, tp):
    settings = replace(ROUTER_SCALES, padding=padding)
    for y in on_ranks(spec, settings, tp):
        assert y.shape == (9, spec.hidden_size)
        assert agrees(y, oracle(spec).output_MH)


def test_junk_that_the_kernel_leaves_in_padded_columns_does_not_leak():
    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        experts, width = layer.runner.kernel.experts, x.shape[1]
        right = experts.apply

        def with_junk(*given: object) -> Tensor:
            y = right(*given)
            y[:, width:] = torch.nan
            return y

        experts.apply = with_junk
        return layer(x)

    for y in on_ranks(DEEPSEEK, replace(RUNNER_SCALES, padding=8), 2, use=use):
        assert agrees(y, oracle(DEEPSEEK).output_MH)


@pytest.mark.parametrize("experts", ["auto", "slots", "batched"])
def test_id_minus_one_contributes_nothing_even_next_to_nan_rows(experts):
    weights = make_weights(MIXTRAL, 1, torch.float32)

    def body(comm: Communicator) -> Tensor:
        kernel = FusedMoE(MIXTRAL, replace(ROUTER_SCALES, experts=experts), weights, comm).runner.kernel
        x = torch.ones(3, MIXTRAL.hidden_size)
        x[1] = torch.nan
        ids = torch.tensor([[0, 1], [-1, -1], [2, -1]])
        return finish(kernel.steps(x, torch.full((3, 2), 0.5), ids))

    (y,) = run_ranks(Grid(), body).unwrap()
    assert y[[0, 2]].isfinite().all()
    assert (y[1] == 0).all()


@pytest.mark.parametrize("order", ["1", "2", "3"])
def test_shared_experts_run_once_a_call_on_the_untransformed_input(order):
    seen: list[Tensor] = []

    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        shared = layer.runner.shared_experts
        right = shared._module
        shared._module = lambda rows: (seen.append(rows.clone()), right(rows))[1]
        return layer(x)

    settings = replace(ROUTER_SCALES, shared_order=order, padding=8)
    on_ranks(NEMOTRON, settings, 2, use=use)
    assert len(seen) == 2  # once on each rank
    given = make_tokens(NEMOTRON, 9, 1, torch.float32).hidden_states
    assert all(torch.equal(rows, given) for rows in seen)


@pytest.mark.parametrize("order", ["1", "2", "3"])
def test_a_kernel_that_overwrites_its_input_cannot_change_s(order):
    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        experts = layer.runner.kernel.experts
        right = experts.apply

        def in_place(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
            return x_NP.copy_(right(x_NP, weights_NK, local_NK))

        experts.apply, experts.writes_input = in_place, True
        before = x.clone()
        y = layer(x)
        assert torch.equal(x, before)
        return y

    settings = replace(ROUTER_SCALES, shared_order=order)
    for y in on_ranks(DEEPSEEK, settings, 2, use=use):
        assert agrees(y, oracle(DEEPSEEK).output_MH)


def test_shared_experts_that_reduce_themselves_are_detected():
    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        right = layer.runner.shared_experts._module
        layer.runner.shared_experts._module = lambda rows: comm.all_reduce(right(rows))
        return layer(x)

    with pytest.raises(RuntimeError, match="reduce their own output"):
        on_ranks(DEEPSEEK, RUNNER_SCALES, 2, use=use)


def test_an_output_of_the_shared_experts_is_read_once():
    now = SharedExpertsOrder.NO_OVERLAP

    def body(comm: Communicator) -> None:
        shared = SharedExperts(lambda x: x, comm)
        with pytest.raises(RuntimeError, match="read before they ran"):
            shared.take()
        shared.run(now, now, torch.ones(1, 1))
        with pytest.raises(RuntimeError, match="waits to be read"):
            shared.run(now, now, torch.ones(1, 1))
        shared.take()
        with pytest.raises(RuntimeError, match="read before they ran"):
            shared.take()

    run_ranks(Grid(), body).unwrap()


def test_each_micro_batch_has_its_own_place_for_s():
    now = SharedExpertsOrder.NO_OVERLAP

    def body(comm: Communicator) -> None:
        shared = SharedExperts(lambda x: x, comm)
        for micro_batch in (0, 1):
            shared.run(now, now, torch.full((1, 1), float(micro_batch)), micro_batch)
        with pytest.raises(RuntimeError, match="waits to be read"):
            shared.run(now, now, torch.ones(1, 1), 1)
        assert [shared.take(micro_batch).item() for micro_batch in (1, 0)] == [1.0, 0.0]
        with pytest.raises(RuntimeError, match="read before they ran"):
            shared.take(1)

    run_ranks(Grid(), body).unwrap()


def test_deferring_the_reduction_returns_a_true_partial():
    settings = replace(RUNNER_SCALES, reduce_results=False)
    partials = on_ranks(DEEPSEEK, settings, 4)
    assert agrees(torch.stack(partials).sum(0), oracle(DEEPSEEK).output_MH)
    assert not agrees(partials[0], oracle(DEEPSEEK).output_MH, 0.1)


# ------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_biased_latent_projection_adds_its_bias_once_and_unscaled(flag, tp):
    settings = replace(ROUTER_SCALES, apply_routed_scale_to_output=flag)
    for y in on_ranks(NEMOTRON, settings, tp):
        assert agrees(y, oracle(NEMOTRON).output_MH)


def test_fp16_keeps_the_latent_bias_in_the_declared_unit():
    for y in on_ranks(NEMOTRON, RUNNER_SCALES, 2, dtype=torch.float16):
        assert agrees(y, oracle(NEMOTRON, dtype=torch.float16).output_MH, 5e-3)


def test_zero_experts_are_added_once_and_carry_s():
    stages = oracle(LONGCAT)
    assert stages.zero_MH.abs().sum() > 0
    for tp in (1, 2, 4):
        for y in on_ranks(LONGCAT, ROUTER_SCALES, tp):
            assert agrees(y, stages.output_MH)


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("spec", [GPT_OSS, MIXTRAL], ids=["interleaved", "halved"])
def test_gate_and_up_shard_together_in_both_layouts(spec, tp):
    for y in on_ranks(spec, ROUTER_SCALES, tp):
        assert agrees(y, oracle(spec).output_MH)


def test_an_averaged_output_halves_the_sum_after_the_reduction():
    spec = replace(DEEPSEEK, output=replace(DEEPSEEK.output, combine="average"))
    for y in on_ranks(spec, RUNNER_SCALES, 2):
        assert agrees(y, oracle(spec).output_MH)


def test_many_tokens_run_in_chunks_with_the_same_result():
    for y in on_ranks(MIXTRAL, ROUTER_SCALES, 1, tokens=2100):
        assert agrees(y, oracle(MIXTRAL, tokens=2100).output_MH)


# ------------------------------------------------------------------------------------------------ routers


@pytest.mark.parametrize("name", models.names())
def test_a_router_picks_the_oracle_s_experts_with_its_weights(name):
    spec = models.load(name).twin
    stages = oracle(replace(spec, vision=None), tokens=33)
    weights = make_weights(spec, 1, torch.float32)
    bias, per_expert = weights.get("e_score_correction_bias"), weights.get("per_expert_scale")
    router = make_router(spec.routing, bias, per_expert, 1.0)
    found, ids = router.select_experts(stages.logits_ME.float())
    clear = stages.margin_M > 1e-4
    assert clear.any()
    order, expected = ids.argsort(1), stages.topk_ids_MK.argsort(1)
    assert torch.equal(ids.gather(1, order)[clear], stages.topk_ids_MK.gather(1, expected)[clear])
    torch.testing.assert_close(
        found.double().gather(1, order)[clear], stages.topk_weights_MK.gather(1, expected)[clear], rtol=2e-6, atol=1e-7
    )
    assert found.dtype == torch.float32


def test_the_first_router_that_fits_is_chosen():
    plain = MIXTRAL.routing
    bias = torch.zeros(plain.num_experts)
    assert isinstance(make_router(plain, None, None, 1.0), FusedTopKRouter)
    assert isinstance(make_router(replace(plain, correction_bias=True), bias, None, 1.0), FusedTopKBiasRouter)
    assert isinstance(make_router(replace(plain, n_group=2, topk_group=1, top_k=2), None, None, 1.0), GroupedTopKRouter)


def test_grouped_routing_with_all_biased_scores_below_minus_one_stays_legal():
    routing, logits = DEEPSEEK.routing, torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    _, ids = make_router(routing, torch.full((16,), -3.0), None, 1.0).select_experts(logits)
    biased = (logits.sigmoid() - 3.0).unflatten(1, (4, 4))
    best = biased.topk(2).values.sum(-1).topk(2).indices
    allowed = (ids // 4)[:, :, None] == best[:, None, :]
    assert allowed.any(-1).all()


def test_renormalising_a_sum_of_zero_stays_finite():
    logits = torch.full((2, 16), -200.0)  # sigmoid underflows to 0 in fp32
    found, _ = make_router(DEEPSEEK.routing, torch.zeros(16), None, 2.5).select_experts(logits)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "lfm2_moe"])
def test_a_row_of_nan_logits_leaves_other_rows_bit_equal(name):
    spec = models.load(name).twin
    weights = make_weights(spec, 1, torch.float32)
    router = make_router(spec.routing, weights.get("e_score_correction_bias"), None, 1.0)
    logits = torch.randn(5, spec.routing.num_experts, generator=torch.Generator().manual_seed(2))
    clean = router.select_experts(logits)
    spoiled = logits.clone()
    spoiled[2] = torch.nan
    dirty = router.select_experts(spoiled)
    rows = [0, 1, 3, 4]
    assert all(torch.equal(a[rows], b[rows]) for a, b in zip(clean, dirty, strict=True))
    ids = dirty[1][2].tolist()
    assert len(set(ids)) == len(ids)
    assert all(0 <= e < spec.routing.num_experts for e in ids)


def test_exact_ties_give_distinct_experts_of_the_tied_set():
    found, ids = make_router(MIXTRAL.routing, None, None, 1.0).select_experts(torch.zeros(3, 8))
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    torch.testing.assert_close(found, torch.full_like(found, 1 / MIXTRAL.routing.top_k))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("spec", "settings", "tp", "words"),
    [
        (MIXTRAL, ROUTER_SCALES, 5, "tp=5 does not divide intermediate_size"),
        (LONGCAT, RUNNER_SCALES, 1, "zero experts: R would be scaled and Z not"),
        (LONGCAT, replace(ROUTER_SCALES, kernel_scales=True), 1, "the kernel never sees Z"),
        (NEMOTRON, replace(RUNNER_SCALES, reduce_results=False), 2, "needs the complete sum"),
        (DEEPSEEK, replace(RUNNER_SCALES, reduce_results=False, kernel="reduced"), 2, "the kernel reduces"),
        (DEEPSEEK, replace(RUNNER_SCALES, kernel_scales=True), 1, "s would be applied twice"),
        (MIXTRAL, replace(ROUTER_SCALES, shared_order="2"), 1, "nothing to order"),
        (DEEPSEEK, replace(ROUTER_SCALES, shared_order="2", experts="monolithic"), 1, "no finalize to run them in"),
        (
            replace(DEEPSEEK, routing=replace(DEEPSEEK.routing, routed_scaling_factor=0.0)),
            ROUTER_SCALES,
            1,
            "Pass None",
        ),
        (DEEPSEEK, replace(RUNNER_SCALES, kernel="deepep_ht"), 1, "whole experts on other ranks"),
        (DEEPSEEK, replace(RUNNER_SCALES, kernel="deepep_ht"), 2, "Use ep = tp \\* dp = 2"),
        (DEEPSEEK, replace(RUNNER_SCALES, sequence_parallel=True), 1, "no ranks to split the rows over"),
        (DEEPSEEK, replace(RUNNER_SCALES, sequence_parallel=True), 2, "rows need whole experts"),
        (LONGCAT, replace(ROUTER_SCALES, experts="monolithic"), 1, "with zero experts"),
        (MIXTRAL, replace(ROUTER_SCALES, fuse_shared_experts=True), 1, "there are no shared experts"),
        (LONGCAT, replace(ROUTER_SCALES, reduce_results=False), 2, "would add it tp times"),
    ],
)
def test_a_combination_that_would_compute_something_else_is_refused(spec, settings, tp, words):
    with pytest.raises(ValueError, match=words):
        on_ranks(spec, settings, tp)


@pytest.mark.parametrize(
    ("settings", "grid", "kernel", "words"),
    [
        (ROUTER_SCALES, Grid(tp=4, ep=2), "deepep_ht", "whole experts on other ranks"),
        (ROUTER_SCALES, Grid(tp=2), "deepep_ht", "whole experts on other ranks"),
        (replace(ROUTER_SCALES, reduce_results=False), Grid(tp=2), "reduced", "the kernel reduces"),
    ],
    ids=["cut experts", "ep=1", "caller reduces too"],
)
def test_a_swap_to_a_kernel_that_the_layer_would_refuse_is_refused_as_well(settings, grid, kernel, words):
    weights, x = make_weights(DEEPSEEK, 1, torch.float32), make_tokens(DEEPSEEK, 9, 1, torch.float32).hidden_states

    def body(comm: Communicator) -> Tensor:
        layer = FusedMoE(DEEPSEEK, settings, weights, comm)
        layer.swap_kernel(kernel)
        return layer(x)

    with pytest.raises(ValueError, match=words):
        run_ranks(grid, body).unwrap()


def test_a_correction_bias_in_bf16_is_refused_by_the_router():
    with pytest.raises(ValueError, match="expected float32"):
        make_router(DEEPSEEK.routing, torch.zeros(16, dtype=torch.bfloat16), None, 1.0)


def test_a_custom_routing_function_never_drops_a_bias_silently():
    routing = replace(GPT_OSS.routing, correction_bias=True)
    with pytest.raises(ValueError, match="would drop the bias"):
        make_router(routing, torch.zeros(routing.num_experts), None, 1.0)
