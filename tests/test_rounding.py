"""A layer of this file computes the law in every legal way: the analysis must accept all of them and little else.

python -m tests.test_rounding 0 10000      the same trial for 10,000 seeds, as a table by dtype
"""

from __future__ import annotations

import functools
import random
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from harness import models
from harness.weights import DTYPES, Tokens, make_tokens, make_weights
from reference import moe
from reference.moe import Stages, forward
from reference.naive import naive
from reference.rounding import analyse, router_error
from reference.routes import undecided_rows
from reference.spec import Activation, Experts, MoESpec, RouterPrecision, Routing

RUN_LIMIT, DEVIATION_LIMIT = 2.5, 1.5  # a row is wrong beyond both


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
    def drawn(cls, rng: random.Random, tp: int, chains: float = 0.05) -> Way:
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

    def __call__(self, tokens: Tokens, stages: Stages, tp: int, shared_tp: int) -> Tensor:
        """Where the shared experts are cut into another number of pieces, they are reduced apart from the routed ones."""
        spec, way = self.spec, self.way
        if shared_tp != tp:
            way = replace(way, shared_reduced_apart=True)
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
        shared_RMH = self.shared(x_MH, shared_tp) if spec.shared else None
        if shared_RMH is not None and not way.shared_reduced_apart:
            ranks = [self.store(routed_RMH[r] + shared_RMH[r]) for r in way.rank_order]
        y_MH = self.add_all(ranks, way.ranks_added_in_dtype)
        if spec.routing.num_zero_experts:
            y_MH = self.store(y_MH + zero_MH)
        if spec.experts.latent_bias:
            y_MH = self.store(y_MH + self.weights["fc2_latent_bias"])
        if shared_RMH is not None and way.shared_reduced_apart:
            order = way.rank_order if shared_tp == tp else range(shared_tp)
            y_MH = self.store(y_MH + self.add_all([shared_RMH[r] for r in order], way.ranks_added_in_dtype))
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

    def at(self, t: Tensor, where: str) -> Tensor:
        return self.store(t) if where == "model" else t

    def logits(self, x_MH: Tensor, named: Mapping[str, Tensor], routing: Routing) -> Tensor:
        if routing.router_norm_epsilon is not None:
            x_MH = x_MH / (x_MH.square().mean(-1, keepdim=True) + routing.router_norm_epsilon).sqrt()
            x_MH = self.at(self.at(x_MH, self.precision.logits) * named["router_scale"], self.precision.logits)
            x_MH = self.at(x_MH * x_MH.shape[1] ** -0.5, self.precision.logits)
        as_float = self if self.precision.logits == "model" else replace(self, dtype=torch.float32)
        return as_float.linear(x_MH, named["router_weight"], named.get("router_bias"))

    def router(self, x_MH: Tensor, named: Mapping[str, Tensor], ids_MK: Tensor, routing: Routing) -> Tensor:
        at, logits_ME = self.at, self.logits(x_MH, named, routing)
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


