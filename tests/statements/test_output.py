"""Statements 2, 4, 8, 9, 12, 13, 15, 19, 20, 21, 22: who scales, what is reduced, what width, what the shared experts see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness import models
from harness.case import KERNELS, Case, parse, parse_grid
from harness.comm import Communicator, Group
from harness.execution import run_system
from harness.problem import problem
from harness.runner import router
from harness.runner.layer import FusedMoE
from harness.runner.plan import Reduced
from tests.attribution import attributions
from tests.drawn_layers import ZERO_EXPERTS, ZeroExpertCase
from tests.statements.layers import ROUTER_SCALES, RUNNER, RUNNER_SCALES, agrees, lawful, ok, on_ranks

DEEPSEEK, NEMOTRON = models.load("deepseek_v3").twin, models.load("nemotron_h").twin
PLAIN_LATENT = replace(NEMOTRON, experts=replace(NEMOTRON.experts, latent_bias=False))
GRIDS = ("tp1", "tp2", "tp4.ep2", "dp2", "tp2.ep4.dp2", "tp4.ep4.sp4")
DP_GRID = "tp2.ep4.dp2"


# ------------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("model", "unit"), [("deepseek_v3", 1 / DEEPSEEK.scale), ("lfm2_moe", 1.0)])
def test_2_fp16_with_s_at_the_output_returns_r_plus_shared_over_s_and_says_so(model: str, unit: float, grid: str):
    """Without shared experts nothing can leave fp16's range but s*R itself, and the layer returns that."""
    case = Case(model=model, grid=parse_grid(grid), tokens=40, dtype="fp16", scale="output")
    found = attributions(case, RUNNER)
    assert len(found) == case.grid.ranks
    for rank, out in enumerate(run_system(case, RUNNER, problem(case)).ranks):
        assert out.unit == unit
        for (part, _), factor in found[rank].factors.items():
            law = case.spec.scale if part == "routed" else 1.0
            assert abs(factor * out.unit - law * unit) < 8e-3 * law * unit


def test_4_a_factor_of_one_issues_no_multiplication():
    spec = replace(DEEPSEEK, routing=replace(DEEPSEEK.routing, routed_scaling_factor=1.0))
    for settings in (ROUTER_SCALES, RUNNER_SCALES, replace(ROUTER_SCALES, kernel_scales=True)):

        def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
            assert layer.runner.kernel.scale is None
            shared, routed = torch.ones(1), torch.ones(1)
            same = layer.runner._maybe_apply_routed_scale_to_output(shared, routed, layer.plan)
            assert same[0] is shared
            assert same[1] is routed
            return layer(x)

        for y in on_ranks(spec, settings, "tp2", use):
            assert agrees(y, lawful(spec))
    weights = torch.ones(2, 2)
    assert router._scaled(weights, 1.0) is weights


# --------------------------------------------------------------------------------------------------- reduction


