"""The specification as data: frozen, free of torch, and refusing what no layer can follow, in one sentence each."""

from __future__ import annotations

import ast
import inspect
import math
import subprocess
import sys
import traceback
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest

from reference import spec as spec_module
from reference.spec import (
    Activation,
    Experts,
    MoESpec,
    Output,
    RouterPrecision,
    Routing,
    Shared,
    SpecError,
    VisionBranch,
    weight_shapes,
)

ROUTING = Routing(
    num_experts=8,
    top_k=2,
    scoring_func="softmax",
    score_after_topk=False,
    correction_bias=False,
    n_group=1,
    topk_group=1,
    group_score="max",
    group_fill=-math.inf,
    renormalize=False,
    renormalize_rule="add",
    renormalize_epsilon=0.0,
    routed_scaling_factor=None,
    per_expert_scale=False,
    router_bias=False,
    router_norm_epsilon=None,
    sparsemixer_epsilon=None,
    weight_on="output",
    num_zero_experts=0,
    precision=RouterPrecision(logits="fp32", scores="fp32", weights="fp32"),
)
SILU = Activation(kind="silu", gated=True, clamp="none", limit=None, alpha=1.0, up_offset=0.0)
EXPERTS = Experts(
    intermediate_size=6, activation=SILU, bias=False, layout="halved", transposed=False, latent_size=None, latent_bias=False
)  # fmt: skip
SHARED = Shared(n_shared_experts=2, intermediate_size=12, activation=SILU, bias=False, sigmoid_gate=False)
SPEC = MoESpec(hidden_size=4, routing=ROUTING, experts=EXPERTS, shared=None, output=Output(combine="sum"), vision=None)
VISION = VisionBranch(routing=ROUTING, experts=replace(EXPERTS, intermediate_size=3))
RELU2 = replace(SILU, kind="relu2", gated=False)
SPARSEMIXER = replace(ROUTING, scoring_func="sparsemixer", sparsemixer_epsilon=0.01)

