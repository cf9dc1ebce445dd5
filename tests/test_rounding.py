"""A layer of this file computes the law in every legal way: the analysis must accept all of them and little else."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from harness import models
from harness.weights import DTYPES, Tokens, make_tokens, make_weights
from reference import moe
from reference.moe import Stages, forward
from reference.naive import naive
from reference.rounding import RoundingErrors, analyse, router_error
from reference.spec import Activation, Experts, MoESpec, RouterPrecision, Routing

NAIVE_RATIO, DEVIATIONS = 2.5, 1.5  # the joint rule: a row is wrong beyond both


@dataclass(frozen=True, kw_only=True)
class Way:
    """One legal way to compute a layer. product: "blas", "chain" (one float32 sum from left to right) or "native"."""

    product: str
    inner_rounding: bool
    bias_apart: bool
    cast_weights: bool
    weight_before_store: bool
    scaled_in: str
    reversed_experts: bool
    experts_added_in_dtype: bool
    rank_order: tuple[int, ...]
    ranks_added_in_dtype: bool
    shared_reduced_apart: bool
    latent_reduced_first: bool

    @classmethod
    def drawn(cls, rng: random.Random, tp: int, chains: float = 0.1) -> Way:
        def coin() -> bool:
            return rng.random() < 0.5

        return cls(
            product="chain" if rng.random() < chains else rng.choice(("blas", "native")),
            inner_rounding=coin(),
            bias_apart=coin(),
            cast_weights=coin(),
            weight_before_store=coin(),
            scaled_in=rng.choice(("weights", "output")),
            reversed_experts=coin(),
            experts_added_in_dtype=coin(),
            rank_order=tuple(rng.sample(range(tp), tp)),
            ranks_added_in_dtype=coin(),
            shared_reduced_apart=coin(),
            latent_reduced_first=coin(),
        )


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer in one dtype and one way; weights holds float32 copies, louder multiplies one expert (a fault)."""

    spec: MoESpec
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    way: Way
    precision: RouterPrecision
    louder: tuple[int, float] = (0, 1.0)

    def store(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).float()

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        """x @ w.T in float32, [m, in] by [out, in]."""
        if self.way.product == "native":
            return (x.to(self.dtype) @ w.to(self.dtype).T).float()
        if self.way.product == "blas":
            return x @ w.T
        total = x.new_zeros(x.shape[0], w.shape[0])
        for column in range(x.shape[1]):
            total = total + x[:, column, None] * w[:, column]
        return total

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        y = self.product(x, w)
        if bias is None:
            return self.store(y)
        return self.store(self.store(y) + bias) if self.way.bias_apart else self.store(y + bias)

    def add_all(self, terms: list[Tensor], in_dtype: bool) -> Tensor:
        total = terms[0]
        for term in terms[1:]:
            total = self.store(total + term) if in_dtype else total + term
        return self.store(total)

    def __call__(self, tokens: Tokens, stages: Stages, tp: int) -> Tensor:
        spec, way = self.spec, self.way
        x_MH = tokens.hidden_states.float()
        routed_RMH, zero_MH = x_MH.new_zeros(tp, *x_MH.shape), torch.zeros_like(x_MH)
        is_vision_M = torch.zeros(len(x_MH), dtype=torch.bool) if tokens.is_vision is None else tokens.is_vision
        for rows, branch, prefix in ((~is_vision_M, spec, ""), (is_vision_M, spec.vision, "vision_")):
            if branch is not None and rows.any():
                named = {n.removeprefix(prefix): t for n, t in self.weights.items() if n.startswith(prefix)}
                routed_RMH[:, rows], zero_MH[rows] = self.branch(
                    x_MH[rows], named, stages.topk_ids_MK[rows], branch.routing, branch.experts, tp
                )
        if way.scaled_in == "output" or spec.routing.weight_on == "input":
            routed_RMH, zero_MH = self.store(routed_RMH * spec.scale), self.store(zero_MH * spec.scale)
        ranks = [routed_RMH[r] for r in way.rank_order]
        shared_RMH = self.shared(x_MH, tp) if spec.shared else None
        if shared_RMH is not None and not way.shared_reduced_apart:
            ranks = [self.store(routed_RMH[r] + shared_RMH[r]) for r in way.rank_order]
        y_MH = self.add_all(ranks, way.ranks_added_in_dtype)
        if spec.routing.num_zero_experts:
            y_MH = self.store(y_MH + zero_MH)
        if spec.experts.latent_bias:
            y_MH = self.store(y_MH + self.weights["fc2_latent_bias"])
        if shared_RMH is not None and way.shared_reduced_apart:
            y_MH = self.store(y_MH + self.add_all([shared_RMH[r] for r in way.rank_order], way.ranks_added_in_dtype))
        return (y_MH * spec.output.share).to(self.dtype)

    def branch(
        self, x_MH: Tensor, named: Mapping[str, Tensor], ids_MK: Tensor, routing: Routing, experts: Experts, tp: int
    ) -> tuple[Tensor, Tensor]:
        way, store = self.way, self.store
        weights_MK = self.router(x_MH, named, ids_MK, routing)
        if way.scaled_in == "weights" and routing.weight_on == "output":
            weights_MK = weights_MK * routing.scale
        if way.cast_weights or self.precision.weights == "model":
            weights_MK = store(weights_MK)
        x_ML = x_MH
        if experts.latent_size is not None:
            x_ML = self.linear(x_MH, named["fc1_latent"], named.get("fc1_latent_bias"))
        total_RML = x_ML.new_zeros(tp, *x_ML.shape)
        for e in sorted(set(ids_MK.flatten().tolist()), reverse=way.reversed_experts):
            if e >= routing.num_experts:
                continue
            rows, slots = (ids_MK == e).nonzero(as_tuple=True)
            weight_m1 = weights_MK[rows, slots, None] * (self.louder[1] if e == self.louder[0] else 1.0)
            x_mL = store(x_ML[rows] * weight_m1) if routing.weight_on == "input" else x_ML[rows]
            y_RmL = self.expert(x_mL, named, e, experts, tp)
            if routing.weight_on == "output":
                y_RmL = store((y_RmL if way.weight_before_store else store(y_RmL)) * weight_m1)
            sum_RmL = total_RML[:, rows] + store(y_RmL)
            total_RML[:, rows] = store(sum_RmL) if way.experts_added_in_dtype else sum_RmL
        routed_RMH = store(total_RML)
        if experts.latent_size is not None:
            if way.latent_reduced_first:
                routed_RMH[0] = self.add_all([routed_RMH[r] for r in way.rank_order], way.ranks_added_in_dtype)
                routed_RMH[1:] = 0.0
            routed_RMH = torch.stack([self.linear(share_ML, named["fc2_latent"], None) for share_ML in routed_RMH])
        zero_M1 = (weights_MK * (ids_MK >= routing.num_experts)).sum(1, keepdim=True)
        return routed_RMH, store(zero_M1 * x_MH)

    def router(self, x_MH: Tensor, named: Mapping[str, Tensor], ids_MK: Tensor, routing: Routing) -> Tensor:
        def at(t: Tensor, where: str) -> Tensor:
            return self.store(t) if where == "model" else t

        if routing.router_norm_epsilon is not None:
            x_MH = x_MH / (x_MH.square().mean(-1, keepdim=True) + routing.router_norm_epsilon).sqrt()
            x_MH = at(at(x_MH, self.precision.logits) * named["router_scale"], self.precision.logits)
            x_MH = at(x_MH * x_MH.shape[1] ** -0.5, self.precision.logits)
        as_float = self if self.precision.logits == "model" else replace(self, dtype=torch.float32)
        logits_ME = as_float.linear(x_MH, named["router_weight"], named.get("router_bias"))
        if routing.scoring_func == "sparsemixer":
            weights_MK = at(
                moe.select_experts(logits_ME, logits_ME, None, routing).topk_weights_MK, self.precision.scores
            )
        elif routing.score_after_topk:
            weights_MK = at(moe.score(logits_ME.gather(1, ids_MK), routing), self.precision.scores)
        else:
            weights_MK = at(moe.score(logits_ME, routing), self.precision.scores).gather(1, ids_MK)
        weights_MK = at(moe.renormalize(weights_MK, routing), self.precision.weights)
        if routing.per_expert_scale:
            weights_MK = weights_MK * named["per_expert_scale"][ids_MK]
        return weights_MK

    def expert(self, x_mL: Tensor, named: Mapping[str, Tensor], e: int, experts: Experts, tp: int) -> Tensor:
        w13, w2 = named["w13"][e], named["w2"][e]
        if experts.transposed:
            w13, w2 = w13.T, w2.T
        b13, b2 = (named["b13"][e], named["b2"][e]) if experts.bias else (None, None)
        h_mN = self.linear(x_mL, w13, b13)
        if not experts.activation.gated:
            gate, up = h_mN, None
        elif experts.layout == "interleaved":
            gate, up = h_mN[:, 0::2], h_mN[:, 1::2]
        else:
            gate, up = h_mN.chunk(2, -1)
        return self.down(self.activation(gate, up, experts.activation), w2, b2, tp)

    def activation(self, gate: Tensor, up: Tensor | None, rule: Activation) -> Tensor:
        if not self.way.inner_rounding or up is None:
            return self.store(moe.activate(gate, up, rule))
        halves = (moe.activate(gate, torch.ones_like(gate), replace(rule, up_offset=0.0)), up)
        if rule.limit is not None:
            halves = (
                moe.activate(gate, torch.full_like(gate, rule.limit), replace(rule, up_offset=0.0)) / rule.limit,
                up,
            )
            halves = (halves[0], up.clamp(-rule.limit, rule.limit))
        return self.store(self.store(halves[0]) * self.store(halves[1] + rule.up_offset))

    def down(self, a_mI: Tensor, w2: Tensor, b2: Tensor | None, tp: int) -> Tensor:
        """The ranks' shares of the second product, not yet stored: a kernel may weigh them first."""
        shares = [self.product(a, w) for a, w in zip(a_mI.chunk(tp, 1), w2.chunk(tp, 1), strict=True)]
        if b2 is not None:
            shares[0] = (self.store(shares[0]) if self.way.bias_apart else shares[0]) + b2
        return torch.stack(shares)

    def shared(self, x_MH: Tensor, tp: int) -> Tensor:
        shared, named = self.spec.shared, self.weights
        assert shared is not None
        h = self.linear(x_MH, named["shared_w13"], named.get("shared_b13"))
        gate, up = h.chunk(2, -1) if shared.activation.gated else (h, None)
        a_MI = self.activation(gate, up, shared.activation)
        y_RMH = self.store(self.down(a_MI, named["shared_w2"], named.get("shared_b2"), tp))
        if shared.sigmoid_gate:
            y_RMH = self.store(y_RMH * self.store(torch.sigmoid(self.linear(x_MH, named["shared_gate"], None))))
        return y_RMH
