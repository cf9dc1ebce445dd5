"""The law of a Mixture-of-Experts layer in float64, one function a stage, in the order of the formula.

    y = s * R + S + s * Z        R = sum over the chosen experts of weight_e * expert_e(x)

s multiplies the routed part once and the shared part S never; Z are the zero experts, which return their input.
Names end in their shape: M tokens, H hidden, L latent (H without a latent projection), I intermediate, E experts, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.spec import Activation, Experts, MoESpec, Routing, Shared, SpecError, weight_shapes


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """Everything a layer passes through, in float64 (ids int64). All parts of output_MH are as they enter it, but for s.

    topk_ids_MK: best first, ties to the lower id; ids from num_experts on are zero experts.
    topk_weights_MK: renormalised, not yet multiplied by s.    margin_M: how far the choice is from being another one,
    in units of the score it was made on; inf where there is no other.
    routed_MH: R, without s.    zero_MH: Z, without s.    offset_H: the bias of the latent output projection, outside s.
    """

    logits_ME: Tensor
    scores_ME: Tensor
    topk_ids_MK: Tensor
    topk_weights_MK: Tensor
    margin_M: Tensor
    routed_MH: Tensor
    shared_MH: Tensor
    zero_MH: Tensor
    offset_H: Tensor
    output_MH: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """topk_ids int64 [M, K], topk_weights float64 [M, K] before s, margin float64 [M]."""

    topk_ids_MK: Tensor
    topk_weights_MK: Tensor
    margin_M: Tensor


def forward(
    spec: MoESpec,
    weights: Mapping[str, Tensor],
    hidden_states_MH: Tensor,
    *,
    is_vision_M: Tensor | None = None,
    choice: Choice | None = None,
) -> Stages:
    """Compute the layer in float64 from the weights as stored.

    weights: tensors by the names and shapes of `weight_shapes(spec)`, any float dtype; they are upcast, never regenerated.
    hidden_states_MH: [M, H], any float dtype, M may be 0.    is_vision_M: bool [M], needed exactly if spec.vision is set.
    choice: routes the tokens with these experts and weights instead of the router's.
    Raises SpecError if a tensor is missing or has another shape.
    """
    _check_shapes(spec, weights, hidden_states_MH, is_vision_M)
    weights = {name: t if name.endswith(("w13", "w2")) else t.double() for name, t in weights.items()}
    x_MH = hidden_states_MH.double()
    if spec.vision is None or is_vision_M is None:
        branch = _branch(spec.routing, spec.experts, weights, x_MH, choice)
    else:
        vision = {name.removeprefix("vision_"): t for name, t in weights.items() if name.startswith("vision_")}
        text_rows, image_rows = (~is_vision_M).nonzero()[:, 0], is_vision_M.nonzero()[:, 0]
        parts = [
            _branch(spec.routing, spec.experts, weights, x_MH[text_rows], _rows(choice, text_rows)),
            _branch(spec.vision.routing, spec.vision.experts, vision, x_MH[image_rows], _rows(choice, image_rows)),
        ]
        back = torch.argsort(torch.cat([text_rows, image_rows]))
        branch = {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
    offset_H = weights["fc2_latent_bias"] if spec.experts.latent_bias else x_MH.new_zeros(spec.hidden_size)
    shared_MH = shared_experts(x_MH, weights, spec.shared) if spec.shared else torch.zeros_like(x_MH)
    output_MH = spec.scale * (branch["routed_MH"] + branch["zero_MH"]) + offset_H + shared_MH
    return Stages(**branch, shared_MH=shared_MH, offset_H=offset_H, output_MH=output_MH * spec.output.share)


def _branch(
    routing: Routing, experts: Experts, weights: Mapping[str, Tensor], x_MH: Tensor, choice: Choice | None
) -> dict[str, Tensor]:
    logits_ME = router_logits(x_MH, weights, routing)
    scores_ME = score(logits_ME, routing)
    bias_E = weights["e_score_correction_bias"] if routing.correction_bias else None
    chosen = choice or select_experts(logits_ME, scores_ME, bias_E, routing)
    ids_MK, weights_MK = chosen.topk_ids_MK, chosen.topk_weights_MK
    if routing.per_expert_scale and choice is None:
        weights_MK = weights_MK * weights["per_expert_scale"][ids_MK]
    real_MK = ids_MK < routing.num_experts
    x_ML = x_MH if experts.latent_size is None else x_MH @ weights["fc1_latent"].T
    if experts.latent_bias:
        x_ML = x_ML + weights["fc1_latent_bias"]
    routed_ML = routed_experts(x_ML, weights, ids_MK, weights_MK * real_MK, routing, experts)
    return {
        "logits_ME": logits_ME,
        "scores_ME": scores_ME,
        "topk_ids_MK": ids_MK,
        "topk_weights_MK": weights_MK,
        "margin_M": chosen.margin_M,
        "routed_MH": routed_ML if experts.latent_size is None else routed_ML @ weights["fc2_latent"].T,
        "zero_MH": (weights_MK * ~real_MK).sum(-1, keepdim=True) * x_MH,
    }


def router_logits(x_MH: Tensor, weights: Mapping[str, Tensor], routing: Routing) -> Tensor:
    """Project each token on the router's rows; Gemma-4 first normalises it and scales it by a vector and H**-0.5."""
    if routing.router_norm_epsilon is not None:
        mean_square_M1 = x_MH.square().mean(-1, keepdim=True)
        x_MH = x_MH * torch.rsqrt(mean_square_M1 + routing.router_norm_epsilon)
        x_MH = x_MH * weights["router_scale"] * x_MH.shape[-1] ** -0.5
    logits_ME = x_MH @ weights["router_weight"].T
    return logits_ME + weights["router_bias"] if routing.router_bias else logits_ME