@pytest.mark.parametrize("model", ["deepseek_v3", "nemotron_h", "gpt_oss"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_8_no_tensor_is_all_reduced_twice(kernel: str, model: str, monkeypatch):
    case, sums, right = parse(f"{model}@{DP_GRID}+kernel={kernel}"), {}, Group.all_reduce

    def watched(group: Group, part: Tensor) -> Tensor:
        assert group.name == "tp"
        before = sums.setdefault(id(group), [])
        assert not any(torch.equal(part, total) for total in before)
        before.append(right(group, part))
        return before[-1]

    monkeypatch.setattr(Group, "all_reduce", watched)

    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        y = layer(x)
        assert len(sums.get(id(comm.tp), [])) == layer.plan.collectives_of(1).count(("all_reduce", "tp"))
        return y

    for y in on_ranks(case.spec, replace(ROUTER_SCALES, kernel=case.kernel), DP_GRID, use):
        assert agrees(y, lawful(case.spec))


@pytest.mark.parametrize("grid", ["tp2", "tp4.ep2", "tp4.ep4", DP_GRID])
@pytest.mark.parametrize("settings", [ROUTER_SCALES, RUNNER_SCALES], ids=["router", "runner"])
def test_19_a_commutative_transform_gives_the_same_reduced_first_or_last(settings, grid: str):
    def early(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        assert layer.plan.routed_reduced is Reduced.FINAL
        layer.runner.facts = replace(layer.runner.facts, transform="ordered")
        assert layer.plan.routed_reduced is Reduced.EARLY
        return layer(x)

    last, first = on_ranks(PLAIN_LATENT, settings, grid), on_ranks(PLAIN_LATENT, settings, grid, early)
    for one, other in zip(last, first, strict=True):
        assert agrees(one, other, 1e-6)
        assert agrees(one, lawful(PLAIN_LATENT))


@pytest.mark.parametrize("grid", ["tp2", "tp4.ep2", "tp4.ep4"])
@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_20_a_deferred_reduction_returns_a_true_partial_on_grids(model: str, grid: str):
    spec = models.load(model).twin
    partials = on_ranks(spec, replace(ROUTER_SCALES, reduce_results=False), grid)
    assert agrees(torch.stack(partials).sum(0), lawful(spec))
    assert not agrees(partials[0], lawful(spec), 0.05)


@pytest.mark.parametrize("grid", ["tp2.dp2", DP_GRID, "tp2.ep2.dp2"])
@pytest.mark.parametrize("shares", ["tokens7", "tokens0_5"])
def test_20_the_caller_completes_a_deferred_reduction_over_tp_alone(grid: str, shares: str):
    ok(f"deepseek_v3@{grid}.{shares}+reduce=caller")


# ------------------------------------------------------------------------------------------------------ widths


@pytest.mark.parametrize("pad", [0, 8])
@pytest.mark.parametrize("shared", [True, False], ids=["S", "no S"])
@pytest.mark.parametrize("spec", [NEMOTRON, PLAIN_LATENT], ids=["ordered", "commutative"])
@pytest.mark.parametrize("grid", ["tp1", "tp2", "tp4.ep4", DP_GRID])
def test_9_a_latent_layer_returns_width_h_with_and_without_shared_experts(grid: str, spec, shared: bool, pad: int):
    spec = spec if shared else replace(spec, shared=None)
    for y in on_ranks(spec, replace(ROUTER_SCALES, padding=pad), grid):
        assert y.shape[1] == spec.hidden_size != spec.experts.latent_size
        assert agrees(y, lawful(spec))


# ---------------------------------------------------------------------------------------------- shared experts


@pytest.mark.parametrize("order", ["auto", "1", "2", "3"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_12_shared_experts_run_once_on_rows_that_were_neither_transformed_nor_dispatched(kernel: str, order: str):
    seen: list[Tensor] = []

    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        right, mine = layer.runner.shared_experts._module, x[: 4 + comm.dp.rank]
        layer.runner.shared_experts._module = lambda rows: (seen.append(rows.equal(mine)), right(rows))[1]
        return layer(mine)

    on_ranks(NEMOTRON, replace(ROUTER_SCALES, kernel=kernel, shared_order=order, padding=8), DP_GRID, use)
    assert seen == [True] * 4  # once on each rank, and its own rows


@pytest.mark.parametrize("order", ["1", "2", "3"])
@pytest.mark.parametrize("grid", ["tp1", "tp4.ep4", "dp2", DP_GRID])
def test_13_a_kernel_that_overwrites_what_it_is_given_changes_neither_shared_experts_nor_input(grid: str, order: str):
    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        experts, before = layer.runner.kernel.experts, x.clone()
        right = experts.apply
        experts.apply = lambda x_NP, *slots: x_NP.copy_(right(x_NP, *slots))
        experts.writes_input = True
        y = layer(x)
        assert torch.equal(x, before)
        return y

    for y in on_ranks(DEEPSEEK, replace(ROUTER_SCALES, shared_order=order), grid, use):
        assert agrees(y, lawful(DEEPSEEK))


@pytest.mark.parametrize("group", ["tp", "dp", "ep"])
@pytest.mark.parametrize("order", ["1", "2", "3"])
def test_15_a_shared_module_that_reduces_itself_over_any_group_is_refused(order: str, group: str):
    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        right = layer.runner.shared_experts._module
        layer.runner.shared_experts._module = lambda rows: getattr(comm, group).all_reduce(right(rows))
        return layer(x)

    with pytest.raises(RuntimeError, match=r"reduce their own output.*so S would count tp times.*without a reduction"):
        on_ranks(DEEPSEEK, replace(ROUTER_SCALES, shared_order=order), DP_GRID, use)


# ------------------------------------------------------------------------------------- zero experts, fused slots


@pytest.mark.parametrize("options", [{}, {"pad": "8"}, {"junk": "3"}, {"kernel": "reduced"}], ids=str)
@pytest.mark.parametrize("grid", [*GRIDS, "tp3", "tp2.ep4.dp2.sp2"])
def test_21_zero_experts_count_once_times_s_on_every_grid(grid: str, options: dict[str, str]):
    if "sp" in grid:
        options = {name: value for name, value in options.items() if name != "junk"}
    case = ZeroExpertCase(model="deepseek_v3", grid=parse_grid(grid), tokens=30, scale="router", **options)
    assert problem(case).stages.zero_MH.any()
    ok(case)
    for found in attributions(case, RUNNER).values():
        assert abs(found.factors["zero", None] - case.spec.scale) < 1e-3


@pytest.mark.parametrize("kernel", ["deepep_ht", "deepep_ll", "nvlink_one_sided", "nvlink_two_sided"])
def test_21_zero_experts_are_neither_sent_nor_reduced(kernel: str):
    for grid in (DP_GRID, "tp2.ep4.dp2.sp2"):
        case = ZeroExpertCase(model="deepseek_v3", grid=parse_grid(grid), tokens=9, split=(9, 0), scale="router")
        ok(replace(case, kernel=kernel))


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("width", [48, 80, 320])
def test_21_zero_experts_take_any_width_and_no_flag(width: int, flag: bool):
    spec = replace(ZERO_EXPERTS, hidden_size=width)
    if flag:
        with pytest.raises(ValueError, match="R would be scaled and Z not"):
            on_ranks(spec, RUNNER_SCALES, "tp2")
        return
    for y in on_ranks(spec, ROUTER_SCALES, "tp2"):
        assert agrees(y, lawful(spec))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("scale", ["router", "kernel", "output"])
@pytest.mark.parametrize("grid", ["tp1", "tp2", "dp2", "tp2.dp2"])
def test_22_fused_shared_slots_net_to_the_weight_1_whoever_scales(grid: str, scale: str, dtype: str):
    case = parse(f"deepseek_v3@{grid}.{dtype}.tokens30+shared=fused.scale={scale}")
    ok(case)
    for found in attributions(replace(case, dtype="fp32"), RUNNER).values():
        shares = [factor for (part, _), factor in found.factors.items() if part == "shared"]
        assert shares
        assert max(abs(factor - 1.0) for factor in shares) < 1e-3
