"""The gate and the routers: hidden states -> logits -> top-k weights (fp32 [M, K]) and ids ([M, K]).

M tokens, H hidden, E experts (zero experts included), K top-k, G groups. Scores are computed in fp32 whatever the
dtype of the logits. Order within a row is not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from harness.runner.precision import wide
from reference.spec import Routing


class FusedMoERouter(Protocol):
    """scales: whether this router is able to fold s into its weights."""

    @property
    def scales(self) -> bool: ...

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        """Weights fp32 [M, K] and global expert ids int64 [M, K]."""


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """The router's projection. weight [E, H]; logits in fp32 or in the dtype of the layer, as the model keeps them."""

    weight_EH: Tensor
    bias_E: Tensor | None
    scale_H: Tensor | None
    norm_epsilon: float | None
    logits_in_fp32: bool

    def __call__(self, x_MH: Tensor) -> Tensor:
        if self.norm_epsilon is not None and self.scale_H is not None:
            wide_MH = wide(x_MH)
            wide_MH = wide_MH * torch.rsqrt(wide_MH.square().mean(-1, keepdim=True) + self.norm_epsilon)
            x_MH = (wide_MH * wide(self.scale_H) * x_MH.shape[-1] ** -0.5).to(x_MH.dtype)
        if self.logits_in_fp32:
            bias_E = None if self.bias_E is None else wide(self.bias_E)
            return functional.linear(wide(x_MH), wide(self.weight_EH), bias_E)
        return functional.linear(x_MH, self.weight_EH, self.bias_E)


@dataclass(frozen=True, slots=True, eq=False)
class FusedTopKRouter:
    """Scores over all experts, the K best of them, renormalised or not. Has no place for s."""

    routing: Routing
    scales: ClassVar[bool] = False

    def scores(self, router_logits_ME: Tensor) -> Tensor:
        return _scores(router_logits_ME, self.routing)

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        weights_MK, ids_MK = self.scores(router_logits_ME).topk(self.routing.top_k, -1)
        return _renormalize(weights_MK, self.routing), ids_MK


@dataclass(frozen=True, slots=True, eq=False)
class FusedTopKBiasRouter:
    """The K best of score + bias, weighted by the scores without the bias, times s after renormalising."""

    routing: Routing
    bias_E: Tensor
    scale: float
    scales: ClassVar[bool] = True

    def scores(self, router_logits_ME: Tensor) -> Tensor:
        return _scores(router_logits_ME, self.routing)

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        scores_ME = self.scores(router_logits_ME)
        ids_MK = (scores_ME + self.bias_E).topk(self.routing.top_k, -1).indices
        weights_MK = scores_ME.gather(1, ids_MK)
        return _scaled(_renormalize(weights_MK, self.routing), self.scale), ids_MK


