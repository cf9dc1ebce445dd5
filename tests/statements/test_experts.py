"""Statements 23 to 27, 33, 36: where experts live, how they are cut, their activations, twins, weights on the input."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness import models
from harness.case import parse, parse_grid
from harness.comm import Communicator
from harness.execution import run_system
from harness.problem import problem
from harness.runner import experts as kernels
from harness.runner.layer import FusedMoE
from harness.runner.placement import physical
from reference.spec import Activation, SpecError
from tests.attribution import attributions
from tests.statements.layers import ROUTER_SCALES, RUNNER, agrees, lawful, ok, on_ranks

DEEPSEEK, GPT_OSS = models.load("deepseek_v3").twin, models.load("gpt_oss").twin
GLM = models.load("glm4_moe").twin  # 10 experts


@functools.cache
def unplaced(grid: str) -> tuple[Tensor, ...]:
    return tuple(on_ranks(GLM, ROUTER_SCALES, grid))


@given(data=st.data())
def test_23_any_table_of_replicas_with_equal_weights_leaves_the_output_unchanged(data: st.DataObject):
    grid = data.draw(st.sampled_from(("tp2.ep2", "tp4.ep2", "tp4.ep4", "ep3.dp3", "tp2.ep4.dp2", "tp4.ep4.sp4")))
    kernel = data.draw(st.sampled_from(("partial",) if grid == "tp4.ep2" else ("partial", "deepep_ht", "deepep_ll", "nvlink_one_sided")))  # fmt: skip
    experts, ep = GLM.routing.num_experts, parse_grid(grid).ep
    redundant = -experts % ep + ep * data.draw(st.integers(0, 2))
    copies = [data.draw(st.integers(0, experts - 1)) for _ in range(redundant)]
    table = data.draw(st.permutations([*range(experts), *copies]))

    def use(layer: FusedMoE, x: Tensor, comm: Communicator) -> Tensor:
        layer.place(physical(table, experts, ep))
        return layer(x)

    # the rows of all sp ranks are the same here: what matters is that each is right
    settings = replace(ROUTER_SCALES, kernel=kernel, sequence_parallel="sp" in grid)
    for placed, before in zip(on_ranks(GLM, settings, grid, use), unplaced(grid.replace(".sp4", "")), strict=True):
        assert agrees(placed, before, 1e-6)


@given(
    ids=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8),
    table=st.permutations([0, 1, 2, 3, 4, 2, 0, 2]),
)
def test_23_an_id_that_is_no_expert_becomes_minus_one(ids: list[int], table: list[int]):
    placement = physical(table, 5, 2)
    found = placement.to_physical(torch.tensor([ids]))[0].tolist()
    for logical, slot in zip(ids, found, strict=True):
        assert (slot == -1) if not 0 <= logical < 5 else (table[slot] == logical)
    for logical in range(5):  # replicas take turns by row
        turns = placement.to_physical(torch.full((64, 1), logical)).unique().tolist()
        assert turns == [slot for slot, held in enumerate(table) if held == logical]


@pytest.mark.parametrize("kernel", ["partial", "reduced"])
@pytest.mark.parametrize("grid", ["tp4.ep4", "ep3.dp3", "tp4.ep8.dp2", "tp2.ep3.dp3"])
def test_24_linear_and_round_robin_placement_agree_where_experts_do_not_divide(grid: str, kernel: str):
    assert GLM.routing.num_experts % parse_grid(grid).ep
    outputs = []
    for placement in ("linear", "round_robin"):
        case = parse(f"glm4_moe@{grid}.tokens33+placement={placement}.kernel={kernel}")
        outputs.append([out.output.double() for out in run_system(case, RUNNER, problem(case)).ranks])
    for one, other in zip(*outputs, strict=True):
        assert agrees(one, other, 2e-6)


@pytest.mark.parametrize("grid", ["tp1", "tp2", "tp4", "tp2.ep2", "tp4.ep2", "dp2", "tp2.dp2", "tp2.ep2.dp2",
                                  "tp2.ep4.dp2", "tp4.ep4.sp4", "tp2.ep4.dp2.sp2"])  # fmt: skip
def test_25_the_bias_of_w2_enters_once_times_its_router_weight(grid: str):
    case = parse(f"gpt_oss@{grid}.tokens66")
    ok(case)
    found = attributions(case, RUNNER)
    assert len(found) == case.grid.ranks
    for each in found.values():
        biases = [factor for (part, _), factor in each.factors.items() if part == "expert bias"]
        assert biases
        assert max(abs(factor - case.spec.scale) for factor in biases) < 1e-3


@pytest.mark.parametrize("experts", ["auto", "slots", "batched", "monolithic"])
@pytest.mark.parametrize("grid", ["tp2", "tp3", "tp4", "dp2", "dp3", "tp2.dp2", "tp4.ep2", "tp3.ep2.dp2"])
@pytest.mark.parametrize("model", ["gpt_oss", "mixtral"])
def test_26_interleaved_and_halved_gate_and_up_rows_are_cut_by_pairs(model: str, grid: str, experts: str):
    assert (models.load(model).twin.experts.layout == "interleaved") is (model == "gpt_oss")
    assert parse_grid(grid).moe_tp in (2, 3, 4)
    ok(f"{model}@{grid}.tokens9+experts={experts}")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: float) -> float:
    return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def clamp(x: float, limit: float) -> float:
    return max(-limit, min(x, limit))


def rule(kind: str, *, gated: bool = True, clamp: str = "none", limit: float | None = None, alpha: float = 1.0,
         up_offset: float = 0.0) -> Activation:  # fmt: skip
    return Activation(kind=kind, gated=gated, clamp=clamp, limit=limit, alpha=alpha, up_offset=up_offset)  # type: ignore[arg-type]


# vLLM's name -> the rule, and its formula of gate g and up u in plain Python
ACTIVATIONS = {
    "silu": (rule("silu"), lambda g, u: g * sigmoid(g) * u),
    "gelu": (rule("gelu"), lambda g, u: gelu(g) * u),
    "gelu_tanh": (rule("gelu_tanh"), lambda g, u: gelu_tanh(g) * u),
    "swigluoai": (
        rule("silu", clamp="before", limit=7.0, alpha=1.702, up_offset=1.0),
        lambda g, u: (clamp(u, 7) + 1) * min(g, 7) * sigmoid(1.702 * min(g, 7)),
    ),
    "silu, swiglu_limit": (
        rule("silu", clamp="before", limit=2.5),
        lambda g, u: min(g, 2.5) * sigmoid(min(g, 2.5)) * clamp(u, 2.5),
    ),
    "swiglustep": (rule("silu", clamp="after", limit=7.0), lambda g, u: min(g * sigmoid(g), 7) * clamp(u, 7)),
    "silu_no_mul": (rule("silu", gated=False), lambda g, u: g * sigmoid(g)),
    "gelu_no_mul": (rule("gelu", gated=False), lambda g, u: gelu(g)),
    "gelu_tanh_no_mul": (rule("gelu_tanh", gated=False), lambda g, u: gelu_tanh(g)),
    "relu2_no_mul": (rule("relu2", gated=False), lambda g, u: max(g, 0.0) ** 2),
}
# inside, just below, at, just above and far beyond each clamp, on both sides
POINTS = [0.0, 0.3, 1.0, 2.5, 7.0, 2.499, 2.501, 6.999, 7.001, 7.0064, 40.0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_27_each_activation_has_its_formula_at_and_beyond_its_clamp(name: str):
    activation, formula = ACTIVATIONS[name]
    for g in [*POINTS, *(-p for p in POINTS)]:
        for u in [*POINTS, *(-p for p in POINTS)]:
            h = torch.tensor([g, u] if activation.gated else [g])
            g32, u32 = (torch.tensor(v).item() for v in (g, u))
            assert kernels.activate(h, activation).item() == pytest.approx(formula(g32, u32), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("name", [name for name, (a, _) in ACTIVATIONS.items() if a.clamp != "none"])
def test_27_a_clamp_bounds_the_gate_from_above_alone_and_the_other_half_on_both_sides(name: str):
    activation, _ = ACTIVATIONS[name]

    def at(g: float, u: float) -> float:
        return kernels.activate(torch.tensor([g, u]), activation).item()

    assert at(1e3, 1.0) == at(1e4, 1.0)
    assert at(1.0, 1e3) == at(1.0, 1e4)
    assert at(1.0, -1e3) == at(1.0, -1e4)
    assert at(-3.0, 1.0) != at(-4.0, 1.0)  # no bound from below


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_27_a_whole_layer_with_each_activation_keeps_the_law_beyond_the_clamp(name: str):
    activation, _ = ACTIVATIONS[name]
    layout = "interleaved" if name == "swigluoai" else "halved"
    spec = replace(GPT_OSS, experts=replace(GPT_OSS.experts, activation=activation, layout=layout))
    for y in on_ranks(spec, ROUTER_SCALES, "tp2", tokens=33):
        assert agrees(y, lawful(spec, 33))


MONOLITHIC = [name for name in models.names() if not models.load(name).twin.routing.num_zero_experts]


@pytest.mark.parametrize("model", MONOLITHIC)
def test_33_monolithic_and_modular_twins_agree_for_the_same_rule_and_s(model: str):
    scales = ("router", "kernel", "output") if models.load(model).twin.scale != 1.0 else ("page",)
    for grid in ("tp2", "tp2.ep4.dp2"):
        for scale in scales:
            outputs = []
            for experts in ("auto", "monolithic"):
                case = parse(f"{model}@{grid}.tokens9+scale={scale}.experts={experts}")
                outputs.append([out.output.double() for out in run_system(case, RUNNER, problem(case)).ranks])
            for one, other in zip(*outputs, strict=True):
                assert agrees(one, other, 1e-6), (grid, scale)


@pytest.mark.parametrize("linear", [True, False])
def test_36_a_weight_on_the_input_equals_one_on_the_output_only_through_a_linear_map(linear: bool, monkeypatch):
    spec = models.load("llama4").twin
    assert spec.routing.weight_on == "input"
    if linear:  # the up half alone, in both kinds of layer
        monkeypatch.setattr(kernels, "activate", lambda h, rule: h.chunk(2, -1)[1])
    on_input = on_ranks(spec, ROUTER_SCALES, "tp2")
    on_output = on_ranks(replace(spec, routing=replace(spec.routing, weight_on="output")), ROUTER_SCALES, "tp2")
    for one, other in zip(on_input, on_output, strict=True):
        assert agrees(one, other) is linear


def test_36_a_weight_on_the_input_of_more_than_one_expert_is_refused():
    with pytest.raises(SpecError, match="weight_on='input' needs top_k=1, got top_k=2: one input cannot carry two"):
        replace(models.load("llama4").twin.routing, top_k=2)