@dataclass(frozen=True, eq=False)
class Trial:
    """One model in one dtype on tp ranks, computed in one legal way. shared_tp: pieces of the shared experts."""

    layer: Layer
    tokens: Tokens
    stages: Stages
    tp: int
    shared_tp: int

    @classmethod
    def drawn(cls, seed: int, dtype: str | None = None, model: str | None = None, tokens: int | None = None) -> Trial:
        rng = random.Random(seed)
        spec = models.load(model or rng.choice(models.names())).twin
        dtype = dtype or rng.choice(list(DTYPES))
        tp = rng.choice([n for n in (1, 2, 3, 4, 8) if all(w % n == 0 for w in spec.tp_widths().values())])
        drawn = make_tokens(spec, tokens or rng.choice((1, 2, 7, 33)), seed, DTYPES[dtype])
        louder = (drawn.hidden_states * rng.choice((0.25, 1.0, 1.0, 3.0))).to(DTYPES[dtype])
        drawn = Tokens(louder, drawn.is_vision)
        weights = _weights(spec, seed % 5, dtype)
        stages = forward(spec, weights, drawn.hidden_states, is_vision_M=drawn.is_vision)
        whole = {name: tensor.float() for name, tensor in weights.items()}
        layer = Layer(spec, whole, DTYPES[dtype], Way.drawn(rng, tp), spec.routing.precision)
        return cls(layer, drawn, stages, tp, tp)

    def output(self, layer: Layer | None = None) -> Tensor:
        return (layer or self.layer)(self.tokens, self.stages, self.tp, self.shared_tp)

    def judged(self, output_MH: Tensor) -> Verdict:
        spec, precision, x_MH = self.layer.spec, self.layer.precision, self.tokens.hidden_states
        given = (spec, self.layer.weights, x_MH, self.stages, self.tp, precision, self.tokens.is_vision)
        rounding = analyse(*given, shared_tp=self.shared_tp)
        error_MH = output_MH.double() - self.stages.output_MH
        runs = naive(*given, shared_tp=self.shared_tp)
        naive_M = torch.stack([(run.double() - self.stages.output_MH).norm(dim=1) for run in runs]).amax(0)
        keep_M = torch.ones(len(x_MH), dtype=torch.bool)
        if (
            spec.routing.scoring_func == "sparsemixer"
        ):  # its masks may change with rounding, which routes.py answers for
            delta_ME = router_error(spec, self.layer.weights, x_MH, precision)
            keep_M = ~undecided_rows(spec.routing, self.stages.logits_ME, None, delta_ME)
        ratio_M, deviations_M = error_MH.norm(dim=1) / naive_M, error_MH.norm(dim=1) / rounding.deviation_M
        return Verdict(ratio_M[keep_M], deviations_M[keep_M], (error_MH.abs() / rounding.bound_MH)[keep_M])


@dataclass(frozen=True, eq=False)
class Verdict:
    """Row errors in units of the worse naive run and of the deviation, element errors in units of the bound."""

    ratio_M: Tensor
    deviations_M: Tensor
    bound_MH: Tensor

    @property
    def wrong_M(self) -> Tensor:
        return ~(self.ratio_M <= RUN_LIMIT) & ~(self.deviations_M <= DEVIATION_LIMIT)


@functools.lru_cache(maxsize=64)
def _weights(spec: MoESpec, seed: int, dtype: str) -> dict[str, Tensor]:
    return make_weights(spec, seed, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_legal_way_to_compute_a_layer_is_called_wrong(dtype: str) -> None:
    typical = []
    for seed in range(60):
        trial = Trial.drawn(seed, dtype)
        verdict = trial.judged(trial.output())
        assert not verdict.wrong_M.any(), f"seed {seed}, {trial.layer.way}"
        assert (verdict.bound_MH <= 1).all(), f"seed {seed}, {trial.layer.way}"
        typical += verdict.deviations_M.tolist()
    assert 0.4 < statistics.fmean(d * d for d in typical) ** 0.5 < 0.9  # a model twice too cautious would hide faults


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_legal_way_is_called_wrong_where_the_shared_experts_are_cut_otherwise(dtype: str) -> None:
    """As on grids: whole under sequence parallelism, over tp alone beside routed experts on tp * dp ranks."""
    tried = 0
    for seed in range(200, 280):
        trial = Trial.drawn(seed, dtype)
        shared = trial.layer.spec.shared
        if shared is None:
            continue
        counts = [n for n in (1, 2, 3, 4, 8) if n != trial.tp and shared.intermediate_size % n == 0]
        trial = replace(trial, shared_tp=random.Random(seed).choice(counts))
        verdict = trial.judged(trial.output())
        assert not verdict.wrong_M.any(), f"seed {seed}, {trial.tp}, {trial.shared_tp}, {trial.layer.way}"
        assert (verdict.bound_MH <= 1).all(), f"seed {seed}, {trial.tp}, {trial.shared_tp}, {trial.layer.way}"
        tried += 1
    assert tried > 40


@pytest.mark.parametrize("model", models.names())
@pytest.mark.parametrize(("dtype", "factor"), [("fp32", 1.001), ("fp16", 1.05), ("bf16", 1.1)])
def test_an_expert_a_little_too_loud_is_found_in_every_model(model: str, dtype: str, factor: float) -> None:
    trial = Trial.drawn(3, dtype, model, tokens=33)
    loudest = int(
        trial.stages.topk_ids_MK[trial.stages.topk_ids_MK < trial.layer.spec.routing.num_experts].mode().values
    )
    assert trial.judged(trial.output(replace(trial.layer, louder=(loudest, factor)))).wrong_M.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["zeros", "negated", "nan", "without biases"])
