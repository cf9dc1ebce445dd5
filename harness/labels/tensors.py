"""The numbers of a labelled layer: products of powers of two and small integers, exact in every dtype.

What a rule adds or multiplies is taken out again elsewhere, so that the rule left out shows: a router bias raises a
logit that the token had lowered, half of the saturated gate comes from b13, the latent projections double and halve.
E experts, I intermediate rows, H hidden (and latent) width, M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.labels.columns import CONST, GATE, LABEL, ROUTER, Labels
from harness.labels.plan import HIGH, Visit, visits
from harness.weights import Tokens
from reference.spec import Activation, Experts, MoESpec, Routing, Shared, VisionBranch, weight_shapes

# act(SATURATED) == SATURATED in every dtype, float64 included, for silu and both kinds of gelu
SATURATED = 64.0
_BIAS_SPREAD = 2.0**-6  # less than any two scores are apart that logits set apart


def make_weights(labels: Labels, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of `weight_shapes(labels.spec)` as rank 0 gets them."""
    spec = labels.spec
    made: dict[str, Tensor] = {}
    branches: tuple[tuple[str, MoESpec | VisionBranch | None], ...] = (("", spec), ("vision_", spec.vision))
    for prefix, branch in branches:
        if branch is not None:
            made |= {prefix + name: t for name, t in _branch(labels, prefix, branch.routing, branch.experts).items()}
    if spec.experts.latent_bias:
        made["fc2_latent_bias"] = _one_hot(labels, "fc2_latent_bias", torch.ones(1, 1))[0, :, 0]
    if spec.shared is not None:
        made |= _shared(labels, spec.shared)
    stored = {}
    for name, shape in weight_shapes(spec).items():
        assert made[name].shape == shape, f"{name}: {tuple(made[name].shape)} for {shape}"
        stored[name] = made[name] if name.endswith("e_score_correction_bias") else made[name].to(dtype)
    return stored


def weights_of(labels: Labels, weights: Mapping[str, Tensor], rank: int) -> Mapping[str, Tensor]:
    """What a rank gets: its own copy of every tensor that ranks hold in copy, one column further for each rank."""
    copied = {block.tensor for block in labels.blocks if block.copied}
    if rank == 0 or not copied:
        return weights
    return {name: tensor.roll(rank, -1) if name in copied else tensor for name, tensor in weights.items()}


def fold(labels: Labels, output_MH: Tensor) -> Tensor:
    """The copies of each bias added up in the column of the first: whose copy is added is free, how often is not."""
    folded_MH = output_MH
    for block in labels.blocks:
        if block.copied and block.each > 1:
            copies = folded_MH[:, block.first : block.stop].unflatten(1, (block.count, block.each))
            sums = torch.zeros_like(copies)
            sums[..., 0] = copies.sum(-1)
            folded_MH = torch.cat([folded_MH[:, : block.first], sums.flatten(1), folded_MH[:, block.stop :]], 1)
    return folded_MH


def make_tokens(labels: Labels, dp: int, dtype: torch.dtype) -> Tokens:
    """The planned tokens once for each data-parallel rank, each time in another order and with other labels."""
    spec = labels.spec
    routings = [spec.routing] if spec.vision is None else [spec.routing, spec.vision.routing]
    planned = [(branch, visit) for branch, routing in enumerate(routings) for visit in visits(routing)]
    rows, images = [], []
    for group in range(dp):
        turned = planned[group % len(planned) :] + planned[: group % len(planned)]
        for number, (branch, visit) in enumerate(turned):
            rows.append(_row(labels, routings[branch], visit, number + group))
            images.append(branch == 1)
    x_MH = torch.stack(rows).to(dtype)
    return Tokens(x_MH, None if spec.vision is None else torch.tensor(images))


def token_label(experts: Experts, number: int) -> float:
    """1, 2, 4 in turn; 1, 3, 7 where a bias of 1 raises it on its way."""
    label = 2.0 ** (number % 3)
    return 2 * label - 1 if experts.bias or experts.latent_bias else label


def _row(labels: Labels, routing: Routing, visit: Visit, number: int) -> Tensor:
    x_H = torch.zeros(labels.spec.hidden_size)
    x_H[CONST], x_H[LABEL] = 1.0, token_label(labels.spec.experts, number)
    x_H[GATE] = HIGH if number % 2 else 0.0
    x_H[ROUTER : ROUTER + routing.num_logits] = torch.tensor(visit.logits)
    if routing.router_bias:
        x_H[ROUTER : ROUTER + routing.num_logits] -= _router_bias(routing)
    return x_H


def _router_bias(routing: Routing) -> Tensor:
    return torch.tensor([(4.0, 0.0, -4.0)[e % 3] for e in range(routing.num_logits)])


def _correction_bias(routing: Routing) -> Tensor:
    """Distinct and all far below 0, in an order of their own; the steps are lost in bf16."""
    count = routing.num_logits
    places = sorted(range(count), key=lambda e: (e * 5 + 3) % 7 * count + e)
    bias_E = torch.zeros(count)
    bias_E[torch.tensor(places)] = torch.arange(count) * (_BIAS_SPREAD / 2 ** (count - 1).bit_length())
    return bias_E - 2.0