def score(logits: Tensor, routing: Routing) -> Tensor:
    """Turn logits into scores over the last dimension. Sparsemixer scores while it picks: its scores are the logits."""
    match routing.scoring_func:
        case "softmax":
            return torch.softmax(logits, -1)
        case "sigmoid":
            return torch.sigmoid(logits)
        case "sqrtsoftplus":
            return torch.nn.functional.softplus(
                logits, threshold=700.0
            ).sqrt()  # the default threshold of 20 is inexact
        case "sparsemixer":
            return logits


def select_experts(logits_ME: Tensor, scores_ME: Tensor, bias_E: Tensor | None, routing: Routing) -> Choice:
    """Choose top_k experts per token; the correction bias takes part in the choice and never in the weights.

    logits_ME, scores_ME: float64 [M, E], M may be 0.    bias_E: float64 [E], any sign, or None.
    Returns the ids best first, ties to the lower id, and the unbiased weights, renormalised and not yet scaled by s.
    Source: DeepSeek-V3 technical report, 2.1.2; DeepSeek-V2, 2.1.2 for groups; the released routers of each model.
    """
    if routing.scoring_func == "sparsemixer":
        return _sparsemixer(logits_ME, 2 * _epsilon(routing))
    ranked_ME, group_margin_M = _keep_best_groups(_ranked(logits_ME, scores_ME, bias_E, routing), routing)
    order_ME = torch.argsort(ranked_ME, dim=-1, descending=True, stable=True)
    ids_MK = order_ME[:, : routing.top_k]
    if routing.score_after_topk:
        weights_MK = score(logits_ME.gather(1, ids_MK), routing)
    else:
        weights_MK = scores_ME.gather(1, ids_MK)  # unbiased: the bias chooses, it does not weigh
    margin_M = torch.minimum(_gap(ranked_ME.gather(1, order_ME), routing.top_k), group_margin_M)
    return Choice(ids_MK, renormalize(weights_MK, routing), margin_M)


def rank_scores(logits_ME: Tensor, scores_ME: Tensor, bias_E: Tensor | None, routing: Routing) -> Tensor:
    """What the choice compares, [M, E]: biased scores, dropped groups filled."""
    return _keep_best_groups(_ranked(logits_ME, scores_ME, bias_E, routing), routing)[0]


def _ranked(logits_ME: Tensor, scores_ME: Tensor, bias_E: Tensor | None, routing: Routing) -> Tensor:
    ranked_ME = logits_ME if routing.score_after_topk else scores_ME
    return ranked_ME if bias_E is None else ranked_ME + bias_E


