"""How wrong a right layer may be: an error analysis in float64 that follows the law of `moe.py` stage by stage.

Two figures come out. The deviation is what rounding does on the average, every rounding being independent of the
others; the bound is what it does at worst (Higham, Accuracy and Stability, 2nd ed., 3.1 and 3.3), so that an error
beyond it is a proof. Both allow any legal layer: any order of summation, products accumulated in float32, and a
rounding to the dtype wherever a released layer stores a result.

Names end in their shape: M tokens, H hidden, L latent (H without one), I intermediate, N rows of w13, E experts,
K top-k, T = M * K slots, R ranks; G experts in use, with up to m slots each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reference import moe
from reference.moe import Stages
from reference.spec import Activation, Experts, MoESpec, RouterPrecision, Routing, Shared

# Deviation of a rounding error in u of the value: 0.29 to 0.58 by the value's leading digits, this on the average.
_TYPICAL_ROUNDING = 0.42
# No score of a router is off by more deviations than this: the largest of 20 million was 7.9 (docs/tolerance.md).
# The certified bound grows with the width of a sum, not with its root, and would call half of all tokens of a real
# layer near ties; it is kept where it is the smaller one.
_SURE = 16.0
# |f''| of the activations, rounded up; relu2 and silu have theirs at 0.
_CURVATURE = {"silu": 0.51, "gelu": 0.80, "gelu_tanh": 0.81, "relu2": 2.0}


@dataclass(frozen=True, slots=True, eq=False)
class RoundingErrors:
    """deviation_M: standard deviation of a row's L2 error, and up to twice that where few errors decide about the row.

    variance_MH: the same by element, squared: deviation_M is the root of its sum.
    bound_MH: certified limit of each element's error.    All float64, absolute, in units of the output.
    weights_MK: the deviation of each router weight, relative to it; such an error moves its whole row at once.
    """

    deviation_M: Tensor
    variance_MH: Tensor
    bound_MH: Tensor
    weights_MK: Tensor


@dataclass(frozen=True, slots=True)
class Unit:
    """Rounding to a dtype: |error| <= u * |v| + tiny, tiny being half the spacing of the subnormal numbers."""

    u: float
    tiny: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Unit:
        info = torch.finfo(dtype)
        return cls(info.eps / 2, info.smallest_normal * info.eps / 2)


_FP32 = Unit.of(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Noisy:
    """A tensor as the oracle has it, and by how much a legal layer's differs: variance and worst case, by element."""

    value: Tensor
    variance: Tensor
    bound: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Noisy:
        return cls(value, torch.zeros_like(value), torch.zeros_like(value))

    def __getitem__(self, index: object) -> Noisy:
        return Noisy(self.value[index], self.variance[index], self.bound[index])  # type: ignore[index]

    def __add__(self, other: Noisy | Tensor) -> Noisy:
        if isinstance(other, Tensor):
            return replace(self, value=self.value + other)
        return Noisy(self.value + other.value, self.variance + other.variance, self.bound + other.bound)

    def __mul__(self, other: Noisy | float) -> Noisy:
        if not isinstance(other, Noisy):
            return Noisy(self.value * other, self.variance * other**2, self.bound * abs(other))
        a, b = self, other
        variance = a.value.square() * b.variance + b.value.square() * a.variance
        return Noisy(a.value * b.value, variance, a.value.abs() * b.bound + b.value.abs() * a.bound + a.bound * b.bound)

    def shaped(self, change: Callable[[Tensor], Tensor]) -> Noisy:
        """The same numbers in another arrangement."""
        return Noisy(change(self.value), change(self.variance), change(self.bound))

    def for_a_row(self) -> Noisy:
        """As a factor of whole rows: one error moves all of a row."""
        return replace(self, variance=_unlucky(torch.ones(())) * self.variance)

    def stored(self, unit: Unit, times: int = 1) -> Noisy:
        """Rounded once, or several times in a row at about the same value."""
        variance = self.variance + times * ((_TYPICAL_ROUNDING * unit.u * self.value).square() + unit.tiny**2)
        spread = _growth(times, unit.u)
        return Noisy(self.value, variance, self.bound * (1 + spread) + spread * self.value.abs() + times * unit.tiny)

    def product(self, w: Tensor, packed: Unit | None = None) -> Noisy:
        """self @ w.T, summed in float32 in any order; w [..., out, in] is exact, unless unpacked to that unit's dtype."""
        wT, n = w.mT, w.shape[-1]
        total = self.value @ wT
        chain = _on_the_way(total, self.value.square() @ wT.square(), n)
        energy = self.variance * wT.square().sum(-1).unsqueeze(-2)  # what each error gives to the row of results
        concentration = energy.square().sum(-1, keepdim=True) / energy.sum(-1, keepdim=True).square()
        inherited = self.variance * _unlucky(concentration.nan_to_num(0.0))
        variance = inherited @ wT.square() + (_TYPICAL_ROUNDING * _FP32.u) ** 2 * chain
        spread = _growth(n, _FP32.u)
        bound = self.bound * (1 + spread) + spread * self.value.abs()
        bound = bound @ wT.abs() + n * _FP32.tiny
        if packed is not None:
            variance = variance + (_TYPICAL_ROUNDING * packed.u) ** 2 * (self.value.square() @ wT.square())
            reach = (self.value.abs() + self.bound) * (1 + spread)
            bound = bound + reach @ (packed.u * wT.abs() + packed.tiny)
        return Noisy(total, variance, bound)

    def summed(self, unit: Unit, roundings: int) -> Noisy:
        """Sum over the first dimension in any order, roundings of them on the way of each term."""
        total, square = self.value.sum(0), self.value.square().sum(0)
        spread = _growth(roundings, unit.u)
        return Noisy(
            total,
            self.variance.sum(0) + (_TYPICAL_ROUNDING * unit.u) ** 2 * _on_the_way(total, square, roundings),
            (self.bound * (1 + spread) + spread * self.value.abs()).sum(0) + roundings * unit.tiny,
        )

    def clamped(self, low: float | None, high: float) -> Noisy:
        clamp = functools.partial(torch.clamp, min=low, max=high)
        value = clamp(self.value)
        bound = torch.maximum(clamp(self.value + self.bound) - value, value - clamp(self.value - self.bound))
        return Noisy(value, self.variance * (bound > 0), bound)

    def mapped(self, f: Callable[[Tensor], Tensor], curvature: float) -> Noisy:
        """f of it, evaluated in float32; curvature bounds |f''|, and with it how far f leaves its chords."""
        value = f(self.value)
        slope = (f(self.value + 1e-6) - f(self.value - 1e-6)) / 2e-6
        ends = [(f(end) - value).abs() for end in (self.value + self.bound, self.value - self.bound)]
        # an exponential of a rounded argument, a cancelling 1 + erf: a few u of the result and of the argument
        evaluated = 4 * _FP32.u * (value.abs() + self.value.abs())
        variance = slope.square() * self.variance + (_FP32.u * value).square()
        return Noisy(value, variance, torch.maximum(*ends) + curvature / 2 * self.bound.square() + evaluated)


