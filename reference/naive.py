"""The yardstick: two plain runs of the layer in its own dtype, with the rounding points of an everyday implementation.

A layer under test may be about as wrong as these are. They follow the law from `spec.py` on their own and share no
arithmetic with `moe.py`: a slip in either then shows as an error far above rounding, in tests/test_naive.py.

Every product and sum is computed in float32 and rounded where a kernel stores its result, as one that accumulates in
float32 does. A float32 result of two bf16 or fp16 numbers rounds as if it were exact (24 >= 2 * 11 + 2 bits).

Names end in their shape: M tokens, H hidden, L latent (H without one), I intermediate, N rows of w13, E experts,
K top-k, R ranks. B batches of m rows: all experts with every token, or each of the M * K slots with its own one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from reference.moe import Stages
from reference.spec import Activation, Experts, MoESpec, RouterPrecision, Routing, Shared

Store = Callable[[Tensor], Tensor]


def naive(
    spec: MoESpec,
    weights: Mapping[str, Tensor],
    hidden_states_MH: Tensor,
    stages: Stages,
    tp: int,
    precision: RouterPrecision,
    is_vision_M: Tensor | None = None,
    *,
    shared_tp: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the layer twice in the dtype of hidden_states_MH; the larger error of the two, by row, is the yardstick.

    First run: one rank, experts summed in float32 and stored once, s applied to the routed output.
    Second run: tp ranks that share the experts' width; every intermediate result is stored in the dtype, experts are
    added one by one, ranks in their order; s is in the router's weights (but for weights on the input).

    weights, hidden_states_MH, is_vision_M: as for `forward`.    stages: its result, of which only topk_ids_MK is read,
    so that a near tie never makes the yardstick longer; nor does rounding decide about a sparsemixer's masks.
    tp: how many partial sums the routed experts are cut into; divides their widths.
    shared_tp: the same for the shared experts, tp by default; where it differs, each part is added up for itself.
    precision: where the router rounds.    Returns two [M, H] of the dtype; inf where the dtype overflows.
    """
    dtype = hidden_states_MH.dtype

    def store(t: Tensor) -> Tensor:
        return t if dtype == torch.float32 else t.to(dtype).float()

    with torch.inference_mode():
        weights = {name: tensor.float() for name, tensor in weights.items()}
        x_MH, ids_MK = hidden_states_MH.float(), stages.topk_ids_MK
        if spec.vision is None or is_vision_M is None:
            plain_MH, ranks_RMH = _branch(spec.routing, spec.experts, weights, x_MH, ids_MK, tp, precision, store)
        else:
            vision = {name.removeprefix("vision_"): t for name, t in weights.items() if name.startswith("vision_")}
            plain_MH, ranks_RMH = torch.empty_like(x_MH), x_MH.new_empty(tp, *x_MH.shape)
            for rows_M, branch, named in ((~is_vision_M, spec, weights), (is_vision_M, spec.vision, vision)):
                plain_MH[rows_M], ranks_RMH[:, rows_M] = _branch(
                    branch.routing, branch.experts, named, x_MH[rows_M], ids_MK[rows_M], tp, precision, store
                )
        plain_MH = store(plain_MH * spec.scale)
        if spec.experts.latent_bias:
            plain_MH = store(plain_MH + weights["fc2_latent_bias"])
        if spec.shared is not None:
            shared_MH, shared_RMH = _shared(x_MH, weights, spec.shared, shared_tp or tp, store)
            plain_MH = store(plain_MH + shared_MH)
            if len(shared_RMH) == len(ranks_RMH):
                ranks_RMH = store(ranks_RMH + shared_RMH)
            else:
                ranks_RMH = torch.stack([_add_in_order(part_RMH, store) for part_RMH in (ranks_RMH, shared_RMH)])
        split_MH = _add_in_order(ranks_RMH, store)
        if spec.experts.latent_bias:
            split_MH = store(split_MH + weights["fc2_latent_bias"])
        share = spec.output.share
        return (plain_MH * share).to(dtype), (split_MH * share).to(dtype)