def test_gross_faults_are_found_in_every_dtype(dtype: str, fault: str) -> None:
    trial = Trial.drawn(5, dtype, "gpt_oss", tokens=7)
    y_MH = trial.output()
    silent = {name: t * 0 if name in ("b13", "b2") else t for name, t in trial.layer.weights.items()}
    wrong = {
        "zeros": torch.zeros_like(y_MH),
        "negated": -y_MH,
        "nan": torch.full_like(y_MH, torch.nan),
        "without biases": trial.output(replace(trial.layer, weights=silent)),
    }[fault]
    assert trial.judged(wrong).wrong_M.all()


def test_rows_are_analysed_one_by_one_as_in_the_whole() -> None:
    trial = Trial.drawn(1, "bf16", "ernie4_5_vl_moe", tokens=7)
    given = (trial.layer.spec, trial.layer.weights, trial.tokens.hidden_states, trial.stages, 2, trial.layer.precision)
    whole, rows = analyse(*given, trial.tokens.is_vision), torch.tensor([5, 0])
    some = analyse(*given, trial.tokens.is_vision, rows)
    torch.testing.assert_close(some.deviation_M, whole.deviation_M[rows])
    torch.testing.assert_close(some.bound_MH, whole.bound_MH[rows])


@pytest.mark.parametrize("model", models.names())
def test_ranking_scores_computed_in_the_dtype_stay_within_their_error(model: str) -> None:
    for seed, dtype in enumerate(DTYPES):
        trial = Trial.drawn(seed, dtype, model, tokens=33)
        routing, x_MH = trial.layer.spec.routing, trial.tokens.hidden_states
        delta_ME = router_error(trial.layer.spec, trial.layer.weights, x_MH, routing.precision, trial.tokens.is_vision)
        text_M = torch.ones(len(x_MH), dtype=torch.bool) if trial.tokens.is_vision is None else ~trial.tokens.is_vision
        logits_ME = trial.layer.logits(x_MH[text_M].float(), trial.layer.weights, routing)
        exact_ME = trial.stages.logits_ME[text_M]
        if not routing.score_after_topk:
            logits_ME, exact_ME = moe.score(logits_ME, routing), moe.score(exact_ME, routing)
            logits_ME = trial.layer.store(logits_ME) if routing.precision.scores == "model" else logits_ME
        assert ((logits_ME.double() - exact_ME).abs() <= delta_ME[text_M]).all()


def survey(first: int, last: int) -> None:
    """Print, by dtype, the largest figures of clean trials and the share of faults found."""
    for dtype in DTYPES:
        clean, found = [], {"expert x1.05": 0, "expert x1.01": 0, "expert x1.001": 0}
        for seed in range(first, last):
            trial = Trial.drawn(seed, dtype)
            clean.append(trial.judged(trial.output()))
            if seed % 10 == 0:
                ids_MK = trial.stages.topk_ids_MK
                real = ids_MK[ids_MK < trial.layer.spec.routing.num_experts]
                for fault in found:
                    louder = (int(real.mode().values), float(fault.partition("x1")[2]) + 1)
                    found[fault] += bool(trial.judged(trial.output(replace(trial.layer, louder=louder))).wrong_M.any())
        clean = [verdict for verdict in clean if len(verdict.ratio_M)]
        joint = [torch.minimum(v.ratio_M / RUN_LIMIT, v.deviations_M / DEVIATION_LIMIT).amax() for v in clean]
        for name, values in (
            ("row error / worse naive run", [float(v.ratio_M.amax()) for v in clean]),
            ("row error / deviation", [float(v.deviations_M.amax()) for v in clean]),
            ("error / bound", [float(v.bound_MH.amax()) for v in clean]),
            ("joint rule, 1 = wrong", [float(j) for j in joint]),
        ):
            values.sort()
            middle, rare, most = values[len(values) // 2], values[int(0.999 * len(values))], values[-1]
            print(f"{dtype} {len(values):6} {name:28} median {middle:.3f}  99.9 % {rare:.3f}  max {most:.3f}")
        of = len(range(first, last, 10))
        print(
            dtype,
            "wrong:",
            sum(j > 1 for j in joint),
            " found:",
            {k: f"{100 * n / of:.1f} %" for k, n in found.items()},
        )
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        survey(int(sys.argv[1]), int(sys.argv[2]))