def _unlucky(concentration: Tensor) -> Tensor:
    """By how much a row's squared error exceeds its mean when it lies two of its own deviations above, as a factor.

    concentration: sum of e**2 over (sum of e)**2 of the mean squared errors e that independent sources give to the row:
    1 if a single one moves it, 1 / n if n do alike. The square of a normal number has twice its square as variance.
    """
    return 1 + 2 * (2 * concentration).sqrt()


def _on_the_way(total: Tensor, square: Tensor, n: int) -> Tensor:
    """Sum of the squares of n partial sums of one chain: they grow like a random walk, or straight to a large total.

    A layer need not add in a chain, but it may; one that adds block by block errs about half as much in float32.
    """
    return n / 2 * torch.maximum(total.square(), square)


def _growth(n: int, u: float) -> float:
    """Higham's gamma_n: n roundings in a row change a number by at most this, relatively."""
    return n * u / (1 - n * u)


def analyse(
    spec: MoESpec,
    weights: Mapping[str, Tensor],
    hidden_states_MH: Tensor,
    stages: Stages,
    tp: int,
    precision: RouterPrecision,
    is_vision_M: Tensor | None = None,
    rows_m: Tensor | None = None,
    *,
    shared_tp: int | None = None,
    packed: bool = False,
) -> RoundingErrors:
    """The rounding errors that a legal layer may make with the stages' choice of experts.

    weights, hidden_states_MH, is_vision_M: as for `forward`; the dtype of hidden_states_MH is the layer's.
    stages: its result.    tp: how many partial sums the routed experts are cut into; divides their widths.
    shared_tp: the same for the shared experts, tp by default.    precision: where the released router rounds.
    packed: the routed experts are stored in fewer bits, so that a layer may round w13 and w2 to its dtype when it
    unpacks them.
    rows_m: int64, the rows to analyse, all by default: a few take 2 ms, 512 of a twin 40 ms.
    Not covered: overflow, and a sparsemixer mask that rounding decides (see routes.py).
    """
    rows_m = torch.arange(hidden_states_MH.shape[0]) if rows_m is None else rows_m
    unit = Unit.of(hidden_states_MH.dtype)
    x_MH, ids_MK, weights_MK = (
        hidden_states_MH[rows_m].double(),
        stages.topk_ids_MK[rows_m],
        stages.topk_weights_MK[rows_m],
    )
    variance_MH, bound_MH, relative_MK = torch.zeros_like(x_MH), torch.zeros_like(x_MH), torch.zeros_like(weights_MK)
    for rows_M, routing, experts, named in _branches(spec, weights, is_vision_M, rows_m):
        x, ids = x_MH[rows_M], ids_MK[rows_M]
        weighed_MK = _noisy_weights(x, named, ids, weights_MK[rows_M], routing, unit, precision)
        relative_MK[rows_M] = (weighed_MK.variance.sqrt() / weighed_MK.value.abs()).nan_to_num(0.0)
        chosen_MK = weighed_MK.for_a_row()
        real_MK = Noisy.exact((ids < routing.num_experts).double())
        real_ids_MK, unpacked = ids.clamp(max=routing.num_experts - 1), unit if packed else None
        routed_RMH = _routed(x, named, real_ids_MK, chosen_MK * real_MK, routing, experts, tp, unit, unpacked)
        terms = [(routed_RMH * routing.scale).stored(unit)]
        if routing.num_zero_experts:
            zero_MK = Noisy.exact((ids >= routing.num_experts).double())
            zero_KM1 = (chosen_MK * zero_MK).shaped(lambda t: t.T[..., None])
            zero_MH = (zero_KM1.summed(unit, routing.top_k) * Noisy.exact(x)).stored(unit)
            terms.append((zero_MH * routing.scale).stored(unit)[None])
        if spec.experts.latent_bias:
            terms.append(Noisy.exact(weights["fc2_latent_bias"].double().expand_as(x)[None]))
        if spec.shared is not None:
            terms.append(_shared(x, named, spec.shared, shared_tp or tp, unit))
        total_MH = _joined(terms).summed(unit, max(tp, shared_tp or tp) + len(terms) - 1) * spec.output.share
        variance_MH[rows_M], bound_MH[rows_M] = total_MH.variance, total_MH.bound
    return RoundingErrors(variance_MH.sum(1).sqrt(), variance_MH, bound_MH, relative_MK)


