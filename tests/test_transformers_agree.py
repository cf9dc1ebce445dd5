"""The pages and the oracle beside transformers' own modules: they agree, and each rule of a page matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness import models
from harness.case import OPTIONS, Case, Grid
from harness.errors import CouldNotRun
from harness.systems.hf import TransformersLayer, TransformersSystem, _construct, _default_dtype
from harness.weights import DTYPES, Tokens, make_tokens, make_weights
from reference import moe
from reference.spec import Activation, Experts, MoESpec, Routing, Shared

torch.set_num_threads(1)

SYSTEM = TransformersSystem()
each_model = pytest.mark.parametrize("model", [n for n in models.names() if models.load(n).upstream is not None])


def inputs(case: Case) -> tuple[dict[str, Tensor], Tokens]:
    dtype = DTYPES[case.dtype]
    return make_weights(case.spec, case.seed, dtype), make_tokens(case.spec, case.tokens, case.seed, dtype)


def build(case: Case, weights: Mapping[str, Tensor]) -> TransformersLayer:
    return SYSTEM.build(case, weights, None)  # type: ignore[arg-type]  # one rank never talks


def run(case: Case, weights: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
    extra = {} if tokens.is_vision is None else {"modality": tokens.is_vision.long()}
    return build(case, weights)(tokens.hidden_states, **extra)


def oracle(spec: MoESpec, weights: Mapping[str, Tensor], tokens: Tokens) -> moe.Stages:
    return moe.forward(spec, weights, tokens.hidden_states, is_vision_M=tokens.is_vision)


def row_errors(got: Tensor, expected: Tensor) -> Tensor:
    return (got.double() - expected).norm(dim=1) / expected.norm(dim=1)


@each_model
def test_the_oracle_agrees_with_transformers_in_fp32(model: str):
    for tokens_, seed in ((0, 0), (1, 1), (7, 2), (33, 3)):
        case = Case(model=model, tokens=tokens_, seed=seed)
        weights, tokens = inputs(case)
        got, stages = run(case, weights, tokens), oracle(case.spec, weights, tokens)
        assert got.shape == (tokens_, case.spec.hidden_size)
        assert got.dtype == torch.float32
        clear = stages.margin_M > 1e-5
        assert (row_errors(got, stages.output_MH)[clear] < 2e-6).all()
        assert clear.sum() >= tokens_ - 1


@each_model
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_rows_off_ties_stay_within_rounding(model: str, dtype: str):
    case = Case(model=model, tokens=33, dtype=dtype, seed=1)
    weights, tokens = inputs(case)
    got = run(case, weights, tokens)
    stages = oracle(case.spec, weights, tokens)
    clear = stages.margin_M > router_rounding_M(case, stages)
    assert got.dtype == DTYPES[dtype]
    assert clear.float().mean() > 0.25
    assert (row_errors(got, stages.output_MH)[clear] < {"bf16": 2e-2, "fp16": 3e-3}[dtype]).all()


def router_rounding_M(case: Case, stages: moe.Stages) -> Tensor:
    """How far rounding can move apart two of the scores that a token's experts are chosen by."""
    routing = case.spec.routing
    if routing.precision.logits == "fp32":
        return torch.full_like(stages.margin_M, 1e-6)
    unit = {"bf16": 2**-8, "fp16": 2**-11}[case.dtype]
    logit_M = 2 * unit * stages.logits_ME.abs().amax(1)
    if routing.score_after_topk or routing.scoring_func == "sparsemixer":
        return logit_M
    return (logit_M + unit) * stages.scores_ME.amax(1)


@each_model
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_no_tokens_comes_back_empty_in_every_dtype(model: str, dtype: str):
    case = Case(model=model, tokens=0, dtype=dtype)
    weights, tokens = inputs(case)
    got = run(case, weights, tokens)
    assert got.shape == (0, case.spec.hidden_size)
    assert got.dtype == DTYPES[dtype]


@each_model
def test_each_rule_that_is_flipped_moves_the_oracle_away_from_transformers(model: str):
    case = Case(model=model, tokens=33)
    weights, tokens = inputs(case)
    got = run(case, weights, tokens)
    unseen = []
    for name, flip in FLIPS.items():
        flipped = flip(case.spec)
        if flipped is not None and row_errors(got, oracle(flipped, weights, tokens).output_MH).max() < 1e-3:
            unseen.append(name)
    assert not unseen


@pytest.mark.parametrize("model", [n for n in models.names() if models.load(n).twin.routing.correction_bias])
def test_a_forgotten_correction_bias_moves_the_oracle_away_from_transformers(model: str):
    case = Case(model=model, tokens=33)
    weights, tokens = inputs(case)
    forgetful = {n: torch.zeros_like(t) if n.endswith("correction_bias") else t for n, t in weights.items()}
    got = run(case, weights, tokens)
    assert row_errors(got, oracle(case.spec, forgetful, tokens).output_MH).max() > 1e-3