def _branch(labels: Labels, prefix: str, routing: Routing, experts: Experts) -> dict[str, Tensor]:
    hidden, latent = labels.spec.hidden_size, experts.latent_size is not None
    raised = 2.0 if latent else 1.0  # what the latent input projection makes of a column
    count, width = routing.num_experts, experts.intermediate_size
    router_EH = torch.zeros(routing.num_logits, hidden)
    router_EH[:, ROUTER : ROUTER + routing.num_logits] = torch.eye(routing.num_logits)
    made = {"router_weight": router_EH}
    if routing.router_bias:
        made["router_bias"] = _router_bias(routing)
    if routing.router_norm_epsilon is not None:
        made["router_scale"] = torch.full((hidden,), 256.0)
    if routing.correction_bias:
        made["e_score_correction_bias"] = _correction_bias(routing)
    if routing.per_expert_scale:
        made["per_expert_scale"] = torch.tensor([(1.0, 2.0, 0.5)[e % 3] for e in range(count)])
    step_EI = _steps(count, width, experts.activation)
    w13_EnH, b13_En, value = _first_product(step_EI, hidden, experts.activation, experts.bias, raised)
    w2_EHI = _one_hot(labels, f"{prefix}w2", raised / (value * _power(step_EI, experts.activation)))
    if experts.layout == "interleaved":
        w13_EnH, b13_En = _interleaved(w13_EnH), _interleaved(b13_En)
    made["w13"] = w13_EnH.mT.contiguous() if experts.transposed else w13_EnH
    made["w2"] = w2_EHI.mT.contiguous() if experts.transposed else w2_EHI
    if experts.bias:
        made["b13"] = b13_En
        made["b2"] = _one_hot(labels, f"{prefix}b2", torch.full((count, 1), raised))[..., 0]
    if latent:
        made |= {"fc1_latent": 2 * torch.eye(hidden), "fc2_latent": torch.eye(hidden) / 2}
        if experts.latent_bias:  # the second half of the constant comes from the bias, and so does 1 of the label
            for column in (CONST, LABEL):
                made["fc1_latent"][column, column] = 1.0
            made["fc1_latent_bias"] = torch.eye(hidden)[CONST] + torch.eye(hidden)[LABEL]
    return made


def _steps(count: int, width: int, rule: Activation) -> Tensor:
    """[E, I]: what tells the rows of an expert and neighbouring experts apart; w13 multiplies by it, w2 divides."""
    kinds = 2 if rule.kind == "relu2" else 4  # squares have to stay within fp16
    return 2.0 ** ((torch.arange(count)[:, None] + torch.arange(width)) % kinds)


def _first_product(
    step_EI: Tensor, hidden: int, rule: Activation, bias: bool, raised: float
) -> tuple[Tensor, Tensor, float]:
    """w13 [E, n, H] and b13 [E, n], gate rows first, and what a row's activation is for label 1 and step 1, about."""
    count, width = step_EI.shape
    half = 2.0 if bias else 1.0
    label_EIH, const_EIH = torch.zeros(count, width, hidden), torch.zeros(count, width, hidden)
    if not rule.gated:
        start = 4.0 if rule.kind == "relu2" else SATURATED
        label_EIH[..., LABEL] = start * step_EI / raised
        return label_EIH, start * step_EI, start**2 if rule.kind == "relu2" else start
    label_EIH[..., LABEL] = step_EI / raised
    const_EIH[..., CONST] = SATURATED / half / raised
    b13_En = torch.cat([torch.full_like(step_EI, SATURATED / half), step_EI], 1)
    return torch.cat([const_EIH, label_EIH], 1), b13_En, 8.0 if rule.clamp != "none" else SATURATED


def _power(step: Tensor, rule: Activation) -> Tensor:
    return step.square() if not rule.gated and rule.kind == "relu2" else step


def _interleaved(halved_En: Tensor) -> Tensor:
    gate, up = halved_En.chunk(2, 1)
    return torch.stack([gate, up], 2).flatten(1, 2)


def _shared(labels: Labels, shared: Shared) -> dict[str, Tensor]:
    hidden = labels.spec.hidden_size
    step_1I = _steps(1, shared.intermediate_size, shared.activation)
    w13_1nH, b13_1n, value = _first_product(step_1I, hidden, shared.activation, shared.bias, 1.0)
    w2_1HI = _one_hot(labels, "shared_w2", 1 / (value * _power(step_1I, shared.activation)))
    made = {"shared_w13": w13_1nH[0], "shared_w2": w2_1HI[0]}
    if shared.bias:
        made["shared_b13"] = b13_1n[0]
        made["shared_b2"] = _one_hot(labels, "shared_b2", torch.ones(1, 1))[0, :, 0]
    if shared.sigmoid_gate:
        gate_1H = torch.zeros(1, hidden)
        gate_1H[0, GATE] = 1.0
        made["shared_gate"] = gate_1H
    return made


def _one_hot(labels: Labels, tensor: str, value_EI: Tensor) -> Tensor:
    """[E, H, I]: value [e, i] in the column that (e, i) owns, 0 elsewhere. Of copies, the first rank's."""
    block = labels.block(tensor)
    count, width = value_EI.shape
    placed_EHI = torch.zeros(count, labels.spec.hidden_size, width)
    e, i = torch.meshgrid(torch.arange(count), torch.arange(width), indexing="ij")
    placed_EHI[e, block.first + e * block.each + i, i] = value_EI
    return placed_EHI