def router_error(
    spec: MoESpec,
    weights: Mapping[str, Tensor],
    hidden_states_MH: Tensor,
    precision: RouterPrecision,
    is_vision_M: Tensor | None = None,
) -> Tensor:
    """By how much a legal router's ranking score of each expert may differ from the oracle's: delta_ME, float64 [M, E].

    The smaller of the certified bound and 16 standard deviations.
    The ranking score is what `select_experts` compares: the score, or the logit where the model chooses before it
    scores and for sparsemixer, plus the correction bias. A group's sum of two stays within the sum of their deltas.
    """
    unit = Unit.of(hidden_states_MH.dtype)
    x_MH = hidden_states_MH.double()
    delta_ME = x_MH.new_zeros(x_MH.shape[0], spec.routing.num_logits)
    for rows_M, routing, _, named in _branches(spec, weights, is_vision_M, torch.arange(x_MH.shape[0])):
        ranked_ME = logits_ME = _logits(x_MH[rows_M], named, routing, unit, precision)
        if routing.scoring_func != "sparsemixer" and not routing.score_after_topk:
            every_ME = torch.arange(routing.num_logits).expand_as(logits_ME.value)
            scores_ME = moe.score(logits_ME.value, routing)
            share_ME = scores_ME if routing.scoring_func == "softmax" else torch.zeros_like(scores_ME)
            log_variance_ME, log_bound_ME = _log_errors(logits_ME, every_ME, share_ME[:, None], routing)
            log_variance_ME = log_variance_ME + (_evaluated(logits_ME.value, share_ME[:, None]) / _SURE).square()
            ranked_ME = Noisy(scores_ME, scores_ME.square() * log_variance_ME, scores_ME * log_bound_ME.expm1())
            ranked_ME = ranked_ME.stored(unit) if precision.scores == "model" else ranked_ME
        if routing.correction_bias:
            ranked_ME = (ranked_ME + named["e_score_correction_bias"]).stored(_FP32)
        # a group score is the sum of two and rounded once more: its share is put on each of them
        grouped_ME = ranked_ME.stored(_FP32) if routing.n_group > 1 else ranked_ME
        delta_ME[rows_M] = torch.minimum(grouped_ME.bound, _SURE * grouped_ME.variance.sqrt())
    return delta_ME