def routing(change: Callable[[Routing], dict | None]) -> Callable[[MoESpec], MoESpec | None]:
    """A flip of the routers of both branches; None where the model has nothing to flip."""

    def flip(spec: MoESpec) -> MoESpec | None:
        fields = change(spec.routing)
        if fields is None:
            return None
        vision = spec.vision and replace(spec.vision, routing=replace(spec.vision.routing, **fields))
        return replace(spec, routing=replace(spec.routing, **fields), vision=vision)

    return flip


def experts(change: Callable[[Experts], dict | None]) -> Callable[[MoESpec], MoESpec | None]:
    def flip(spec: MoESpec) -> MoESpec | None:
        fields = change(spec.experts)
        return None if fields is None else replace(spec, experts=replace(spec.experts, **fields))

    return flip


def activation(change: Callable[[Activation], dict | None]) -> Callable[[MoESpec], MoESpec | None]:
    def of_experts(of: Experts) -> dict | None:
        fields = change(of.activation)
        return None if fields is None else {"activation": replace(of.activation, **fields)}

    return experts(of_experts)


def shared(change: Callable[[Shared], dict | None]) -> Callable[[MoESpec], MoESpec | None]:
    def flip(spec: MoESpec) -> MoESpec | None:
        fields = spec.shared and change(spec.shared)
        return replace(spec, shared=replace(spec.shared, **fields)) if spec.shared and fields else None

    return flip


def other_scoring(of: Routing) -> dict | None:
    if of.scoring_func == "sparsemixer" or (of.score_after_topk and of.top_k == 1):
        return {"scoring_func": "softmax", "score_after_topk": False, "sparsemixer_epsilon": None}
    return {"scoring_func": "sigmoid" if of.scoring_func == "softmax" else "softmax"}


def softmax_of_k(of: Routing) -> bool:
    """The weights add up to 1 already."""
    return of.scoring_func == "softmax" and of.score_after_topk


FLIPS: dict[str, Callable[[MoESpec], MoESpec | None]] = {
    "one pick fewer": routing(lambda of: {"top_k": of.top_k - 1} if of.top_k > 2 else None),
    "another scoring function": routing(other_scoring),
    # a softmax over the chosen logits is a renormalised softmax: there the order of the two cannot show
    "choice and scoring swapped": routing(
        lambda of: (
            {"score_after_topk": not of.score_after_topk}
            if of.scoring_func == "softmax" and not of.renormalize
            else None
        )
    ),
    "renormalize": routing(
        lambda of: None if of.scoring_func == "sparsemixer" or softmax_of_k(of) else {"renormalize": not of.renormalize}
    ),
    "no scale": routing(lambda of: {"routed_scaling_factor": None} if of.routed_scaling_factor else None),
    "no groups": routing(lambda of: {"n_group": 1, "topk_group": 1} if of.n_group > 1 else None),
    "another number of kept groups": routing(lambda of: {"topk_group": of.topk_group + 1} if of.n_group > 1 else None),
    "another group score": routing(
        lambda of: {"group_score": "max" if of.group_score == "top2" else "top2"} if of.n_group > 1 else None
    ),
    "dropped groups at 0": routing(lambda of: {"group_fill": 0.0} if of.n_group > 1 and of.correction_bias else None),
    "no per-expert scale": routing(lambda of: {"per_expert_scale": False} if of.per_expert_scale else None),
    "no router bias": routing(lambda of: {"router_bias": False} if of.router_bias else None),
    "no router norm": routing(lambda of: {"router_norm_epsilon": None} if of.router_norm_epsilon else None),
    "another mask": routing(lambda of: {"sparsemixer_epsilon": 0.1} if of.sparsemixer_epsilon else None),
    "weight on the other side": routing(
        lambda of: {"weight_on": "output" if of.weight_on == "input" else "input"} if of.top_k == 1 else None
    ),
    "another layout": experts(
        lambda of: (
            {"layout": "halved" if of.layout == "interleaved" else "interleaved"} if of.activation.gated else None
        )
    ),
    "no expert bias": experts(lambda of: {"bias": False} if of.bias else None),
    "no latent bias": experts(lambda of: {"latent_bias": False} if of.latent_bias else None),
    "no clamp": activation(lambda of: {"clamp": "none", "limit": None} if of.limit else None),
    "clamp on the other side": activation(
        lambda of: {"clamp": "after" if of.clamp == "before" else "before"} if of.limit else None
    ),
    "no alpha": activation(lambda of: {"alpha": 1.0} if of.alpha != 1.0 else None),
    "no up offset": activation(lambda of: {"up_offset": 0.0} if of.up_offset else None),
    "another activation": activation(lambda of: {"kind": "silu" if of.kind == "gelu_tanh" else "gelu", "alpha": 1.0}),
    "shared experts unclamped": shared(
        lambda of: {"activation": replace(of.activation, clamp="none", limit=None)} if of.activation.limit else None
    ),
    "no gate on the shared experts": shared(lambda of: {"sigmoid_gate": False} if of.sigmoid_gate else None),
    "no bias on the shared experts": shared(lambda of: {"bias": False} if of.bias else None),
    "no shared experts": lambda spec: replace(spec, shared=None) if spec.shared else None,
    "the average of the parts": lambda spec: replace(spec, output=replace(spec.output, combine="average")),
}