# what is changed in what, and the sentence that refuses it
REFUSED = [
    (ROUTING, {"scoring_func": "tanh"}, "Routing.scoring_func='tanh': expected one of softmax, sigmoid, sqrtsoftplus, sparsemixer"),
    (ROUTING, {"group_score": "mean"}, "Routing.group_score='mean': expected one of max, top2"),
    (ROUTING, {"renormalize_rule": "max"}, "Routing.renormalize_rule='max': expected one of add, clamp"),
    (ROUTING, {"weight_on": "both"}, "Routing.weight_on='both': expected one of output, input"),
    (SILU, {"kind": "swish"}, "Activation.kind='swish': expected one of silu, gelu, gelu_tanh, relu2"),
    (SILU, {"clamp": "twice"}, "Activation.clamp='twice': expected one of none, before, after"),
    (EXPERTS, {"layout": "mixed"}, "Experts.layout='mixed': expected one of halved, interleaved"),
    (SPEC.output, {"combine": "max"}, "Output.combine='max': expected one of sum, average"),
    (ROUTING, {"top_k": 0}, "top_k=0: expected 1 to 8, the number of experts"),
    (ROUTING, {"top_k": 11, "num_zero_experts": 2}, "top_k=11: expected 1 to 10, the number of experts"),
    (ROUTING, {"n_group": 0}, "n_group=0 does not divide num_experts=8"),
    (ROUTING, {"n_group": 3}, "n_group=3 does not divide num_experts=8"),
    (ROUTING, {"n_group": 4, "topk_group": 5}, "topk_group=5: expected 1 to n_group=4"),
    (ROUTING, {"n_group": 4, "topk_group": 0}, "topk_group=0: expected 1 to n_group=4"),
    (ROUTING, {"n_group": 4, "top_k": 3}, "top_k=3 exceeds the 2 experts of 1 kept groups"),
    (
        ROUTING,
        {"n_group": 8, "topk_group": 2, "group_score": "top2"},
        "group_score='top2' needs 2 experts a group: 8 in 8 groups",
    ),
    (ROUTING, {"group_fill": -1.0}, "group_fill=-1.0: expected -inf or 0.0"),
    (
        ROUTING,
        {"weight_on": "input"},
        "weight_on='input' needs top_k=1, got top_k=2: one input cannot carry two weights",
    ),
    (
        ROUTING,
        {"scoring_func": "sparsemixer"},
        "sparsemixer_epsilon is set exactly when scoring_func='sparsemixer'",
    ),
    (ROUTING, {"sparsemixer_epsilon": 0.01}, "sparsemixer_epsilon is set exactly when scoring_func='sparsemixer'"),
    *(
        (SPARSEMIXER, {"sparsemixer_epsilon": width}, f"sparsemixer_epsilon={width}: expected above 0 and below 0.5")
        for width in (0.0, 0.5)
    ),
    (
        ROUTING,
        {"per_expert_scale": True, "num_zero_experts": 1},
        "per_expert_scale with zero experts: a zero expert has no factor",
    ),
    (SPARSEMIXER, {"top_k": 3}, "scoring_func='sparsemixer' picks exactly 2 experts, got top_k=3"),
    *(
        (SPARSEMIXER, change, "scoring_func='sparsemixer' has neither correction bias, groups nor zero experts")
        for change in ({"correction_bias": True}, {"n_group": 2}, {"num_zero_experts": 1})
    ),
    *(
        (
            SPARSEMIXER,
            {field: True},
            "scoring_func='sparsemixer' scores while it picks: renormalize and score_after_topk stay False",
        )
        for field in ("renormalize", "score_after_topk")
    ),
    (SILU, {"clamp": "before"}, "clamp='before' with limit=None: a clamp needs a limit, no clamp needs None"),
    (SILU, {"limit": 7.0}, "clamp='none' with limit=7.0: a clamp needs a limit, no clamp needs None"),
    *(
        (RELU2, change, "an activation without a gate has neither clamp nor up_offset")
        for change in ({"up_offset": 1.0}, {"clamp": "after", "limit": 7.0})
    ),
    (SILU, {"kind": "gelu", "alpha": 1.5}, "alpha=1.5 belongs to silu, not to gelu"),
    (
        EXPERTS,
        {"activation": RELU2, "layout": "interleaved"},
        "layout='interleaved' needs a gated activation: there is only one half to store",
    ),
    (EXPERTS, {"latent_bias": True}, "latent_bias=True needs a latent_size"),
    (SPEC, {"hidden_size": 0}, "MoESpec.hidden_size=0: expected at least 1"),
    *(
        (
            SPEC,
            {"vision": replace(VISION, routing=replace(ROUTING, **change))},
            "both branches need the same num_experts and top_k: their choices are reported as one table",
        )
        for change in ({"num_experts": 4}, {"top_k": 1})
    ),
    (
        SPEC,
        {"vision": VISION, "experts": replace(EXPERTS, latent_size=3, latent_bias=True)},
        "a vision branch with latent_bias: one bias would be added to both kinds of tokens",
    ),
    (
        SPEC,
        {"vision": replace(VISION, routing=replace(ROUTING, routed_scaling_factor=2.5))},
        "both branches need the same routed_scaling_factor",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("good", "change", "sentence"), REFUSED, ids=[sentence[:60] for *_, sentence in REFUSED])
def test_a_spec_that_no_layer_can_follow_is_refused_in_one_sentence(good, change, sentence):
    with pytest.raises(SpecError) as caught:
        replace(good, **change)
    assert str(caught.value) == sentence


def test_every_refusal_in_the_file_has_an_example_here():
    refusals = {
        node.lineno
        for node in ast.walk(ast.parse(inspect.getsource(spec_module)))
        if isinstance(node, ast.Raise) and "SpecError" in ast.unparse(node)
    }
    seen = set()
    for good, change, _ in REFUSED:
        try:
            replace(good, **change)
        except SpecError as error:
            seen.add(traceback.extract_tb(error.__traceback__)[-1].lineno)
    assert refusals - seen == set(), "raised at these lines of spec.py, and nobody shows how"


def test_each_type_of_a_spec_is_frozen_and_hashed_by_value():
    types = [value for value in vars(spec_module).values() if isinstance(value, type) and is_dataclass(value)]
    assert len(types) >= 8
    for part in (ROUTING, ROUTING.precision, SILU, EXPERTS, SHARED, SPEC.output, VISION, SPEC):
        first = fields(part)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(part, first, getattr(part, first))
        assert hash(replace(part)) == hash(part)
        types.remove(type(part))
    assert types == [], "these types are not looked at"


def test_no_field_has_a_default_that_a_page_could_forget():
    for part in (ROUTING, ROUTING.precision, SILU, EXPERTS, SHARED, SPEC.output, VISION, SPEC):
        with pytest.raises(TypeError, match=f"{len(fields(part))} required keyword-only|1 required keyword-only"):
            type(part)()


def test_reading_a_specification_never_imports_torch():
    code = "import sys, reference.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_absent_factor_counts_as_one_and_not_as_zero():
    assert SPEC.scale == 1.0
    assert replace(SPEC, routing=replace(ROUTING, routed_scaling_factor=2.5)).scale == 2.5


def test_zero_experts_have_logits_and_no_weights():
    shapes = weight_shapes(replace(SPEC, routing=replace(ROUTING, num_zero_experts=3, correction_bias=True)))
    assert shapes["router_weight"] == (11, 4)
    assert shapes["e_score_correction_bias"] == (11,)
    assert shapes["w13"] == (8, 12, 4)


def test_tp_has_to_cut_the_widths_of_experts_shared_experts_and_vision_experts():
    spec = replace(SPEC, shared=SHARED, vision=VISION)
    assert spec.tp_widths() == {"intermediate_size": 6, "vision intermediate_size": 3, "shared intermediate_size": 12}
    assert SPEC.tp_widths() == {"intermediate_size": 6}


def test_shapes_of_all_tensors_follow_from_the_rules():
    routing = replace(ROUTING, correction_bias=True, per_expert_scale=True, router_bias=True, router_norm_epsilon=1e-6)
    experts = replace(EXPERTS, bias=True, latent_size=3, latent_bias=True)
    shared = replace(SHARED, bias=True, sigmoid_gate=True)
    assert weight_shapes(replace(SPEC, routing=routing, experts=experts, shared=shared)) == {
        "router_weight": (8, 4),
        "router_bias": (8,),
        "router_scale": (4,),
        "e_score_correction_bias": (8,),
        "per_expert_scale": (8,),
        "w13": (8, 12, 3),
        "w2": (8, 3, 6),
        "b13": (8, 12),
        "b2": (8, 3),
        "fc1_latent": (3, 4),
        "fc2_latent": (4, 3),
        "fc1_latent_bias": (3,),
        "fc2_latent_bias": (4,),
        "shared_w13": (24, 4),
        "shared_w2": (4, 12),
        "shared_b13": (24,),
        "shared_b2": (4,),
        "shared_gate": (1, 4),
    }


def test_one_half_is_stored_where_no_gate_is():
    plain = replace(EXPERTS, activation=RELU2)
    assert weight_shapes(replace(SPEC, experts=plain))["w13"] == (8, 6, 4)
    assert weight_shapes(replace(SPEC, experts=replace(plain, transposed=True)))["w13"] == (8, 4, 6)
    shapes = weight_shapes(replace(SPEC, shared=replace(SHARED, activation=RELU2)))
    assert shapes["shared_w13"] == (12, 4)


def test_the_vision_branch_has_tensors_of_its_own_and_shares_the_shared_ones():
    shapes = weight_shapes(replace(SPEC, shared=SHARED, vision=VISION))
    assert shapes["w13"] == (8, 12, 4)
    assert shapes["vision_w13"] == (8, 6, 4)
    assert {name for name in shapes if "shared" in name} == {"shared_w13", "shared_w2"}