def _branches(
    spec: MoESpec, weights: Mapping[str, Tensor], is_vision_M: Tensor | None, rows_m: Tensor
) -> list[tuple[Tensor, Routing, Experts, dict[str, Tensor]]]:
    """Which of the rows take which branch, and its weights in float64 under their plain names."""
    named = {name: tensor.double() for name, tensor in weights.items()}
    if spec.vision is None or is_vision_M is None:
        return [(torch.ones_like(rows_m, dtype=torch.bool), spec.routing, spec.experts, named)]
    is_vision_m = is_vision_M[rows_m]
    vision = named | {name.removeprefix("vision_"): t for name, t in named.items() if name.startswith("vision_")}
    return [
        (~is_vision_m, spec.routing, spec.experts, named),
        (is_vision_m, spec.vision.routing, spec.vision.experts, vision),
    ]


def _logits(
    x_MH: Tensor, weights: Mapping[str, Tensor], routing: Routing, unit: Unit, precision: RouterPrecision
) -> Noisy:
    stored = unit if precision.logits == "model" else _FP32
    noisy_MH = Noisy.exact(x_MH)
    if routing.router_norm_epsilon is not None:
        scale_M1 = (
            torch.rsqrt(x_MH.square().mean(-1, keepdim=True) + routing.router_norm_epsilon) * x_MH.shape[1] ** -0.5
        )
        # half the relative error of the mean square, then rsqrt and three products, each perhaps stored
        noisy_MH = Noisy.exact(x_MH * scale_M1 * weights["router_scale"]).stored(_FP32, x_MH.shape[1] // 2 + 4)
        noisy_MH = noisy_MH.stored(stored, 3)
    return _linear(noisy_MH, weights["router_weight"], weights["router_bias"] if routing.router_bias else None, stored)


def _noisy_weights(
    x_MH: Tensor,
    weights: Mapping[str, Tensor],
    ids_MK: Tensor,
    weights_MK: Tensor,
    routing: Routing,
    unit: Unit,
    precision: RouterPrecision,
) -> Noisy:
    """The given router weights [M, K], as wrong as a legal router has them."""
    logits_ME = _logits(x_MH, weights, routing, unit, precision)
    share_MKE = _shares(logits_ME, ids_MK, routing)
    log_variance_MK, log_bound_MK = _log_errors(logits_ME, ids_MK, share_MKE, routing)
    noisy_MK = Noisy(weights_MK, weights_MK.square() * log_variance_MK, weights_MK.abs() * log_bound_MK.expm1())
    # once as a score, twice in renormalising, once by the expert's own scale; then cast, alone or with s
    noisy_MK = noisy_MK.stored(unit if precision.scores == "model" else _FP32)
    noisy_MK = noisy_MK.stored(
        unit if precision.weights == "model" else _FP32, 2 * routing.renormalize + routing.per_expert_scale
    )
    return noisy_MK.stored(unit)


def _shares(noisy_ME: Noisy, ids_MK: Tensor, routing: Routing) -> Tensor:
    """Each expert's part of the number that divides a slot's score, [M, K, E]; zeros where nothing divides it.

    A sparsemixer's mask may be another one than the exact logits make: every expert counts that may be close to the pick.
    """
    logits_ME = noisy_ME.value
    scores_ME = logits_ME.softmax(-1) if routing.scoring_func == "sparsemixer" else moe.score(logits_ME, routing)
    divides_MKE = torch.zeros(*ids_MK.shape, logits_ME.shape[1], dtype=torch.bool)
    if routing.scoring_func == "sparsemixer":
        assert routing.sparsemixer_epsilon is not None  # Routing refuses the combination
        best_MK1 = logits_ME.gather(1, ids_MK)[..., None]
        off_MKE = torch.minimum(noisy_ME.bound, _SURE * noisy_ME.variance.sqrt())[:, None]
        off_MKE = off_MKE + off_MKE.transpose(1, 2).gather(1, ids_MK[..., None])
        distance_MKE = (best_MK1 - logits_ME[:, None] - off_MKE) / torch.maximum(logits_ME[:, None].abs(), best_MK1)
        divides_MKE = distance_MKE <= 2 * routing.sparsemixer_epsilon
        divides_MKE[:, 1].scatter_(1, ids_MK[:, :1], False)
    elif routing.renormalize or (routing.scoring_func == "softmax" and routing.score_after_topk):
        divides_MKE.scatter_(2, ids_MK[:, None].expand(-1, ids_MK.shape[1], -1), True)
    elif routing.scoring_func == "softmax":
        divides_MKE[:] = True
    part_MKE = scores_ME[:, None] * divides_MKE
    return part_MKE / part_MKE.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _log_errors(logits_ME: Noisy, ids_MK: Tensor, share_MKE: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Variance and bound of the logarithm of score_k / sum over share's experts, [M, K]; share [M, K or 1, E].

    d log(score_k / sum) = a_k dl_k - sum_e share_e a_e dl_e, with a = d log score / d logit, at most 1.
    """
    l_ME = logits_ME.value
    if routing.scoring_func == "sigmoid":
        a_ME = torch.sigmoid(-l_ME)
    elif routing.scoring_func == "sqrtsoftplus":
        softplus_ME = torch.nn.functional.softplus(l_ME, threshold=700.0)
        a_ME = torch.sigmoid(l_ME) / (2 * softplus_ME).clamp(min=torch.finfo(torch.float64).tiny)
    else:
        a_ME = torch.ones_like(l_ME)
    part_MK = share_MKE.expand(-1, ids_MK.shape[1], -1).gather(2, ids_MK[..., None])[..., 0]

    def summed(share_MKE: Tensor, each_ME: Tensor) -> Tensor:
        """The terms of the sum and the slot's own, which stands in both: (1 - share)**2 = 1 - 2 share + share**2."""
        return (share_MKE @ each_ME[..., None])[..., 0] + (1 - 2 * part_MK) * each_ME.gather(1, ids_MK)

    variance_MK = summed(share_MKE.square(), a_ME.square() * logits_ME.variance)
    bound_MK = summed(share_MKE, a_ME * logits_ME.bound)
    # the second derivatives add up to less than 1
    bound_MK = bound_MK + logits_ME.bound.amax(-1, keepdim=True).square() + _evaluated(l_ME, share_MKE)
    return variance_MK, bound_MK.clamp(max=50.0)  # e**50 allows anything, and stays finite


def _evaluated(logits_ME: Tensor, share_MKE: Tensor) -> Tensor:
    """What evaluating the scores in float32 adds at worst, [M, 1]: the exponentials are of arguments that it rounds."""
    reach_M1 = (logits_ME.abs() + 8).amax(-1, keepdim=True) + (logits_ME.amax(-1) - logits_ME.amin(-1))[:, None]
    return _FP32.u * (reach_M1 + logits_ME.shape[1] * (share_MKE.sum((1, 2)) > 0)[:, None])


def _routed(
    x_MH: Tensor,
    weights: Mapping[str, Tensor],
    ids_MK: Tensor,
    weights_MK: Noisy,
    routing: Routing,
    experts: Experts,
    tp: int,
    unit: Unit,
    packed: Unit | None,
) -> Noisy:
    """The ranks' shares of R, [R, M, H]."""
    tokens, top_k = ids_MK.shape
    x_ML = Noisy.exact(x_MH)
    if experts.latent_size is not None:
        x_ML = _linear(x_ML, weights["fc1_latent"], weights["fc1_latent_bias"] if experts.latent_bias else None, unit)
    used_G, group_T, place_T = _by_expert(ids_MK.flatten())
    w13, w2 = weights["w13"][used_G], weights["w2"][used_G]
    if experts.transposed:
        w13, w2 = w13.mT, w2.mT
    b13, b2 = (weights["b13"][used_G], weights["b2"][used_G]) if experts.bias else (None, None)
    weights_T1 = weights_MK.shaped(lambda t: t.reshape(-1, 1))
    x_TL = x_ML.shaped(lambda t: t.repeat_interleave(top_k, 0))
    if routing.weight_on == "input":
        x_TL = (x_TL * weights_T1).stored(unit)
    most = int(place_T.amax()) + 1 if len(place_T) else 0

    def grouped(t_TL: Tensor) -> Tensor:
        return t_TL.new_zeros(len(used_G), most, t_TL.shape[1]).index_put((group_T, place_T), t_TL)

    y_RGmL = _mlp(x_TL.shaped(grouped), w13, b13, w2, b2, experts.activation, experts.layout, tp, unit, packed)
    y_RTL = y_RGmL.shaped(lambda t: t[:, group_T, place_T])
    if routing.weight_on == "output":
        y_RTL = (y_RTL * weights_T1).stored(unit)
    y_KRML = y_RTL.shaped(lambda t: t.reshape(tp, tokens, top_k, t.shape[-1]).movedim(2, 0))
    routed_RML = y_KRML.summed(unit, top_k + 1)
    if experts.latent_size is None:
        return routed_RML
    # the ranks may be added before the projection or after it: both kinds of roundings are counted
    return routed_RML.stored(unit, tp - 1).product(weights["fc2_latent"]).stored(unit)


def _by_expert(expert_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The experts in use, and for each slot which of them it visits and as their how-manieth."""
    used_G, group_T, counts_G = expert_T.unique(return_inverse=True, return_counts=True)
    order_T = group_T.argsort(stable=True)
    first_G = counts_G.cumsum(0) - counts_G
    place_T = torch.empty_like(order_T)
    place_T[order_T] = torch.arange(len(order_T)) - first_G[group_T[order_T]]
    return used_G, group_T, place_T


def _mlp(
    x_GmL: Noisy,
    w13: Tensor,
    b13: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    rule: Activation,
    layout: str,
    tp: int,
    unit: Unit,
    packed: Unit | None = None,
) -> Noisy:
    """G MLPs with weights of their own [G, out, in], m tokens each: [R, G, m, L], the bias on the first rank."""
    h_GmN = _linear(x_GmL, w13, None if b13 is None else b13[:, None], unit, packed)
    if not rule.gated:
        gate, up = h_GmN, None
    elif layout == "interleaved":
        gate, up = h_GmN[..., 0::2], h_GmN[..., 1::2]
    else:
        gate, up = h_GmN[..., : w2.shape[-1]], h_GmN[..., w2.shape[-1] :]
    a_GmI = _activation(gate, up, rule, unit)
    count, outputs, width = w2.shape
    a_RGmi = a_GmI.shaped(lambda t: t.reshape(*t.shape[:2], tp, width // tp).movedim(2, 0))
    w2_RGLi = w2.reshape(count, outputs, tp, width // tp).movedim(2, 0)
    b2_RG1L = None if b2 is None else torch.stack([b2, *[torch.zeros_like(b2)] * (tp - 1)])[:, :, None]
    return _linear(a_RGmi, w2_RGLi, b2_RG1L, unit, packed)


def _activation(gate: Noisy, up: Noisy | None, rule: Activation, unit: Unit) -> Noisy:
    if rule.clamp == "before" and rule.limit is not None and up is not None:
        gate, up = gate.clamped(None, rule.limit), up.clamped(-rule.limit, rule.limit)
    act = gate.mapped(lambda g: moe.activate(g, None, rule), _CURVATURE[rule.kind] * rule.alpha)
    if rule.clamp == "after" and rule.limit is not None and up is not None:
        act, up = act.clamped(None, rule.limit), up.clamped(-rule.limit, rule.limit)
    # silu written out, x * sigmoid(alpha * x), rounds up to three times where a fused one rounds once
    act = act.stored(unit, 1 if rule.kind != "silu" else 2 if rule.alpha == 1.0 else 3)
    if up is None:
        return act
    return (act * ((up + torch.tensor(rule.up_offset)).stored(unit) if rule.up_offset else up)).stored(unit)


def _shared(x_MH: Tensor, weights: Mapping[str, Tensor], shared: Shared, tp: int, unit: Unit) -> Noisy:
    """The ranks' shares of S, [R, M, H]."""
    w13, w2 = weights["shared_w13"][None], weights["shared_w2"][None]
    b13, b2 = (weights["shared_b13"][None], weights["shared_b2"][None]) if shared.bias else (None, None)
    x_1MH = Noisy.exact(x_MH[None])
    y_RMH = _mlp(x_1MH, w13, b13, w2, b2, shared.activation, "halved", tp, unit).shaped(lambda t: t[:, 0])
    if shared.sigmoid_gate:
        gate_M1 = Noisy.exact(x_MH).product(weights["shared_gate"]).stored(unit).mapped(torch.sigmoid, 0.1).stored(unit)
        y_RMH = (y_RMH * gate_M1.for_a_row()).stored(unit)
    return y_RMH


def _linear(x: Noisy, w: Tensor, bias: Tensor | None, unit: Unit, packed: Unit | None = None) -> Noisy:
    """x @ w.T + bias, stored before the bias and after it."""
    y = x.product(w, packed).stored(unit)
    return y if bias is None else (y + bias).stored(unit)


def _joined(terms: list[Noisy]) -> Noisy:
    return Noisy(*(torch.cat([getattr(t, part) for t in terms]) for part in ("value", "variance", "bound")))
