"""Faults of routing: which experts are chosen, by what, and with which weights. M tokens, E experts, K top-k, G groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.case import Case
from harness.faults.applies import both, chooses_with_bias, has_groups, takes_rows
from harness.faults.fault import Fault
from harness.faults.plant import Apply, Routes, experts, kernels, logits, put, rerouted, routing, rows_of
from harness.faults.rules import routing_rule, tensors, without
from harness.runner.experts import MonolithicExperts, TorchExperts
from harness.runner.layer import FusedMoE
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import Placement
from harness.runner.precision import wide
from harness.runner.router import FusedMoERouter, _renormalize, _scaled, _scores
from reference.spec import MoESpec, Routing

# ---- what the right router knows


def _rule(right: FusedMoERouter) -> Routing:
    return right.routing  # type: ignore[attr-defined]


def _bias(right: FusedMoERouter) -> Tensor:
    return right.bias_E  # type: ignore[attr-defined]


def _factor(right: FusedMoERouter) -> float:
    """s where the router folds it."""
    return getattr(right, "scale", 1.0)


def _weighed(right: FusedMoERouter, scores_ME: Tensor, ids_MK: Tensor) -> Routes:
    """Weights of these scores, renormalised and scaled as the rule says."""
    return _scaled(_renormalize(scores_ME.gather(1, ids_MK), _rule(right)), _factor(right)), ids_MK


def _best(right: FusedMoERouter, ranked_ME: Tensor, groups_ME: Tensor | None = None, fill: float = -math.inf) -> Tensor:
    """The K best of a ranking [M, K], among the groups that are best by groups_ME; others rank at fill."""
    rule = _rule(right)
    if rule.n_group > 1:
        groups_MGE = (ranked_ME if groups_ME is None else groups_ME).unflatten(1, (rule.n_group, -1))
        best_MG = groups_MGE.topk(2 if rule.group_score == "top2" else 1, -1).values.sum(-1)
        kept_MG = torch.zeros_like(best_MG, dtype=torch.bool)
        kept_MG.scatter_(1, best_MG.topk(rule.topk_group, -1).indices, True)
        ranked_ME = ranked_ME.unflatten(1, (rule.n_group, -1)).masked_fill(~kept_MG[:, :, None], fill).flatten(1)
    return ranked_ME.topk(rule.top_k, -1).indices


# ---- D1 to D4: the correction bias


def _bias_weighs(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    ids_MK = right.select_experts(logits_ME)[1]
    return _weighed(right, _scores(logits_ME, _rule(right)) + _bias(right), ids_MK)


def _bias_on_logits(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    scores_ME = _scores(wide(logits_ME) + _bias(right), _rule(right))
    return _weighed(right, scores_ME, _best(right, scores_ME))


def _chosen_by_biased_logits(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    ids_MK = _best(right, wide(logits_ME) + _bias(right))
    return _weighed(right, _scores(logits_ME, _rule(right)), ids_MK)


def _bias_rounded_for_experts_alone(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    """Groups by the exact bias, experts by the rounded one."""
    scores_ME = _scores(logits_ME, _rule(right))
    ids_MK = _best(right, scores_ME + _bias(right).bfloat16(), scores_ME + _bias(right))
    return _weighed(right, scores_ME, ids_MK)


def _bias_taken_off_again(right: FusedMoERouter, logits_ME: Tensor, *, offset: float) -> Routes:
    """The score is recovered as (score + bias) - bias in bf16. offset: how far the bias of a checkpoint lies above ours."""
    scores_ME, ids_MK = _scores(logits_ME, _rule(right)), right.select_experts(logits_ME)[1]
    bias_E = _bias(right) + offset
    recovered_ME = (scores_ME + bias_E).bfloat16() - bias_E.bfloat16()
    weights_MK = recovered_ME.to(scores_ME.dtype).gather(1, ids_MK)
    return _scaled(weights_MK / weights_MK.sum(-1, keepdim=True), _factor(right)), ids_MK


def _read_as_bf16(spec: MoESpec, bias_E: Tensor) -> Tensor:
    """The first half of its bytes, as twice as many short numbers."""
    return bias_E.view(torch.bfloat16)[: len(bias_E)].to(bias_E.dtype)


def _rounded_to_bf16(spec: MoESpec, stored: Tensor) -> Tensor:
    return stored.bfloat16().to(stored.dtype)


BIAS = (
    Fault(
        name="bias_in_the_weights", family="D1", computes="w = σ + b",
        references=("huggingface/transformers#39581", "PaddlePaddle/PaddleFormers#3452", "MetaX-MACA/vLLM-metax#284"),
        case="glm4_moe", words="the correction bias is in the weights",
        applies=chooses_with_bias, layer=routing(_bias_weighs),
    ),
    Fault(
        name="bias_on_the_logits", family="D1", computes="σ(l + b)", references=("ml-explore/mlx-lm#1354",),
        case="exaone_moe", words="the correction bias is added to the logits", also=("D2",),
        applies=chooses_with_bias, layer=routing(_bias_on_logits),
    ),
    Fault(
        name="bias_lost", family="D2", computes="topk(σ)", references=("vllm-project/vllm#21586",),
        case="ernie4_5_moe", words="the correction bias is dropped",
        applies=chooses_with_bias, weights=without("e_score_correction_bias"),
    ),
    Fault(
        name="chosen_by_biased_logits", family="D2", computes="topk(l + b)", references=("huggingface/transformers#41663",),
        case="dots1", words="chosen by logit + correction bias",
        applies=chooses_with_bias, layer=routing(_chosen_by_biased_logits),
    ),
    Fault(
        name="bias_in_bf16", family="D3", computes="topk(σ + bf16(b))", references=("sgl-project/sglang#31213",),
        grids=("tokens256", "tp2.ep4.dp2.tokens256+kernel=deepep_ht"),
        case="glm4_moe@tokens33", words="the correction bias is rounded to bf16",
        applies=chooses_with_bias, weights=tensors(_rounded_to_bf16, "e_score_correction_bias"),
    ),
    Fault(
        name="bias_in_bf16_for_experts_alone", family="D3", computes="topk(σ + bf16(b)) in the groups of σ + b",
        references=("vllm-project/vllm-xpu-kernels#527",),
        case="deepseek_v3@tokens33", words="the correction bias is rounded to bf16",
        applies=both(chooses_with_bias, has_groups), layer=routing(_bias_rounded_for_experts_alone),
    ),
    Fault(
        name="bias_read_as_bf16", family="D3", computes="topk(σ + b'), b' the bytes of b as bf16",
        references=("vllm-project/vllm#38989",),
        case="deepseek_v3", words="the fp32 correction bias is read as bf16", applies=chooses_with_bias,
        weights=tensors(_read_as_bf16, "e_score_correction_bias"),
    ),
    Fault(
        name="bias_taken_off_again", family="D4", computes="w = bf16(σ + b) - bf16(b)",
        references=("vllm-project/vllm#47367",),
        case="sarvam_moe", words="the scores are multiples of 0.125", applies=chooses_with_bias,
        layer=routing(partial(_bias_taken_off_again, offset=32.0)),
    ),
    Fault(
        name="far_bias_taken_off_again", family="D4", computes="w = ((σ + b) - b) / Σ = 0 / 0",
        references=("vllm-project/vllm#47367",),
        case="sarvam_moe@tokens33", words="NaN", also=("G5",), applies=chooses_with_bias,
        layer=routing(partial(_bias_taken_off_again, offset=4096.0)),
    ),
)  # fmt: skip


# ---- D5: groups


def _filled(fill: float) -> Callable[[FusedMoERouter, Tensor], Routes]:
    def select(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
        scores_ME = _scores(logits_ME, _rule(right))
        ranked_ME = scores_ME + right.bias_E if getattr(right, "bias_E", None) is not None else scores_ME  # type: ignore[attr-defined]
        return _weighed(right, scores_ME, _best(right, ranked_ME, fill=fill))

    return select


def _groups_without_bias(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    scores_ME = _scores(logits_ME, _rule(right))
    return _weighed(right, scores_ME, _best(right, scores_ME + _bias(right), scores_ME))


def _other_group_score(spec: MoESpec) -> MoESpec:
    return routing_rule(group_score="max" if spec.routing.group_score == "top2" else "top2")(spec)


def _group_more(step: int) -> Callable[[MoESpec], MoESpec]:
    return lambda spec: routing_rule(topk_group=spec.routing.topk_group + step)(spec)


GROUPS = (
    Fault(
        name="dropped_groups_get_0", family="D5", computes="topk over 0 in place of -inf",
        references=("sgl-project/sglang#3705", "deepseek-ai/DeepSeek-V3#741"),
        case="deepseek_v3", words="get 0 instead of -inf", applies=has_groups, layer=routing(_filled(0.0)),
    ),
    Fault(
        name="dropped_groups_get_minus_1", family="D5", computes="topk over -1 in place of -inf",
        references=("sgl-project/sglang#3705",),
        case="deepseek_v3", words="instead of -inf, which beats a negative biased score", applies=has_groups, layer=routing(_filled(-1.0)),
    ),
    Fault(
        name="groups_ignored", family="D5", computes="topk over all groups", references=("vllm-project/vllm#44347",),
        case="deepseek_v3@tp2", words="the expert groups are ignored",
        applies=has_groups, spec=routing_rule(n_group=1, topk_group=1),
    ),
    Fault(
        name="groups_by_the_other_score", family="D5", computes="groups by max in place of top-2, or the reverse",
        references=("vllm-project/vllm#33620",),
        case="deepseek_v3", words="groups are ranked by max", applies=has_groups, spec=_other_group_score,
    ),
    Fault(
        name="groups_without_the_bias", family="D5", computes="groups by σ, experts by σ + b",
        references=("huggingface/transformers#41663",),
        case="deepseek_v3@tokens33", words="groups are ranked without the correction bias",
        applies=both(has_groups, chooses_with_bias), layer=routing(_groups_without_bias),
    ),
    Fault(
        name="a_group_too_many", family="D5", computes="experts of topk_group + 1 groups", references=("vllm-project/vllm#32058",),
        case="deepseek_v3", words="one group too many is kept", applies=has_groups, spec=_group_more(1),
    ),
)  # fmt: skip


# ---- D6 to D8: what becomes of the scores


def _always_renormalised(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    weights_MK, ids_MK = right.select_experts(logits_ME)
    return weights_MK / weights_MK.sum(-1, keepdim=True) * _factor(right), ids_MK


def _renormalised_after_the_factor(weights_MK: Tensor, ids_MK: Tensor) -> Routes:
    return weights_MK / weights_MK.sum(-1, keepdim=True), ids_MK


def _softmax_over_the_chosen(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    ids_MK = right.select_experts(logits_ME)[1]
    return wide(logits_ME).gather(1, ids_MK).softmax(-1) * _factor(right), ids_MK


def _raw_logits(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    ids_MK = right.select_experts(logits_ME)[1]
    return wide(logits_ME).gather(1, ids_MK) * _factor(right), ids_MK


def _plain_softmax(spec: MoESpec) -> MoESpec:
    return routing_rule(scoring_func="softmax", sparsemixer_epsilon=None)(spec)


def _renormalises(case: Case) -> bool:
    return case.spec.routing.renormalize


def _does_not_renormalise(case: Case) -> bool:
    return not case.spec.routing.renormalize


def _sparsemixer(case: Case) -> bool:
    return case.spec.routing.scoring_func == "sparsemixer"


def _scores_otherwise(kind: str) -> Callable[[Case], bool]:
    return lambda case: not _sparsemixer(case) and case.spec.routing.scoring_func != kind


def _router_scales(case: Case) -> bool:
    return case.scaled_by == "router" and case.spec.scale != 1.0 and case.experts != "monolithic"


WEIGHTS = (
    Fault(
        name="always_renormalised", family="D6", computes="w / Σw although the model does not",
        references=("flashinfer-ai/flashinfer#2889", "lablup/mlxcel#391", "jingyaogong/minimind#859"),
        case="olmoe", words="renormalised although the model does not", also=("D8", "D11"),
        applies=_does_not_renormalise, layer=routing(_always_renormalised),
    ),
    Fault(
        name="never_renormalised", family="D6", computes="w in place of w / Σw",
        references=("pytorch/torchtitan#1418", "AI-Hypercomputer/maxtext#1026"),
        case="mixtral", words="the weights are not renormalised",
        applies=_renormalises, spec=routing_rule(renormalize=False),
    ),
    Fault(
        name="renormalised_after_the_factor", family="D6", computes="s w / Σ(s w): R + S",
        references=("PaddlePaddle/PaddleFleet#1051",), also=("A2",),
        case="sarvam_moe", words="y = R + S", applies=both(_router_scales, _renormalises),
        layer=rerouted(_renormalised_after_the_factor),
    ),
    Fault(
        name="softmax_over_the_chosen", family="D8", computes="softmax of the K chosen logits", also=("D6",),
        references=("lablup/mlxcel#391", "vllm-project/vllm#43223", "NVIDIA/Megatron-LM#894"),
        case="lfm2_moe", words="softmax over the logits of the K chosen", layer=routing(_softmax_over_the_chosen),
    ),
    Fault(
        name="raw_logits", family="D7", computes="w = l", references=("sgl-project/sglang#35160",),
        case="qwen2_moe", words="the raw logits are the weights",
        applies=lambda case: _does_not_renormalise(case) and case.spec.routing.scoring_func == "softmax",
        layer=routing(_raw_logits),
    ),
    *(
        Fault(
            name=f"scored_by_{kind}", family="D8", also=("D6",), computes=f"{kind}(l)", references=references, case=case,
            words=f"scored by {kind} instead of", applies=_scores_otherwise(kind), spec=routing_rule(scoring_func=kind),
        )
        for kind, case, references in (
            ("softmax", "glm4_moe", ("flashinfer-ai/flashinfer#2889", "MetaX-MACA/vLLM-metax#284")),
            ("sigmoid", "ernie4_5_moe", ("flashinfer-ai/flashinfer#5211", "vllm-project/vllm#44347")),
            ("sqrtsoftplus", "minimax_m2", ("vllm-project/vllm#33620",)),
        )
    ),
    Fault(
        name="plain_softmax_for_sparsemixer", family="D8", computes="softmax(l), no mask", references=("vllm-project/vllm#33620",),
        case="phimoe", words="plain softmax instead of sparsemixer", applies=_sparsemixer, spec=_plain_softmax,
    ),
)  # fmt: skip


# ---- D9: dtypes


def _as_bf16(logits_ME: Tensor) -> Tensor:
    return logits_ME.bfloat16().to(logits_ME.dtype)


def _bf16_memory_read_as_fp32(logits_ME: Tensor) -> Tensor:
    """Pairs of short numbers as one long one; behind the end of the buffer stands the buffer again."""
    short = logits_ME.bfloat16().flatten()
    return torch.cat([short, short]).view(torch.float32)[: short.numel()].view(logits_ME.shape).to(logits_ME.dtype)


def _fp32_memory_read_as_bf16(logits_ME: Tensor) -> Tensor:
    short = logits_ME.float().flatten().view(torch.bfloat16)[: logits_ME.numel()]
    return short.view(logits_ME.shape).to(logits_ME.dtype)


def _scores_rounded_before_the_choice(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    scores_ME = _scores(logits_ME, _rule(right)).bfloat16().to(wide(logits_ME).dtype)
    ranked_ME = scores_ME if getattr(right, "bias_E", None) is None else scores_ME + _bias(right)
    return _weighed(right, scores_ME, _best(right, ranked_ME))


def _weights_in_bf16(weights_MK: Tensor, ids_MK: Tensor) -> Routes:
    return weights_MK.bfloat16().to(weights_MK.dtype), ids_MK


def _ids_read_as_int32(weights_MK: Tensor, ids_MK: Tensor) -> Routes:
    """Half of the buffer of int64 ids: each is followed by a 0."""
    short = ids_MK.long().flatten().view(torch.int32)[: ids_MK.numel()]
    return weights_MK, short.view(ids_MK.shape).to(ids_MK.dtype)


def _scores_all(case: Case) -> bool:
    """Scores of all experts stand in a table before the choice."""
    rule = case.spec.routing
    return not rule.score_after_topk and not rule.per_expert_scale and not _sparsemixer(case)


def _fp32_layer(case: Case) -> bool:
    return case.dtype == "fp32"


def _precise_logits_in_a_short_dtype(case: Case) -> bool:
    return case.dtype != "fp32" and case.spec.routing.precision.logits == "fp32"


def _router_in_the_layers_dtype(spec: MoESpec) -> MoESpec:
    return routing_rule(precision=replace(spec.routing.precision, logits="model"))(spec)


DTYPES = (
    Fault(
        name="logits_in_bf16", family="D9", computes="topk(bf16 l) in an fp32 layer",
        references=("wtdcode/vllm-backport#65", "vllm-project/vllm#54048", "vllm-project/vllm#14027"),
        case="deepseek_v2@tokens33", words="the router logits are rounded to bf16",
        applies=_fp32_layer, layer=logits(_as_bf16),
    ),
    Fault(
        name="router_in_the_layers_dtype", family="D9", computes="topk(bf16 l) in a bf16 layer whose router is fp32",
        references=("vllm-project/vllm#58076", "vllm-project/vllm-ascend#9617"),
        grids=("bf16.tokens256", "tp2.ep4.dp2.bf16.tokens256"),
        case="sarvam_moe@bf16.tokens256", words="the router logits are rounded to bf16", applies=_precise_logits_in_a_short_dtype,
        spec=_router_in_the_layers_dtype,
    ),
    Fault(
        name="bf16_logits_read_as_fp32", family="D9", computes="σ(l'), l' the bytes of bf16 l as fp32",
        references=("flashinfer-ai/flashinfer#2889",), case="deepseek_v3", words="the logits are stored as bf16 and read as fp32", layer=logits(_bf16_memory_read_as_fp32),
    ),
    Fault(
        name="fp32_logits_read_as_bf16", family="D9", also=("G5", "D12"), computes="σ(l'), l' the bytes of fp32 l as bf16",
        references=("vllm-project/vllm#33613",), case="minimax_m2", words="NaN", layer=logits(_fp32_memory_read_as_bf16),
    ),
    Fault(
        name="scores_in_bf16_before_the_choice", family="D9", computes="topk(bf16 σ)", references=("ViperEkura/AstrAI#57",),
        case="dots1@tokens33", words="the scores are rounded to bf16 before the choice", applies=both(_fp32_layer, _scores_all),
        layer=routing(_scores_rounded_before_the_choice),
    ),
    Fault(
        name="weights_in_bf16", family="D9", computes="bf16(w)", references=("sgl-project/sglang-jax#699", "sgl-project/sglang#39351"),
        case="mixtral", words="the router weights are rounded to bf16", applies=_fp32_layer,
        layer=rerouted(_weights_in_bf16),
    ),
    Fault(
        name="ids_read_as_int32", family="D15", computes="expert 0 for every other slot", references=("vllm-project/vllm#8430",),
        case="olmoe", words="the table of ids is stored as int64 and read as int32", layer=rerouted(_ids_read_as_int32),
    ),
)  # fmt: skip


# ---- D10 to D13: the side of the weight, no weight, overflow, how many


def _on_input(case: Case) -> bool:
    return case.spec.routing.weight_on == "input"


def _weighed_on_both_sides(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
    """The experts weigh their input, and the weight stays for what comes after."""
    own = kernel.experts if isinstance(kernel.experts, MonolithicExperts) else kernel
    own._weight_on_input = False
    inner = rows_of(kernel)
    right = inner.apply

    def apply(x_NP: Tensor, weights_N1: Tensor, local_N1: Tensor) -> Tensor:
        return right((wide(x_NP) * weights_N1).to(x_NP.dtype), weights_N1, local_N1)

    put(inner, "apply", apply)


def _weight_on_the_input(inner: TorchExperts, right: Apply) -> Apply:
    """Slot by slot: x times the weight, then the expert, then the plain sum."""

    def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        slots = []
        for k in range(local_NK.shape[1]):
            weighed_NP = (wide(x_NP) * weights_NK[:, k : k + 1]).to(x_NP.dtype)
            slots.append(right(weighed_NP, torch.ones_like(weights_NK[:, :1]), local_NK[:, k : k + 1]))
        return torch.stack(slots).sum(0)

    return apply


def _all_ones(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    weights_MK, ids_MK = right.select_experts(logits_ME)
    return torch.full_like(weights_MK, _factor(right)), ids_MK


def _all_alike(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    weights_MK, ids_MK = right.select_experts(logits_ME)
    return torch.full_like(weights_MK, _factor(right) / ids_MK.shape[1]), ids_MK


def _naive_softmax(offset: float) -> Callable[[FusedMoERouter, Tensor], Routes]:
    """exp(l) / Σ exp(l) in fp32 where every logit lies `offset` higher, which changes no softmax."""

    def select(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
        ids_MK, rule = right.select_experts(logits_ME)[1], _rule(right)
        exp_ME = (logits_ME.float() + offset).exp()
        weights_MK = exp_ME.gather(1, ids_MK)
        over_ME = weights_MK if rule.renormalize or rule.score_after_topk else exp_ME
        return weights_MK / over_ME.sum(-1, keepdim=True) * _factor(right), ids_MK

    return select


def _underflowing(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
    """Scores of logits below -17 are 0, and the guard against dividing by 0 keeps that 0."""
    weights_MK, ids_MK = _naive_softmax(-200.0)(right, logits_ME)
    return weights_MK.nan_to_num(0.0), ids_MK


def _more_experts(step: int) -> Callable[[MoESpec], MoESpec]:
    return lambda spec: routing_rule(top_k=spec.routing.top_k + step)(spec)


def _every_expert(spec: MoESpec) -> MoESpec:
    return routing_rule(top_k=spec.routing.num_experts)(spec)


def _several(case: Case) -> bool:
    return case.spec.routing.top_k > 1 and not _sparsemixer(case)


def _softmax(case: Case) -> bool:
    return case.spec.routing.scoring_func == "softmax" and not case.spec.routing.per_expert_scale


USES = (
    Fault(
        name="weight_on_the_output", family="D10", computes="w E(x) for E(w x)",
        references=("NVIDIA/TensorRT-LLM#3492", "vllm-project/vllm-ascend#2348", "sgl-project/sglang#7889", "vllm-project/llm-compressor#1907"),
        case="llama4", words="the weight multiplies the expert's output, not its input",
        applies=_on_input, spec=routing_rule(weight_on="output"),
    ),
    Fault(
        name="weight_on_both_sides", family="D10", computes="w E(w x) for E(w x)", references=("vllm-project/vllm#43694",),
        case="llama4", words="both the input and the output of the expert", applies=both(_on_input, takes_rows), layer=kernels(_weighed_on_both_sides),
    ),
    Fault(
        name="weight_on_the_input", family="D10", computes="E(w x) for w E(x)", references=("vllm-project/vllm#16744",),
        case="jamba", words="the router weight multiplies the expert's input, not its output",
        applies=lambda case: takes_rows(case) and case.experts == "auto" and not _on_input(case), layer=experts(_weight_on_the_input),
    ),
    Fault(
        name="weights_not_used", family="D11", computes="Σ E", references=("tjake/Jlama#201", "sgl-project/sglang#6274"),
        case="kimi_linear", words="the router weights are not used", also=("D6", "D8"), layer=routing(_all_ones),
    ),
    Fault(
        name="weights_all_alike", family="D11", computes="w = 1/K", references=("pie-project/pie#480",),
        case="exaone_moe", words="the same weight 1/K", also=("D6", "D8"), layer=routing(_all_alike),
    ),
    Fault(
        name="softmax_overflows", family="D12", computes="inf / inf", references=("sgl-project/sglang#34459",), also=("G5",),
        case="mixtral@tokens33", words="NaN", applies=_softmax, layer=routing(_naive_softmax(88.0)),
    ),
    Fault(
        name="softmax_underflows", family="D12", computes="0 / 0", references=("sgl-project/sglang#34459",), also=("G5",),
        case="olmoe", words="NaN", applies=_softmax, layer=routing(_naive_softmax(-200.0)),
    ),
    Fault(
        name="all_scores_underflow", family="D12", computes="0·R + S", references=("sgl-project/sglang#34459",), also=("A6",),
        case="qwen3_next", words="y = S", applies=_softmax, layer=routing(_underflowing),
    ),
    Fault(
        name="an_expert_too_many", family="D13", computes="R over k + 1", references=("JieShibo/MoLE#7",),
        case="jamba", words="one expert too many is chosen",
        applies=lambda case: not _sparsemixer(case) and not _on_input(case), spec=_more_experts(1),
    ),
    Fault(
        name="an_expert_too_few", family="D13", computes="R over k - 1", references=("Aleph-Alpha/Alpha-MoE#3",),
        case="granitemoehybrid", words="one expert too few is chosen", applies=_several, spec=_more_experts(-1),
    ),
    Fault(
        name="every_expert", family="D13", computes="R over all", references=("ggml-org/llama.cpp#14939",),
        case="mixtral", words="every expert is chosen", applies=lambda case: _several(case) and not has_groups(case), spec=_every_expert,
    ),
)  # fmt: skip

FAULTS: tuple[Fault, ...] = (*BIAS, *GROUPS, *WEIGHTS, *DTYPES, *USES)