def _keep_best_groups(ranked_ME: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Put the experts of all but the best topk_group groups at group_fill; -inf, since 0 would beat a negative score."""
    if routing.n_group == 1:
        return ranked_ME, ranked_ME.new_full((ranked_ME.shape[0],), math.inf)
    grouped_MGE = ranked_ME.unflatten(1, (routing.n_group, -1))
    best = 1 if routing.group_score == "max" else 2
    group_scores_MG = grouped_MGE.topk(best, -1).values.sum(-1)
    order_MG = torch.argsort(group_scores_MG, dim=-1, descending=True, stable=True)
    kept_MG = torch.zeros_like(group_scores_MG, dtype=torch.bool).scatter(1, order_MG[:, : routing.topk_group], True)
    filled_MGE = grouped_MGE.masked_fill(~kept_MG[:, :, None], routing.group_fill)
    return filled_MGE.flatten(1), _gap(group_scores_MG.gather(1, order_MG), routing.topk_group)


def _gap(descending: Tensor, kept: int) -> Tensor:
    if kept == descending.shape[1]:
        return descending.new_full((descending.shape[0],), math.inf)
    gap = descending[:, kept - 1] - descending[:, kept]
    return torch.nan_to_num(gap, nan=math.inf, posinf=math.inf)


def renormalize(weights_MK: Tensor, routing: Routing) -> Tensor:
    """Divide the K weights of a token by their sum, with the model's own guard against a sum of 0."""
    if not routing.renormalize:
        return weights_MK
    total_M1, epsilon = weights_MK.sum(-1, keepdim=True), routing.renormalize_epsilon
    return weights_MK / (total_M1 + epsilon if routing.renormalize_rule == "add" else total_M1.clamp(min=epsilon))


def _sparsemixer(logits_ME: Tensor, width: float) -> Choice:
    """Pick the best logit, then the best of the rest; each weight is a softmax over the logits close to its pick.

    Close: (best - l) / max(|l|, best) <= width. Source: SparseMixer-v2 (arXiv 2409.12136) as PhiMoE runs it in inference.
    """
    picks, chances, margins = [], [], []
    left_ME = logits_ME
    for _ in range(2):
        best_M1, pick_M1 = left_ME.max(-1, keepdim=True)
        distance_ME = (best_M1 - logits_ME) / torch.maximum(logits_ME.abs(), best_M1)
        close_ME = left_ME.masked_fill(distance_ME > width, -math.inf)
        picks.append(pick_M1)
        chances.append(torch.softmax(close_ME, -1).gather(1, pick_M1))
        margins.append(_gap(left_ME.sort(-1, descending=True).values, 1))
        edge_ME = (distance_ME - width).abs() * torch.maximum(
            logits_ME.abs(), best_M1
        )  # how near a logit is to the mask
        margins.append(edge_ME.masked_fill(left_ME == -math.inf, math.inf).amin(-1))
        left_ME = left_ME.scatter(1, pick_M1, -math.inf)
    return Choice(torch.cat(picks, 1), torch.cat(chances, 1), torch.stack(margins).amin(0))


def _epsilon(routing: Routing) -> float:
    assert routing.sparsemixer_epsilon is not None  # Routing refuses the combination
    return routing.sparsemixer_epsilon


def routed_experts(
    x_ML: Tensor,
    weights: Mapping[str, Tensor],
    topk_ids_MK: Tensor,
    topk_weights_MK: Tensor,
    routing: Routing,
    experts: Experts,
) -> Tensor:
    """Sum weight_e * expert_e(x) over the chosen experts: R in the experts' own width [M, L], without s.

    A slot t is one token in one expert, T = M * K of them; they are sorted by expert, so that each expert is read once.
    Zero experts have no weights and no part in R.
    """
    expert_T, order_T = topk_ids_MK.flatten().sort()
    if routing.num_zero_experts:
        real_T = expert_T < routing.num_experts
        expert_T, order_T = expert_T[real_T], order_T[real_T]
    token_T, weight_T1 = order_T // topk_ids_MK.shape[1], topk_weights_MK.flatten()[order_T, None]
    x_TL = x_ML[token_T] * weight_T1 if routing.weight_on == "input" else x_ML[token_T]
    h_TN = _each_expert(x_TL, expert_T, weights["w13"].mT if experts.transposed else weights["w13"])
    if experts.bias:
        h_TN = h_TN + weights["b13"][expert_T]
    a_TI = activate(*_halves(h_TN, experts), experts.activation)
    y_TL = _each_expert(a_TI, expert_T, weights["w2"].mT if experts.transposed else weights["w2"])
    if experts.bias:
        y_TL = y_TL + weights["b2"][expert_T]
    y_TL = y_TL if routing.weight_on == "input" else y_TL * weight_T1
    return torch.zeros_like(x_ML).index_add(0, token_T, y_TL)


def _each_expert(rows_T: Tensor, expert_T: Tensor, matrices_E: Tensor) -> Tensor:
    """Multiply each row by the matrix of its expert; rows of one expert stand together."""
    ids, counts = expert_T.unique_consecutive(return_counts=True)
    runs = zip(ids.tolist(), rows_T.split(counts.tolist()), strict=True)
    products = [rows @ matrices_E[e].double().T for e, rows in runs]
    return torch.cat(products) if products else rows_T.new_zeros(0, matrices_E.shape[1])


def _halves(h: Tensor, experts: Experts) -> tuple[Tensor, Tensor | None]:
    if not experts.activation.gated:
        return h, None
    if experts.layout == "interleaved":
        return h[:, 0::2], h[:, 1::2]
    gate, up = h.chunk(2, -1)
    return gate, up


def activate(gate: Tensor, up: Tensor | None, rule: Activation) -> Tensor:
    """The activation of an expert: act(gate) * (up + up_offset), clamped where the model clamps it."""
    if rule.clamp == "before" and rule.limit is not None and up is not None:
        gate, up = gate.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
    match rule.kind:
        case "silu":
            act = gate * torch.sigmoid(rule.alpha * gate)
        case "gelu":
            act = torch.nn.functional.gelu(gate)
        case "gelu_tanh":
            act = torch.nn.functional.gelu(gate, approximate="tanh")
        case "relu2":
            act = gate.relu().square()
    if rule.clamp == "after" and rule.limit is not None and up is not None:
        act, up = act.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
    return act if up is None else act * (up + rule.up_offset)


def shared_experts(x_MH: Tensor, weights: Mapping[str, Tensor], shared: Shared) -> Tensor:
    """S: one MLP over the untransformed token, gated by a sigmoid of its own where the model has one."""
    h = x_MH @ weights["shared_w13"].double().T
    if shared.bias:
        h = h + weights["shared_b13"]
    gate, up = h.chunk(2, -1) if shared.activation.gated else (h, None)
    y_MH = activate(gate, up, shared.activation) @ weights["shared_w2"].double().T
    if shared.bias:
        y_MH = y_MH + weights["shared_b2"]
    return y_MH * torch.sigmoid(x_MH @ weights["shared_gate"].T) if shared.sigmoid_gate else y_MH


def _rows(choice: Choice | None, rows: Tensor) -> Choice | None:
    if choice is None:
        return None
    return Choice(choice.topk_ids_MK[rows], choice.topk_weights_MK[rows], choice.margin_M[rows])


def _check_shapes(spec: MoESpec, weights: Mapping[str, Tensor], x_MH: Tensor, is_vision_M: Tensor | None) -> None:
    wrong = [
        f"{name}: expected {list(shape)}, got {list(weights[name].shape) if name in weights else 'nothing'}"
        for name, shape in weight_shapes(spec).items()
        if name not in weights or tuple(weights[name].shape) != shape
    ]
    if x_MH.dim() != 2 or x_MH.shape[1] != spec.hidden_size:
        wrong.append(f"hidden_states: expected [M, {spec.hidden_size}], got {list(x_MH.shape)}")
    if (spec.vision is not None) != (is_vision_M is not None):
        wrong.append("is_vision_M: needed exactly if the spec has a vision branch")
    if wrong:
        raise SpecError("; ".join(wrong))