def _branch(
    routing: Routing,
    experts: Experts,
    weights: Mapping[str, Tensor],
    x_MH: Tensor,
    ids_MK: Tensor,
    tp: int,
    precision: RouterPrecision,
    store: Store,
) -> tuple[Tensor, Tensor]:
    """R + Z of both runs: [M, H] without s, and the ranks' shares [R, M, H] with s, Z being on the first rank."""
    plain_MK = _router_weights(x_MH, weights, ids_MK, routing, precision, store)
    scaled_MK = plain_MK * routing.scale
    if precision.weights == "model":
        scaled_MK = store(scaled_MK)
    x_ML = x_MH
    if experts.latent_size is not None:
        x_ML = store(x_MH @ weights["fc1_latent"].T)
        x_ML = store(x_ML + weights["fc1_latent_bias"]) if experts.latent_bias else x_ML
    if routing.weight_on == "input":
        plain_KML, ranks_RKML = _routed(store(x_ML * plain_MK), weights, ids_MK, routing, experts, tp, store)
        ranks_RKML = store(ranks_RKML * routing.scale)  # an expert is not linear: s cannot ride on its input
    else:
        plain_KML, ranks_RKML = _routed(x_ML, weights, ids_MK, routing, experts, tp, store)
        plain_KML, ranks_RKML = store(plain_KML * plain_MK.T[..., None]), store(ranks_RKML * scaled_MK.T[..., None])
    plain_MH, ranks_RMH = store(plain_KML.sum(0)), _add_in_order(ranks_RKML.unbind(1), store)
    if experts.latent_size is not None:
        plain_MH, ranks_RMH = store(plain_MH @ weights["fc2_latent"].T), store(ranks_RMH @ weights["fc2_latent"].T)
    if routing.num_zero_experts:
        zero_MK = ids_MK >= routing.num_experts
        plain_MH = store(plain_MH + store((plain_MK * zero_MK).sum(1, keepdim=True) * x_MH))
        ranks_RMH[0] = store(ranks_RMH[0] + store((scaled_MK * zero_MK).sum(1, keepdim=True) * x_MH))
    return plain_MH, ranks_RMH


def _router_weights(
    x_MH: Tensor,
    weights: Mapping[str, Tensor],
    ids_MK: Tensor,
    routing: Routing,
    precision: RouterPrecision,
    store: Store,
) -> Tensor:
    """The weights of the given experts, float32 [M, K], without s, rounded where the released router rounds."""

    def as_stored(t: Tensor, where: str) -> Tensor:
        return store(t) if where == "model" else t

    if routing.router_norm_epsilon is not None:
        x_MH = x_MH * torch.rsqrt(x_MH.square().mean(-1, keepdim=True) + routing.router_norm_epsilon)
        x_MH = as_stored(x_MH * weights["router_scale"] * x_MH.shape[1] ** -0.5, precision.logits)
    exact_ME = x_MH @ weights["router_weight"].T
    logits_ME = as_stored(exact_ME, precision.logits)
    if routing.router_bias:
        exact_ME = exact_ME + weights["router_bias"]
        logits_ME = as_stored(logits_ME + weights["router_bias"], precision.logits)
    if routing.scoring_func == "sparsemixer":
        weights_MK = _two_softmaxes(logits_ME, _far_from_picks(exact_ME, ids_MK, routing), ids_MK)
    elif routing.score_after_topk:
        weights_MK = _score(logits_ME.gather(1, ids_MK), routing)
    else:
        weights_MK = _score(logits_ME, routing).gather(1, ids_MK)
    weights_MK = as_stored(weights_MK, precision.scores)
    if routing.renormalize:
        total_M1 = as_stored(weights_MK.sum(-1, keepdim=True), precision.weights)
        epsilon = routing.renormalize_epsilon
        weights_MK = weights_MK / (total_M1 + epsilon if routing.renormalize_rule == "add" else total_M1.clamp(epsilon))
    weights_MK = as_stored(weights_MK, precision.weights)
    if routing.per_expert_scale:
        real_MK = ids_MK.clamp(max=routing.num_experts - 1)
        weights_MK = as_stored(weights_MK * weights["per_expert_scale"][real_MK], precision.weights)
    return weights_MK