@dataclass(frozen=True, slots=True, eq=False)
class GroupedTopKRouter:
    """Only experts of the best groups: by their two best biased scores, or by their best score without a bias."""

    routing: Routing
    bias_E: Tensor | None
    scale: float
    scales: ClassVar[bool] = True

    def scores(self, router_logits_ME: Tensor) -> Tensor:
        return _scores(router_logits_ME, self.routing)

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        rule = self.routing
        scores_ME = self.scores(router_logits_ME)
        ranked_ME = scores_ME if self.bias_E is None else scores_ME + self.bias_E
        ranked_MGE = ranked_ME.view(*ranked_ME.shape[:-1], rule.n_group, ranked_ME.shape[-1] // rule.n_group)
        best = 2 if rule.group_score == "top2" else 1
        group_MG = ranked_MGE.topk(best, -1).values.sum(-1)
        kept_MG = torch.zeros_like(group_MG, dtype=torch.bool)
        kept_MG.scatter_(1, group_MG.topk(rule.topk_group, -1).indices, True)
        # -inf and not 0: biased scores may all be negative, and 0 would win
        ranked_ME = ranked_MGE.masked_fill(~kept_MG[:, :, None], float("-inf")).flatten(1)
        ids_MK = ranked_ME.topk(rule.top_k, -1).indices
        weights_MK = scores_ME.gather(1, ids_MK)
        return _scaled(_renormalize(weights_MK, rule), self.scale), ids_MK


@dataclass(frozen=True, slots=True, eq=False)
class CustomRoutingRouter:
    """A model's own function of (logits, routing) -> (weights, ids). Nobody can tell whether it would scale: it does not."""

    routing: Routing
    function: Callable[[Tensor, Routing], tuple[Tensor, Tensor]]
    per_expert_scale_E: Tensor | None
    scales: ClassVar[bool] = False

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        weights_MK, ids_MK = self.function(wide(router_logits_ME), self.routing)
        weights_MK = _renormalize(weights_MK, self.routing)
        if self.per_expert_scale_E is not None:
            weights_MK = weights_MK * wide(self.per_expert_scale_E)[ids_MK]
        return weights_MK, ids_MK


@dataclass(frozen=True, slots=True, eq=False)
class ZeroExpertRouter:
    """Routes over real and zero experts; `split` takes the zero experts' part out before the kernel sees it."""

    inner: FusedMoERouter
    num_experts: int
    scales: ClassVar[bool] = True

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.select_experts(router_logits_ME)

    def split(self, x_MH: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Z [M, H] in fp32, and weights and ids for the kernel: a zero expert becomes id -1, which no kernel runs."""
        zero_MK = ids_MK >= self.num_experts
        zero_MH = (weights_MK * zero_MK).sum(-1, keepdim=True) * wide(x_MH)
        return zero_MH, weights_MK.masked_fill(zero_MK, 0.0), ids_MK.masked_fill(zero_MK, -1)


@dataclass(frozen=True, slots=True, eq=False)
class SharedSlotsRouter:
    """Another router's choice and, behind it, one slot for each shared expert: always chosen, with a constant weight.

    Appended after renormalising, so that the routed weights do not change. Source: `fuse_shared_experts` of vLLM.
    first: id of the first shared expert.    weight: 1, or 1/s where s is applied later, to the sum.
    """

    inner: FusedMoERouter
    first: int
    count: int
    weight: float

    @property
    def scales(self) -> bool:
        return self.inner.scales

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        weights_MK, ids_MK = self.inner.select_experts(router_logits_ME)
        rows = weights_MK.shape[0]
        ids_S = torch.arange(self.first, self.first + self.count, dtype=ids_MK.dtype)
        weights_MK = torch.cat([weights_MK, weights_MK.new_full((rows, self.count), self.weight)], 1)
        return weights_MK, torch.cat([ids_MK, ids_S.expand(rows, -1)], 1)


def make_router(
    routing: Routing, bias_E: Tensor | None, per_expert_scale_E: Tensor | None, scale: float
) -> FusedMoERouter:
    """The first router that fits: zero expert, grouped, custom, biased, plain. scale is s if the router is to fold it, else 1.

    bias_E: float32 [E] or None.    Raises ValueError where no router follows the rule, instead of dropping part of it.
    """
    if bias_E is not None and bias_E.dtype != torch.float32:
        raise ValueError(f"e_score_correction_bias is {bias_E.dtype}: expected float32, bf16 would change the choice")
    router: FusedMoERouter
    function = _custom_function(routing)
    if routing.n_group > 1:
        if function is not None or per_expert_scale_E is not None:
            raise ValueError(
                f"n_group={routing.n_group} with a custom routing function: grouped routing has no place for it"
            )
        router = GroupedTopKRouter(routing, bias_E, scale)
    elif function is not None or per_expert_scale_E is not None:
        if bias_E is not None:
            raise ValueError("a custom routing function with a correction bias: the function would drop the bias")
        router = CustomRoutingRouter(routing, function or _softmax_top_k, per_expert_scale_E)
    elif bias_E is not None:
        router = FusedTopKBiasRouter(routing, bias_E, scale)
    else:
        router = FusedTopKRouter(routing)
    if routing.num_zero_experts == 0:
        return router
    if bias_E is None:
        raise ValueError("zero experts need an e_score_correction_bias: their router is the biased one")
    return ZeroExpertRouter(router, routing.num_experts)


def _custom_function(routing: Routing) -> Callable[[Tensor, Routing], tuple[Tensor, Tensor]] | None:
    if routing.scoring_func == "sparsemixer":
        return _sparsemixer
    if routing.score_after_topk:
        return _score_after_top_k
    return None


def _softmax_top_k(logits_ME: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    weights_MK, ids_MK = _scores(logits_ME, routing).topk(routing.top_k, -1)
    return weights_MK, ids_MK


def _score_after_top_k(logits_ME: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    picked_MK, ids_MK = logits_ME.topk(routing.top_k, -1)
    return _scores(picked_MK, routing), ids_MK


def _sparsemixer(logits_ME: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """PhiMoE: two picks, each weighted by a softmax over the logits within a relative distance of it."""
    reach = 2 * (routing.sparsemixer_epsilon or 0.0)
    # in a row of -inf alone, the first pick could not be told from the rest and would be picked again
    logits_ME = logits_ME.clamp(min=torch.finfo(logits_ME.dtype).min)
    first_M1, id1_M1 = logits_ME.max(-1, keepdim=True)
    near_ME = (first_M1 - logits_ME) / logits_ME.abs().clamp(min=first_M1) <= reach
    weight1_M1 = logits_ME.masked_fill(~near_ME, float("-inf")).softmax(-1).gather(1, id1_M1)
    rest_ME = logits_ME.scatter(1, id1_M1, float("-inf"))
    second_M1, id2_M1 = rest_ME.max(-1, keepdim=True)
    near_ME = (second_M1 - logits_ME) / logits_ME.abs().clamp(min=second_M1) <= reach
    weight2_M1 = rest_ME.masked_fill(~near_ME, float("-inf")).softmax(-1).gather(1, id2_M1)
    return torch.cat((weight1_M1, weight2_M1), 1), torch.cat((id1_M1, id2_M1), 1)


def _scores(logits: Tensor, routing: Routing) -> Tensor:
    logits = wide(logits)
    if routing.scoring_func == "softmax":
        return logits.softmax(-1)
    if routing.scoring_func == "sigmoid":
        return logits.sigmoid()
    return functional.softplus(logits).sqrt()


def _renormalize(weights_MK: Tensor, routing: Routing) -> Tensor:
    if not routing.renormalize:
        return weights_MK
    total_M1 = weights_MK.sum(-1, keepdim=True)
    if routing.renormalize_rule == "clamp":
        total_M1 = total_M1.clamp(min=routing.renormalize_epsilon)
    else:
        total_M1 = total_M1 + routing.renormalize_epsilon
    if routing.renormalize_epsilon == 0.0:  # scores that are all 0 then keep their 0, as in vLLM's CUDA kernels
        total_M1 = total_M1.masked_fill(total_M1 == 0.0, 1.0)
    return weights_MK / total_M1


def _scaled(weights_MK: Tensor, scale: float) -> Tensor:
    return weights_MK if scale == 1.0 else weights_MK * scale