def test_images_and_texts_swapped_move_the_oracle_away_from_transformers():
    case = Case(model="ernie4_5_vl_moe", tokens=33)
    weights, tokens = inputs(case)
    assert tokens.is_vision is not None
    swapped = replace(tokens, is_vision=~tokens.is_vision)
    assert (row_errors(run(case, weights, tokens), oracle(case.spec, weights, swapped).output_MH) > 1e-3).all()


@pytest.mark.parametrize("model", ["afmoe", "deepseek_v3", "lfm2_moe", "ernie4_5_moe"])
def test_the_correction_bias_stays_float32_in_a_bf16_layer(model: str):
    assert bias_of(model).dtype == torch.float32


@pytest.mark.parametrize("model", ["minimax_m2", "step3p5"])
def test_the_class_declares_a_bias_that_loading_in_bf16_would_round(model: str):
    """from_pretrained(dtype=bfloat16) casts this buffer, which alone changes choices; once upstream keeps it, drop the note."""
    upstream = models.load(model).upstream
    assert upstream is not None
    with torch.device("meta"), _default_dtype(torch.bfloat16):
        module = _construct(upstream, models.load(model).twin)
    assert module.state_dict()[str(upstream.parameters["e_score_correction_bias"])].dtype == torch.bfloat16
    assert any("rounds the correction bias" in note for note in models.load(model).notes)


def bias_of(model: str) -> Tensor:
    case = Case(model=model, dtype="bf16")
    upstream = models.load(model).upstream
    assert upstream is not None
    name = upstream.parameters["e_score_correction_bias"]
    return build(case, inputs(case)[0]).module.state_dict()[name]


def test_building_in_bf16_leaves_the_default_dtype_as_it_was():
    case = Case(model="mixtral", dtype="bf16")
    build(case, inputs(case)[0])
    assert torch.get_default_dtype() == torch.float32


def test_a_tensor_of_another_shape_is_refused_by_its_name():
    case = Case(model="mixtral")
    weights, _ = inputs(case)
    weights["router_weight"] = weights["router_weight"][:, 1:]
    with pytest.raises(CouldNotRun, match=r"gate.weight: ours is \[8, 63\], the module's \[8, 64\]"):
        build(case, weights)


def test_a_tensor_that_only_one_side_has_is_refused_by_its_name():
    case = Case(model="mixtral")
    weights, _ = inputs(case)
    weights["b2"] = weights.pop("w2")
    with pytest.raises(CouldNotRun, match=r"b2: has no name in transformers; experts.down_proj: the module has it"):
        build(case, weights)


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("size", "s", "calls")])
def test_an_option_of_the_runner_is_not_applicable_to_transformers(option: str):
    value = OPTIONS[option][0][-1]
    case = replace(Case(model="deepseek_v3"), **{option: value})
    assert SYSTEM.supports(case) == f"transformers has no {option}={value}"


def test_more_than_one_rank_is_not_applicable_to_transformers():
    for grid in (Grid(tp=2), Grid(dp=2), Grid(tp=2, ep=2), Grid(tp=2, ep=2, sp=2), Grid(tp=2, ep=4, dp=2)):
        assert SYSTEM.supports(Case(model="mixtral", grid=grid)) == "transformers runs on one rank"
    assert SYSTEM.supports(Case(model="lfm2_moe", s="real")) is None
    assert SYSTEM.supports(Case(model="step3p5", size="wide")) is None


@pytest.mark.parametrize("model", ["nemotron_h", "qwen3_next", "step3p5"])
def test_a_wide_twin_agrees_with_transformers_too(model: str):
    case = Case(model=model, size="wide")
    weights, tokens = inputs(case)
    stages = oracle(case.spec, weights, tokens)
    clear = stages.margin_M > 1e-6
    assert (row_errors(run(case, weights, tokens), stages.output_MH)[clear] < 2e-6).all()