def _score(logits: Tensor, routing: Routing) -> Tensor:
    if routing.scoring_func == "softmax":
        return torch.softmax(logits, -1)
    return torch.sigmoid(logits) if routing.scoring_func == "sigmoid" else functional.softplus(logits).sqrt()


def _far_from_picks(logits_ME: Tensor, ids_MK: Tensor, routing: Routing) -> Tensor:
    """The sparsemixer's masks, bool [M, 2, E]: far from the pick, or the first pick in the second mask."""
    assert routing.sparsemixer_epsilon is not None  # Routing refuses the combination
    best_MK1, logits_M1E = logits_ME.gather(1, ids_MK)[..., None], logits_ME[:, None]
    far_MKE = (best_MK1 - logits_M1E) / torch.maximum(logits_M1E.abs(), best_MK1) > 2 * routing.sparsemixer_epsilon
    far_MKE[:, 1].scatter_(1, ids_MK[:, :1], True)
    return far_MKE


def _two_softmaxes(logits_ME: Tensor, far_MKE: Tensor, ids_MK: Tensor) -> Tensor:
    """Sparsemixer: each pick against the logits near it."""
    from_pick_MKE = logits_ME[:, None] - logits_ME.gather(1, ids_MK)[..., None]
    return 1 / from_pick_MKE.exp().masked_fill(far_MKE, 0.0).sum(-1)


def _routed(
    x_ML: Tensor,
    weights: Mapping[str, Tensor],
    ids_MK: Tensor,
    routing: Routing,
    experts: Experts,
    tp: int,
    store: Store,
) -> tuple[Tensor, Tensor]:
    """What each chosen expert returns, slot by slot: [K, M, L] of the whole width, [R, K, M, L] of the ranks' shares.

    Computes all experts for all tokens, or one expert a slot, whichever reads fewer weights.
    """
    tokens, top_k = ids_MK.shape
    slots_T = ids_MK.T.flatten().clamp(max=routing.num_experts - 1)  # a zero expert has no weights: masked below
    w13, w2, b13 = weights["w13"], weights["w2"], weights["b13"] if experts.bias else None
    if slots_T.numel() < routing.num_experts:
        w13, w2, b13 = w13[slots_T], w2[slots_T], None if b13 is None else b13[slots_T]
        x_BmL = x_ML.repeat(top_k, 1)[:, None]
        picked_T = torch.arange(slots_T.numel(), device=x_ML.device)
    else:
        x_BmL = x_ML.expand(routing.num_experts, -1, -1)
        picked_T = slots_T * tokens + torch.arange(tokens, device=x_ML.device).repeat(top_k)
    if experts.transposed:
        w13, w2 = w13.mT, w2.mT
    y_BmL, y_RBmL = _mlp(x_BmL, w13, b13, w2, experts.activation, experts.layout, tp, store)
    y_TL, y_RTL = y_BmL.flatten(0, 1).index_select(0, picked_T), y_RBmL.flatten(1, 2).index_select(1, picked_T)
    y_TL, y_RTL = _add_bias(y_TL, y_RTL, weights["b2"][slots_T] if experts.bias else None, store)
    if routing.num_zero_experts:
        zero_T1 = ids_MK.T.reshape(-1, 1) >= routing.num_experts
        y_TL, y_RTL = y_TL.masked_fill(zero_T1, 0.0), y_RTL.masked_fill(zero_T1, 0.0)
    width = x_ML.shape[1]
    return y_TL.view(top_k, tokens, width), y_RTL.view(tp, top_k, tokens, width)


