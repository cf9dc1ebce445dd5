"""The law again, one token and one number at a time, and small examples that can be checked with a pencil.

Nothing here comes from reference/moe.py: `token_output` follows the words of spec.py with Python's floats, so a slip in
the oracle's tensors shows as a difference. The examples after it guard against reading the words wrongly twice.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import moe
from reference.moe import Choice, Stages, forward
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
    num_experts=4,
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
RELU2 = replace(SILU, kind="relu2", gated=False)
EXPERTS = Experts(
    intermediate_size=3, activation=SILU, bias=False, layout="halved", transposed=False, latent_size=None, latent_bias=False
)  # fmt: skip
SHARED = Shared(n_shared_experts=1, intermediate_size=3, activation=SILU, bias=False, sigmoid_gate=False)
SPEC = MoESpec(hidden_size=3, routing=ROUTING, experts=EXPERTS, shared=None, output=Output(combine="sum"), vision=None)

Row = list[float]


def numbers(shape: tuple[int, ...], source: random.Random) -> torch.Tensor:
    flat = [source.uniform(-1.0, 1.0) for _ in range(math.prod(shape))]
    return torch.tensor(flat, dtype=torch.float64).view(shape)


def tensors(spec: MoESpec, seed: int) -> dict[str, torch.Tensor]:
    source = random.Random(seed)
    weights = {name: numbers(shape, source) for name, shape in weight_shapes(spec).items()}
    if "e_score_correction_bias" in weights:
        weights["e_score_correction_bias"] -= 1.5  # all biased scores below 0, the highest near it
    return weights


def tokens(spec: MoESpec, count: int, seed: int = 1) -> torch.Tensor:
    return 2 * numbers((count, spec.hidden_size), random.Random(seed))


def check_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


# ---- the law, number by number


def dot(a: Row, b: Row) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def times(matrix: list[Row], x: Row) -> Row:
    return [dot(row, x) for row in matrix]


def added(a: Row, b: Row) -> Row:
    return [p + q for p, q in zip(a, b, strict=True)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def scored(logits: Row, kind: str) -> Row:
    if kind == "softmax":
        powers = [math.exp(logit - max(logits)) for logit in logits]
        return [power / math.fsum(powers) for power in powers]
    if kind == "sigmoid":
        return [sigmoid(logit) for logit in logits]
    return [math.sqrt(math.log1p(math.exp(logit))) for logit in logits]


def best_first(values: Row) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def routed_to(logits: Row, bias: Row | None, rule: Routing) -> dict[int, float]:
    """The chosen experts, best first, and their weights."""
    if rule.scoring_func == "sparsemixer":
        return sparsemixer(logits, rule.sparsemixer_epsilon)
    scores = logits if rule.score_after_topk else scored(logits, rule.scoring_func)
    ranks = added(scores, bias) if bias else scores
    size = len(ranks) // rule.n_group
    if rule.n_group > 1:
        groups = [sorted(ranks[g * size : (g + 1) * size], reverse=True) for g in range(rule.n_group)]
        kept = best_first([g[0] if rule.group_score == "max" else g[0] + g[1] for g in groups])[: rule.topk_group]
        ranks = [rank if e // size in kept else rule.group_fill for e, rank in enumerate(ranks)]
    chosen = best_first(ranks)[: rule.top_k]
    picked = [logits[e] if rule.score_after_topk else scores[e] for e in chosen]
    weights = scored(picked, rule.scoring_func) if rule.score_after_topk else picked
    if rule.renormalize:
        total = math.fsum(weights)
        total = (
            total + rule.renormalize_epsilon if rule.renormalize_rule == "add" else max(total, rule.renormalize_epsilon)
        )
        weights = [weight / total for weight in weights]
    return dict(zip(chosen, weights, strict=True))


def sparsemixer(logits: Row, epsilon: float | None) -> dict[int, float]:
    assert epsilon is not None
    weights: dict[int, float] = {}
    for _ in range(2):
        left = {e: logit for e, logit in enumerate(logits) if e not in weights}
        best = max(left.values())
        close = {e: x for e, x in left.items() if not (best - x) / max(abs(x), best) > 2 * epsilon}
        pick = min(e for e, x in left.items() if x == best)
        weights[pick] = math.exp(logits[pick] - best) / math.fsum(math.exp(x - best) for x in close.values())
    return weights


def activated(g: float, u: float, rule: Activation) -> float:
    limit = math.inf if rule.limit is None else rule.limit
    if rule.clamp == "before":
        g = min(g, limit)
    act = {
        "silu": lambda: g * sigmoid(rule.alpha * g),
        "gelu": lambda: g * (1 + math.erf(g / math.sqrt(2))) / 2,
        "gelu_tanh": lambda: g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2,
        "relu2": lambda: max(g, 0.0) ** 2,
    }[rule.kind]()
    if not rule.gated:
        return act
    if rule.clamp == "after":
        act = min(act, limit)
    return act * (max(-limit, min(u, limit)) + rule.up_offset)


def mlp(x: Row, w13: list[Row], b13: Row | None, w2: list[Row], b2: Row | None, rule: Activation) -> Row:
    h = times(w13, x)
    h = added(h, b13) if b13 else h
    gate, up = (h[: len(h) // 2], h[len(h) // 2 :]) if rule.gated else (h, h)
    y = times(w2, [activated(g, u, rule) for g, u in zip(gate, up, strict=True)])
    return added(y, b2) if b2 else y


def expert(x: Row, e: int, w: dict[str, list], rule: Experts) -> Row:
    w13, w2 = w["w13"][e], w["w2"][e]
    if rule.transposed:
        w13, w2 = ([list(row) for row in zip(*matrix, strict=True)] for matrix in (w13, w2))
    b13 = w["b13"][e] if rule.bias else None
    if rule.layout == "interleaved":
        w13, b13 = w13[0::2] + w13[1::2], b13 and b13[0::2] + b13[1::2]
    return mlp(x, w13, b13, w2, w["b2"][e] if rule.bias else None, rule.activation)


def logits_of(x: Row, w: dict[str, list], rule: Routing) -> Row:
    if rule.router_norm_epsilon is not None:
        length = math.sqrt(dot(x, x) / len(x) + rule.router_norm_epsilon)
        x = [v / length * factor / math.sqrt(len(x)) for v, factor in zip(x, w["router_scale"], strict=True)]
    logits = times(w["router_weight"], x)
    return added(logits, w["router_bias"]) if rule.router_bias else logits


def token_output(spec: MoESpec, weights: dict[str, torch.Tensor], x: Row, image: bool) -> tuple[dict[int, float], Row]:
    """What one token visits, and what comes out."""
    everything = {name: tensor.tolist() for name, tensor in weights.items()}
    branch, prefix = (spec.vision, "vision_") if spec.vision and image else (spec, "")
    routing, experts = branch.routing, branch.experts
    w = {name.removeprefix(prefix): values for name, values in everything.items() if name.startswith(prefix)}
    chosen = routed_to(logits_of(x, w, routing), w.get("e_score_correction_bias"), routing)
    if routing.per_expert_scale:
        chosen = {e: weight * w["per_expert_scale"][e] for e, weight in chosen.items()}
    inner = x if experts.latent_size is None else times(w["fc1_latent"], x)
    inner = added(inner, w["fc1_latent_bias"]) if experts.latent_bias else inner
    routed, zero = [0.0] * len(inner), [0.0] * len(x)
    for e, weight in chosen.items():
        if e >= routing.num_experts:
            zero = added(zero, [weight * v for v in x])
        elif routing.weight_on == "input":
            routed = added(routed, expert([weight * v for v in inner], e, w, experts))
        else:
            routed = added(routed, [weight * v for v in expert(inner, e, w, experts)])
    if experts.latent_size is not None:
        routed = times(w["fc2_latent"], routed)
    y = [spec.scale * (r + z) for r, z in zip(routed, zero, strict=True)]
    y = added(y, w["fc2_latent_bias"]) if experts.latent_bias else y
    if spec.shared:
        s, rule = everything, spec.shared
        shared = mlp(x, s["shared_w13"], s.get("shared_b13"), s["shared_w2"], s.get("shared_b2"), rule.activation)
        gate = sigmoid(dot(s["shared_gate"][0], x)) if rule.sigmoid_gate else 1.0
        y = added(y, [gate * v for v in shared])
    return chosen, [v / 2 for v in y] if spec.output.combine == "average" else y


# ---- every legal specification, at the size of a pencil


@st.composite
def activations(draw: st.DrawFn) -> Activation:
    kind = draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu2"]))
    gated = draw(st.booleans())
    clamp = draw(st.sampled_from(["none", "before", "after"])) if gated else "none"
    limit = None if clamp == "none" else draw(st.sampled_from([0.125, 0.5, 2.0]))
    alpha = draw(st.sampled_from([1.0, 1.75])) if kind == "silu" else 1.0
    up_offset = draw(st.sampled_from([0.0, 1.0])) if gated else 0.0
    return Activation(kind=kind, gated=gated, clamp=clamp, limit=limit, alpha=alpha, up_offset=up_offset)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    scoring_func = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"]))
    per_expert_scale, router_bias = draw(st.booleans()), draw(st.booleans())
    norm = draw(st.sampled_from([None, 1e-6, 0.5]))
    rule = replace(ROUTING, per_expert_scale=per_expert_scale, router_bias=router_bias, router_norm_epsilon=norm)
    if scoring_func == "sparsemixer":
        count, epsilon = draw(st.integers(2, 6)), draw(st.sampled_from([0.01, 0.375]))
        return replace(rule, num_experts=count, scoring_func=scoring_func, sparsemixer_epsilon=epsilon)
    group_score = draw(st.sampled_from(["max", "top2"]))
    n_group, group_size = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    topk_group = draw(st.integers(1, n_group))
    count = n_group * group_size
    top_k = draw(st.integers(1, topk_group * group_size))
    zero_experts = 0 if per_expert_scale else draw(st.integers(0, count - 1))
    return replace(
        rule,
        num_experts=count - zero_experts,
        num_zero_experts=zero_experts,
        top_k=top_k,
        scoring_func=scoring_func,
        score_after_topk=draw(st.booleans()),
        correction_bias=draw(st.booleans()),
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
        group_fill=draw(st.sampled_from([-math.inf, 0.0])),
        renormalize=draw(st.booleans()),
        renormalize_rule=draw(st.sampled_from(["add", "clamp"])),
        renormalize_epsilon=draw(st.sampled_from([1e-20, 0.25, 3.0])),
        routed_scaling_factor=draw(st.sampled_from([None, 2.5])),
        weight_on=draw(st.sampled_from(["output", "input"])) if top_k == 1 else "output",
    )


@st.composite
def all_experts(draw: st.DrawFn, latent_bias: bool | None = None) -> Experts:
    activation = draw(activations())
    latent_size = None if latent_bias is False else draw(st.sampled_from([None, 2]))
    return Experts(
        intermediate_size=draw(st.integers(1, 3)),
        activation=activation,
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["halved", "interleaved"])) if activation.gated else "halved",
        transposed=draw(st.booleans()),
        latent_size=latent_size,
        latent_bias=latent_size is not None and latent_bias is None and draw(st.booleans()),
    )


@st.composite
def specs(draw: st.DrawFn) -> MoESpec:
    routing, hidden = draw(routings()), draw(st.integers(1, 4))
    shared = st.builds(
        Shared, n_shared_experts=st.just(1), intermediate_size=st.integers(1, 3), activation=activations(),
        bias=st.booleans(), sigmoid_gate=st.booleans(),
    )  # fmt: skip
    with_vision = draw(st.booleans())
    return MoESpec(
        hidden_size=hidden,
        routing=routing,
        experts=draw(all_experts(latent_bias=False if with_vision else None)),
        shared=draw(st.none() | shared),
        output=Output(combine=draw(st.sampled_from(["sum", "average"]))),
        vision=VisionBranch(routing=routing, experts=draw(all_experts(latent_bias=False))) if with_vision else None,
    )


@given(spec=specs(), count=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_the_oracle_computes_what_the_words_of_the_spec_say(spec, count, seed):
    weights, x = tensors(spec, seed), tokens(spec, count, seed + 1)
    is_vision = None if spec.vision is None else torch.arange(count) % 2 == seed % 2
    stages = forward(spec, weights, x, is_vision_M=is_vision)
    parts = spec.scale * (stages.routed_MH + stages.zero_MH) + stages.offset_H + stages.shared_MH
    check_equal(stages.output_MH, parts * spec.output.share)
    for m in range(count):
        image = is_vision is not None and bool(is_vision[m])
        chosen, output = token_output(spec, weights, x[m].tolist(), image)
        assert stages.topk_ids_MK[m].tolist() == list(chosen)
        check_equal(stages.topk_weights_MK[m], torch.tensor(list(chosen.values()), dtype=torch.float64))
        check_equal(stages.output_MH[m], torch.tensor(output, dtype=torch.float64))


@given(spec=specs(), seed=st.integers(0, 2**32))
def test_each_token_is_computed_as_if_it_were_alone(spec, seed):
    weights, x, is_vision = tensors(spec, seed), tokens(spec, 3), modality(spec, 3)
    together = forward(spec, weights, x, is_vision_M=is_vision)
    for m in range(3):
        alone = forward(spec, weights, x[m : m + 1], is_vision_M=None if is_vision is None else is_vision[m : m + 1])
        assert torch.equal(alone.topk_ids_MK[0], together.topk_ids_MK[m])
        check_equal(alone.output_MH[0], together.output_MH[m])


def test_no_token_at_all_gives_no_rows_and_no_error():
    stages = forward(SPEC, tensors(SPEC, 0), tokens(SPEC, 0))
    shapes = {name: tuple(getattr(stages, name).shape) for name in Stages.__slots__}
    assert shapes == {
        "logits_ME": (0, 4),
        "scores_ME": (0, 4),
        "topk_ids_MK": (0, 2),
        "topk_weights_MK": (0, 2),
        "margin_M": (0,),
        "routed_MH": (0, 3),
        "shared_MH": (0, 3),
        "zero_MH": (0, 3),
        "offset_H": (3,),
        "output_MH": (0, 3),
    }


@given(spec=specs(), seed=st.integers(0, 2**32))
def test_the_routers_own_choice_given_back_changes_nothing(spec, seed):
    weights, x, is_vision = tensors(spec, seed), tokens(spec, 3), modality(spec, 3)
    free = forward(spec, weights, x, is_vision_M=is_vision)
    choice = Choice(free.topk_ids_MK, free.topk_weights_MK, free.margin_M)
    check_equal(forward(spec, weights, x, is_vision_M=is_vision, choice=choice).output_MH, free.output_MH)


def modality(spec: MoESpec, count: int) -> torch.Tensor | None:
    return None if spec.vision is None else torch.arange(count) % 2 == 1


# ---- routing, with a pencil: the router's matrix is 1, so a token is its own logits


def route(logits: Row, bias: Row | None = None, **rules: object) -> tuple[list[int], Row]:
    """Ids and weights of one token with these logits."""
    count = len(logits)
    rules = {"num_experts": count, "correction_bias": bias is not None, **rules}
    spec = replace(SPEC, hidden_size=count, routing=replace(ROUTING, **rules))
    weights = tensors(spec, 0) | {"router_weight": torch.eye(count)}
    if bias is not None:
        weights["e_score_correction_bias"] = torch.tensor(bias)
    stages = forward(spec, weights, torch.tensor([logits], dtype=torch.float64))
    return stages.topk_ids_MK[0].tolist(), stages.topk_weights_MK[0].tolist()


def logs(*values: float) -> Row:
    return [math.log(value) for value in values]


def odds(*scores: float) -> Row:
    """The logits whose sigmoids are these scores."""
    return [math.log(score / (1 - score)) for score in scores]


def test_softmax_divides_by_the_sum_over_all_experts_not_over_the_chosen():
    assert route(logs(1, 2, 5)) == ([2, 1], pytest.approx([5 / 8, 2 / 8]))


def test_sigmoid_scores_each_expert_by_itself():
    assert route(odds(0.25, 0.75, 0.5), scoring_func="sigmoid") == ([1, 2], pytest.approx([0.75, 0.5]))


def test_sqrtsoftplus_is_the_root_of_the_softplus():
    softplus_is_1_4_9 = [math.log(math.expm1(value)) for value in (1, 4, 9)]
    assert route(softplus_is_1_4_9, scoring_func="sqrtsoftplus") == ([2, 1], pytest.approx([3, 2]))


def test_scoring_after_the_choice_sees_the_chosen_logits_alone():
    assert route(logs(1, 2, 6), score_after_topk=True) == ([2, 1], pytest.approx([6 / 8, 2 / 8]))
    llama = route(odds(0.25, 0.75), score_after_topk=True, scoring_func="sigmoid", top_k=1)
    assert llama == ([1], pytest.approx([0.75]))


@pytest.mark.parametrize("offset", [0.0, -0.5, -2.0, -100.0, 1000.0])
def test_the_correction_bias_chooses_but_never_weighs(offset):
    bias = [offset, offset, offset + 0.5]
    assert route(odds(0.75, 0.5, 0.375), bias, scoring_func="sigmoid") == ([2, 0], pytest.approx([0.375, 0.75]))
    bias[2] = offset + 0.4375
    renormalized = route(odds(0.75, 0.5, 0.25), bias, scoring_func="sigmoid", renormalize=True)
    assert renormalized == ([0, 2], pytest.approx([0.75, 0.25]))


def test_a_bias_on_choices_made_by_logits_is_added_to_the_logits():
    ids, weights = route(logs(1, 2, 6), [0.0, 5.0, 0.0], score_after_topk=True)
    assert (ids, weights) == ([1, 2], pytest.approx([2 / 8, 6 / 8]))


GROUPED = {"num_experts": 4, "n_group": 2, "topk_group": 1, "scoring_func": "sigmoid"}


def test_max_keeps_the_group_of_the_best_expert_and_top2_that_of_the_best_pair():
    logits = odds(0.9, 0.1, 0.6, 0.5)
    assert route(logits, **GROUPED, group_score="max") == ([0, 1], pytest.approx([0.9, 0.1]))
    assert route(logits, **GROUPED, group_score="top2") == ([2, 3], pytest.approx([0.6, 0.5]))


def test_dropped_groups_are_never_chosen_when_all_biased_scores_are_negative():
    logits, bias = odds(0.9, 0.1, 0.6, 0.5), [-2.0] * 4
    assert route(logits, bias, **GROUPED) == ([0, 1], pytest.approx([0.9, 0.1]))
    # a fill of 0 beats every legal score: the trap that group_fill=0.0 states on purpose
    assert route(logits, bias, **GROUPED, group_fill=0.0) == ([2, 3], pytest.approx([0.6, 0.5]))


def test_group_scores_are_biased_scores_too():
    logits, bias = odds(0.9, 0.1, 0.6, 0.5), [0.0, 0.0, 0.5, 0.0]
    assert route(logits, bias, **GROUPED) == ([2, 3], pytest.approx([0.6, 0.5]))


def test_renormalising_adds_epsilon_to_the_sum_or_bounds_it_from_below():
    rules = {"scoring_func": "sigmoid", "renormalize": True}
    logits = odds(0.75, 0.25, 0.125)
    assert route(logits, **rules)[1] == pytest.approx([0.75, 0.25])
    assert route(logits, **rules, renormalize_epsilon=1.0)[1] == pytest.approx([0.75 / 2, 0.25 / 2])
    clamp = {**rules, "renormalize_rule": "clamp"}
    assert route(logits, **clamp, renormalize_epsilon=0.5)[1] == pytest.approx([0.75, 0.25])
    assert route(logits, **clamp, renormalize_epsilon=4.0)[1] == pytest.approx([0.75 / 4, 0.25 / 4])


@pytest.mark.parametrize("rule", ["add", "clamp"])
def test_scores_that_sum_to_zero_are_renormalised_to_zero(rule):
    rules = {"scoring_func": "sigmoid", "renormalize": True, "renormalize_rule": rule, "renormalize_epsilon": 1e-20}
    assert route([-800.0, -900.0, -1000.0], **rules) == ([0, 1], [0.0, 0.0])


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e300])
def test_extreme_logits_give_finite_scores_and_weights(scoring_func, size):
    ids, weights = route([0.0, size, -size], scoring_func=scoring_func)
    top = math.sqrt(size) if scoring_func == "sqrtsoftplus" else 1.0
    rest = {"softmax": math.exp(-size), "sigmoid": 0.5, "sqrtsoftplus": math.sqrt(math.log(2))}[scoring_func]
    assert (ids, weights) == ([1, 0], pytest.approx([top, rest], rel=1e-12, abs=0.0))


def test_softplus_is_not_cut_short_where_it_still_differs_from_its_argument():
    assert route([25.0], scoring_func="sqrtsoftplus", top_k=1)[1][0] ** 2 - 25 == pytest.approx(math.exp(-25), rel=1e-3)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"score_after_topk": True},
        {"scoring_func": "sigmoid", "n_group": 2, "topk_group": 1},
        {"scoring_func": "sparsemixer", "sparsemixer_epsilon": 0.01},
    ],
    ids=str,
)
def test_ties_go_to_the_lower_id(rules):
    assert route([1.0] * 4, **rules)[0] == [0, 1]
    assert route([0.5, 1.0, 1.0, 1.0], **rules)[0] == ([1, 2] if "n_group" not in rules else [1, 0])


def test_the_margin_is_the_gap_to_the_first_expert_left_out():
    assert margin(odds(0.75, 0.5, 0.375, 0.25), scoring_func="sigmoid") == pytest.approx(0.125)
    assert margin(logs(1, 2, 5, 8), score_after_topk=True) == pytest.approx(math.log(2.5))
    assert margin(odds(0.75, 0.5, 0.375, 0.25), scoring_func="sigmoid", top_k=4) == math.inf
    groups = {"n_group": 2, "topk_group": 1, "scoring_func": "sigmoid"}  # the only other choice is the other group
    assert margin(odds(0.75, 0.5, 0.625, 0.25), **groups) == pytest.approx(0.125)
    assert margin(odds(0.75, 0.5, 0.125, 0.25), **groups, top_k=1) == pytest.approx(0.25)


def margin(logits: Row, **rules: object) -> float:
    spec = replace(SPEC, hidden_size=4, routing=replace(ROUTING, **rules))
    weights = tensors(spec, 0) | {"router_weight": torch.eye(4)}
    return forward(spec, weights, torch.tensor([logits], dtype=torch.float64)).margin_M.item()


def test_sparsemixer_weighs_each_pick_among_the_logits_close_to_it():
    # 4 is within 20 % of 5, 3 is not; after 5 is taken, 3 is within 25 % of 4 but not within 20 %
    rules = {"scoring_func": "sparsemixer", "sparsemixer_epsilon": 0.1}
    assert route([3.0, 5.0, 4.0], **rules) == ([1, 2], pytest.approx([math.e / (math.e + 1), 1.0]))
    wider = rules | {"sparsemixer_epsilon": 0.125}
    assert route([3.0, 5.0, 4.0], **wider)[1] == pytest.approx([math.e / (math.e + 1)] * 2)


def test_sparsemixer_measures_closeness_by_the_larger_of_both_logits():
    rules = {"scoring_func": "sparsemixer", "sparsemixer_epsilon": 0.375}
    assert route([1.0, -1.0], **rules)[1] == [1.0, 1.0]  # 2 apart is 200 % of 1
    chance = math.e**2 / (math.e**2 + 1)
    assert route([-1.0, -3.0], **rules) == ([0, 1], pytest.approx([chance, 1.0]))  # 2 apart is 67 % of 3


def test_a_scale_of_each_expert_multiplies_its_weight_after_renormalising():
    spec = replace(
        SPEC, hidden_size=2, routing=replace(ROUTING, num_experts=2, renormalize=True, per_expert_scale=True)
    )
    weights = tensors(spec, 0) | {"router_weight": torch.eye(2), "per_expert_scale": torch.tensor([3.0, -2.0])}
    stages = forward(spec, weights, torch.tensor([logs(1, 3)], dtype=torch.float64))
    check_equal(stages.topk_weights_MK, torch.tensor([[0.75 * -2, 0.25 * 3]], dtype=torch.float64))


def test_the_router_bias_belongs_to_the_logits_and_so_to_the_scores():
    spec = replace(SPEC, hidden_size=2, routing=replace(ROUTING, num_experts=2, router_bias=True))
    weights = tensors(spec, 0) | {"router_weight": torch.eye(2), "router_bias": torch.tensor(logs(1, 6)).double()}
    stages = forward(spec, weights, torch.tensor([logs(2, 1)], dtype=torch.float64))
    assert stages.scores_ME[0].tolist() == pytest.approx([2 / 8, 6 / 8])


def test_a_norm_in_front_of_the_router_forgets_how_long_the_token_is():
    spec = replace(
        SPEC, hidden_size=4, routing=replace(ROUTING, router_norm_epsilon=0.0, scoring_func="sigmoid", top_k=1)
    )
    weights = tensors(spec, 0) | {"router_weight": torch.eye(4), "router_scale": torch.tensor([2.0, 2.0, 2.0, 6.0])}
    for length in (1.0, 16.0):
        x = length * torch.tensor([[1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)
        logits = forward(spec, weights, x).logits_ME  # rms is `length`, H**-0.5 is 1/2
        check_equal(logits, torch.tensor([[1.0, -1.0, 1.0, 3.0]], dtype=torch.float64))


# ---- experts, with a pencil


def activation_of(g: float, u: float = 1.0, **rules: object) -> float:
    rule = replace(SILU, **rules)
    gate, up = torch.tensor([[g]], dtype=torch.float64), torch.tensor([[u]], dtype=torch.float64)
    return moe.activate(gate, up if rule.gated else None, rule).item()


def test_activations_have_the_values_of_their_definitions():
    assert activation_of(math.log(3)) == pytest.approx(math.log(3) * 0.75)
    assert activation_of(math.log(3), alpha=2.0) == pytest.approx(math.log(3) * 0.9)
    assert activation_of(1.0, kind="gelu") == pytest.approx(0.8413447460685429)  # Phi(1)
    assert activation_of(1.0, kind="gelu_tanh") == pytest.approx(0.8411919906082768)
    assert activation_of(3.0, kind="relu2") == 9.0
    assert activation_of(-3.0, kind="relu2") == 0.0
    assert activation_of(3.0, kind="relu2", gated=False) == 9.0
    assert activation_of(-800.0) == 0.0


def test_the_gate_is_activated_and_the_other_half_is_moved_by_its_offset():
    assert activation_of(2.0, 3.0, kind="relu2") == 12.0
    assert activation_of(2.0, 3.0, kind="relu2", up_offset=1.0) == 16.0


def test_a_clamp_before_the_activation_bounds_its_argument_and_one_after_it_its_value():
    before = {"kind": "relu2", "clamp": "before", "limit": 2.0, "up_offset": 1.0}
    assert activation_of(5.0, 1.0, **before) == 4.0 * 2.0
    assert activation_of(1.0, 5.0, **before) == 1.0 * 3.0
    assert activation_of(1.0, -5.0, **before) == 1.0 * -1.0
    after = before | {"clamp": "after"}
    assert activation_of(5.0, 1.0, **after) == 2.0 * 2.0
    assert activation_of(1.0, -5.0, **after) == 1.0 * -1.0
    assert activation_of(-5.0, 1.0, kind="gelu", clamp="before", limit=2.0) == pytest.approx(
        -5.0 * 2.866515718791939e-07
    )


def one_expert(**experts: object) -> MoESpec:
    """One expert, always chosen with weight 3/4: sigmoid of the router bias ln 3."""
    routing = replace(ROUTING, num_experts=1, top_k=1, scoring_func="sigmoid", router_bias=True)
    return replace(SPEC, hidden_size=1, routing=routing, experts=replace(EXPERTS, intermediate_size=1, **experts))


def run_one(spec: MoESpec, x: float, **values: object) -> float:
    weights = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in weight_shapes(spec).items()}
    weights["router_bias"] += math.log(3)
    for name, value in values.items():
        weights[name] = torch.tensor(value, dtype=torch.float64).view(weights[name].shape)
    return forward(spec, weights, torch.tensor([[x]], dtype=torch.float64)).output_MH.item()


def test_a_weight_on_the_input_passes_through_the_activation_and_one_on_the_output_does_not():
    spec = one_expert(activation=RELU2)
    on_input = replace(spec, routing=replace(spec.routing, weight_on="input"))
    assert run_one(spec, 2.0, w13=1.0, w2=5.0) == pytest.approx(0.75 * 5 * 4)
    assert run_one(on_input, 2.0, w13=1.0, w2=5.0) == pytest.approx(0.75**2 * 5 * 4)


def test_biases_of_an_expert_count_as_often_as_its_weight_says():
    spec = one_expert(activation=RELU2, bias=True)
    assert run_one(spec, 2.0, b13=3.0, w2=1.0) == pytest.approx(0.75 * 9)
    assert run_one(spec, 2.0, b2=8.0) == pytest.approx(0.75 * 8)
    scaled = replace(spec, routing=replace(spec.routing, routed_scaling_factor=2.0))
    assert run_one(scaled, 2.0, b2=8.0) == pytest.approx(2 * 0.75 * 8)


def test_s_multiplies_neither_the_shared_part_nor_the_bias_of_the_latent_projection():
    spec = one_expert(activation=RELU2, latent_size=1, latent_bias=True)
    spec = replace(spec, shared=replace(SHARED, intermediate_size=1, activation=RELU2))
    spec = replace(spec, routing=replace(spec.routing, routed_scaling_factor=2.0))
    parts = {"fc1_latent": 1.0, "fc1_latent_bias": 1.0, "w13": 1.0, "w2": 1.0, "fc2_latent": 4.0}
    assert run_one(spec, 2.0, **parts) == pytest.approx(2 * 0.75 * 4 * 9)
    assert run_one(spec, 2.0, fc2_latent_bias=7.0) == 7.0
    assert run_one(spec, 2.0, shared_w13=1.0, shared_w2=10.0) == 40.0
    everything = run_one(spec, 2.0, **parts, fc2_latent_bias=7.0, shared_w13=1.0, shared_w2=10.0)
    assert everything == pytest.approx(54 + 7 + 40)
    assert run_one(replace(spec, output=Output(combine="average")), 2.0, fc2_latent_bias=7.0) == 3.5


def test_a_zero_expert_returns_its_input_times_its_weight_and_s():
    spec = one_expert(activation=RELU2)
    routing = replace(spec.routing, num_zero_experts=2, top_k=3, routed_scaling_factor=2.0)
    spec = replace(spec, routing=routing)
    router = {"router_bias": logs(3, 1, 1)}
    assert run_one(spec, 8.0, **router) == pytest.approx(2 * (0.5 + 0.5) * 8)
    assert run_one(spec, 8.0, **router, w13=1.0, w2=1.0) == pytest.approx(2 * (0.75 * 64 + 8))


@pytest.mark.parametrize("weight_on", ["input", "output"])
def test_a_zero_expert_brings_in_no_bias_of_another_expert(weight_on):
    spec = one_expert(activation=RELU2, bias=True)
    spec = replace(spec, routing=replace(spec.routing, num_zero_experts=1, weight_on=weight_on))
    assert run_one(spec, 8.0, router_bias=logs(1, 3), b13=5.0, w2=1.0, b2=7.0) == pytest.approx(0.75 * 8)


def test_shared_experts_may_have_biases_and_a_gate_of_their_own():
    spec = replace(
        one_expert(),
        shared=Shared(n_shared_experts=1, intermediate_size=1, activation=RELU2, bias=True, sigmoid_gate=True),
    )
    assert run_one(spec, 1.0, shared_b13=3.0, shared_w2=2.0, shared_b2=4.0) == pytest.approx((9 * 2 + 4) / 2)
    gated = run_one(spec, 1.0, shared_b13=3.0, shared_w2=2.0, shared_b2=4.0, shared_gate=math.log(3))
    assert gated == pytest.approx(0.75 * 22)


# ---- layouts: the same expert, stored in another way


@given(
    seed=st.integers(0, 2**32), hidden=st.integers(1, 4), width=st.integers(1, 4), bias=st.booleans(),
    transposed=st.booleans(),
)  # fmt: skip
def test_interleaved_rows_equal_halved_rows_after_permuting_them(seed, hidden, width, bias, transposed):
    spec = replace(
        SPEC,
        hidden_size=hidden,
        experts=replace(EXPERTS, intermediate_size=width, bias=bias, transposed=transposed),
    )
    weights, x = tensors(spec, seed), tokens(spec, 3)
    order = torch.arange(2 * width).view(2, width).T.flatten()  # gate 0, up 0, gate 1, up 1, ...
    moved = dict(weights, w13=weights["w13"].index_select(2 if transposed else 1, order))
    if bias:
        moved["b13"] = weights["b13"][:, order]
    interleaved = replace(spec, experts=replace(spec.experts, layout="interleaved"))
    check_equal(forward(interleaved, moved, x).output_MH, forward(spec, weights, x).output_MH)


@given(seed=st.integers(0, 2**32), hidden=st.integers(1, 4), width=st.integers(1, 4), gated=st.booleans())
def test_transposed_weights_equal_plain_ones_after_transposing(seed, hidden, width, gated):
    experts = replace(EXPERTS, intermediate_size=width, activation=SILU if gated else RELU2)
    spec = replace(SPEC, hidden_size=hidden, experts=experts)
    weights, x = tensors(spec, seed), tokens(spec, 3)
    turned = dict(weights, w13=weights["w13"].mT, w2=weights["w2"].mT)
    transposed = replace(spec, experts=replace(experts, transposed=True))
    check_equal(forward(transposed, turned, x).output_MH, forward(spec, weights, x).output_MH)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 4), width=st.integers(1, 3))
def test_one_wide_shared_expert_is_the_sum_of_several_narrow_ones(seed, count, width):
    narrow = replace(SPEC, shared=replace(SHARED, intermediate_size=width))
    wide = replace(SPEC, shared=replace(SHARED, n_shared_experts=count, intermediate_size=count * width))
    weights, x = tensors(wide, seed), tokens(wide, 3)
    gates, ups = weights["shared_w13"].view(2, count, width, -1)
    downs = weights["shared_w2"].view(-1, count, width)
    parts = [
        forward(narrow, weights | {"shared_w13": torch.cat([gates[i], ups[i]]), "shared_w2": downs[:, i]}, x).shared_MH
        for i in range(count)
    ]
    check_equal(forward(wide, weights, x).shared_MH, torch.stack(parts).sum(0))


# ---- the whole layer


def test_text_and_image_tokens_meet_their_own_experts_and_the_same_shared_ones():
    spec = replace(
        SPEC, shared=SHARED, vision=VisionBranch(routing=ROUTING, experts=replace(EXPERTS, intermediate_size=2))
    )
    weights, x = tensors(spec, 5), tokens(spec, 4)
    is_vision = torch.tensor([True, False, False, True])
    mixed = forward(spec, weights, x, is_vision_M=is_vision)
    text_spec = replace(spec, vision=None)
    image_spec = replace(text_spec, experts=spec.vision.experts)
    images = weights | {n.removeprefix("vision_"): t for n, t in weights.items() if n.startswith("vision_")}
    text, image = forward(text_spec, weights, x), forward(image_spec, images, x)
    check_equal(mixed.output_MH, torch.where(is_vision[:, None], image.output_MH, text.output_MH))
    check_equal(mixed.shared_MH, text.shared_MH)
    assert not torch.equal(image.topk_ids_MK, text.topk_ids_MK)


def test_a_choice_from_outside_replaces_the_routers_ids_and_weights():
    weights, x = tensors(SPEC, 3), tokens(SPEC, 1)
    choice = Choice(torch.tensor([[3, 1]]), torch.tensor([[2.0, -1.0]], dtype=torch.float64), torch.ones(1))
    stages = forward(SPEC, weights, x, choice=choice)
    w = {name: tensor.tolist() for name, tensor in weights.items()}
    expected = [2 * a - b for a, b in zip(*(expert(x[0].tolist(), e, w, EXPERTS) for e in (3, 1)), strict=True)]
    check_equal(stages.output_MH[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stored_weights_are_widened_and_nothing_is_rounded_again(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in tensors(SPEC, 1).items()}
    x = tokens(SPEC, 3).to(dtype)
    stored = forward(SPEC, weights, x)
    widened = forward(SPEC, {name: tensor.double() for name, tensor in weights.items()}, x.double())
    assert torch.equal(stored.output_MH, widened.output_MH)


def test_missing_and_misshapen_tensors_are_refused_by_name_all_at_once():
    weights = tensors(SPEC, 0)
    weights["w13"] = weights["w13"][:, :5]
    del weights["w2"]
    with pytest.raises(SpecError) as caught:
        forward(SPEC, weights, torch.zeros(2, 5))
    assert str(caught.value) == (
        "w13: expected [4, 6, 3], got [4, 5, 3]; w2: expected [4, 3, 3], got nothing; "
        "hidden_states: expected [M, 3], got [2, 5]"
    )


def test_the_modality_is_asked_for_exactly_where_a_vision_branch_needs_it():
    vision = replace(SPEC, vision=VisionBranch(routing=ROUTING, experts=EXPERTS))
    for spec, is_vision in ((SPEC, torch.zeros(1, dtype=torch.bool)), (vision, None)):
        with pytest.raises(SpecError, match="is_vision_M: needed exactly if the spec has a vision branch"):
            forward(spec, tensors(spec, 0), tokens(spec, 1), is_vision_M=is_vision)