def _mlp(
    x_BmL: Tensor, w13: Tensor, b13: Tensor | None, w2: Tensor, rule: Activation, layout: str, tp: int, store: Store
) -> tuple[Tensor, Tensor]:
    """B MLPs in both manners, without b2 and not stored: [B, m, L] of the whole width, [R, B, m, L] as tp shares."""
    h_BmN = store(torch.bmm(x_BmL, w13.mT))
    if b13 is not None:
        h_BmN = store(h_BmN + b13[:, None])
    if not rule.gated:
        gate, up = h_BmN, None
    elif layout == "interleaved":
        gate, up = h_BmN[..., 0::2], h_BmN[..., 1::2]
    else:
        gate, up = h_BmN.chunk(2, -1)
    act, up = _activate(gate, up, rule)
    whole_BmI = store(act if up is None else act * up)
    split_BmI = store(act) if up is None else store(store(act) * store(up))
    # the batch of the ranks' product is rank by rank, expert by expert: one call instead of one a rank
    batch, tokens, width = split_BmI.shape
    split_RBmi = split_BmI.reshape(batch, tokens, tp, width // tp).movedim(2, 0).flatten(0, 1)
    w2_RBLi = w2.reshape(batch, w2.shape[1], tp, width // tp).movedim(2, 0).flatten(0, 1)
    y_RBmL = torch.bmm(split_RBmi, w2_RBLi.mT).view(tp, batch, tokens, w2.shape[1])
    return torch.bmm(whole_BmI, w2.mT), y_RBmL


def _add_bias(y: Tensor, y_R: Tensor, b2: Tensor | None, store: Store) -> tuple[Tensor, Tensor]:
    """Store the second product with its bias, which only the first rank has and which it adds to what is stored."""
    y_R = store(y_R)
    if b2 is not None:
        y = y + b2
        y_R[0] = store(y_R[0] + b2)
    return store(y), y_R


def _activate(gate: Tensor, up: Tensor | None, rule: Activation) -> tuple[Tensor, Tensor | None]:
    """act(gate) and up, clamped and offset as the rule says, not yet multiplied."""
    if rule.clamp == "before" and rule.limit is not None and up is not None:
        gate, up = gate.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
    if rule.kind == "silu":
        act = functional.silu(gate) if rule.alpha == 1.0 else gate * torch.sigmoid(gate * rule.alpha)
    elif rule.kind == "relu2":
        act = gate.relu().square()
    else:
        act = functional.gelu(gate, approximate="tanh" if rule.kind == "gelu_tanh" else "none")
    if rule.clamp == "after" and rule.limit is not None and up is not None:
        act, up = act.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
    return act, up + rule.up_offset if up is not None and rule.up_offset else up


def _shared(
    x_MH: Tensor, weights: Mapping[str, Tensor], shared: Shared, tp: int, store: Store
) -> tuple[Tensor, Tensor]:
    """S of both runs, [M, H] and [R, M, H]: the MLP of one expert that every token visits."""
    b13_BN, b2_H = (weights["shared_b13"][None], weights["shared_b2"]) if shared.bias else (None, None)
    w13, w2 = weights["shared_w13"][None], weights["shared_w2"][None]
    y_BMH, y_RBMH = _mlp(x_MH[None], w13, b13_BN, w2, shared.activation, "halved", tp, store)
    y_MH, y_RMH = _add_bias(y_BMH[0], y_RBMH[:, 0], b2_H, store)
    if shared.sigmoid_gate:
        gate_M1 = store(torch.sigmoid(store(x_MH @ weights["shared_gate"].T)))
        y_MH, y_RMH = store(y_MH * gate_M1), store(y_RMH * gate_M1)
    return y_MH, y_RMH


def _add_in_order(terms: Tensor | tuple[Tensor, ...], store: Store) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = store(total + term)
    return total
