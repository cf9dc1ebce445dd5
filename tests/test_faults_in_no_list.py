"""Faults that the bank does not have: found, told in words that name them, and never by another family's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.case import parse
from harness.check import check
from harness.comm import Communicator
from harness.faults.fault import Fault, FaultyRunner
from harness.faults.plant import answering, experts, logits, put, rerouted, routing, sharing
from harness.faults.reduce import reducing, scattering
from harness.faults.rules import tensors
from harness.finding import Finding, Verdict
from harness.runner.layer import FusedMoE
from harness.runner.router import FusedMoERouter
from reference.spec import MoESpec


def found(text: str, **hooks: object) -> Finding:
    fault = Fault(name="", family="", computes="", references=(), case="", words="", **hooks)  # type: ignore[arg-type]
    finding = check(parse(text), FaultyRunner(fault))
    assert finding.verdict is Verdict.MISMATCH
    return finding


def stored(change: Callable[[Tensor], Tensor], *names: str) -> dict[str, object]:
    return {"weights": tensors(lambda spec, t: change(t.clone()), *names)}


def expert(e: int, change: Callable[[Tensor], Tensor], *names: str) -> dict[str, object]:
    """One expert's tensors changed."""

    def one(t: Tensor) -> Tensor:
        t[e] = change(t[e])
        return t

    return stored(one, *names)


def swapped(t: Tensor) -> Tensor:
    return t.unflatten(0, (2, -1)).flip(0).flatten(0, 1)


def transposed(t: Tensor) -> Tensor:
    return t.reshape(*t.shape[:-2], t.shape[-1], t.shape[-2]).mT.contiguous()


def rows(change: Callable[[Tensor, int], Tensor]) -> dict[str, object]:
    """What the experts read, changed."""
    return {"layer": experts(lambda inner, right: lambda x, w, ids: right(change(x, len(x)), w, ids))}


def sum_of(change: Callable[[Tensor, Communicator], Tensor]) -> dict[str, object]:
    return {"layer": reducing(change)}


def gathered(partial: Tensor, comm: Communicator) -> Tensor:
    return comm.tp.all_gather(partial[None])


def by_strings(spec: MoESpec, given: dict[str, Tensor], comm: Communicator) -> dict[str, Tensor]:
    order = sorted(range(spec.routing.num_experts), key=str)
    return {name: t[order] if name in ("w13", "w2") else t for name, t in given.items()}


def again(slot: int, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return weights, ids.index_copy(1, torch.tensor([slot]), ids[:, :1])


def louder_gate(t: Tensor) -> Tensor:
    half = len(t) // 2
    return torch.cat([t[:half] * 1.03, t[half:]])


def reading(change: Callable[[Tensor], Tensor]) -> dict[str, object]:
    """What the gate reads, changed."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.gate
        put(layer, "gate", lambda x_MH: right(change(x_MH)))

    return {"layer": plant}


def on_inputs() -> dict[str, object]:
    """Each slot's weight multiplies what its expert reads."""

    def slots(inner, right):
        def apply(x, w, ids):
            one = torch.ones_like(w[:, :1])
            return sum(right(x * w[:, k, None], one, ids[:, k, None]) for k in range(w.shape[1]))

        return apply

    return {"layer": experts(slots)}


# What is done, the case, the words, the family.
NAMED = {
    "w13 as its transpose": ("olmoe@tp2.tokens33", stored(transposed, "w13"), "w13 are taken for those of the transpose", "F2"),
    "shared w2 as its transpose": ("glm4_moe@tp2", stored(transposed, "shared_w2"), "w2 are taken for those of the transpose, in the shared", "F2"),
    "w2 in fp8": ("mixtral@tp2.tokens33", stored(lambda t: t.to(torch.float8_e4m3fn).to(t.dtype), "w2"), "fp8 (e4m3) weights in w2", "P1"),
    "w13 in bf16": ("deepseek_v3@tp4.ep4", stored(lambda t: t.bfloat16().to(t.dtype), "w13"), "bf16 weights in w13", "P1"),
    "one expert's halves": ("mixtral@tokens33", expert(3, swapped, "w13"), "gate and up are exchanged in the routed experts, in expert 3 alone", "F1"),
    "one expert counts nothing": ("gpt_oss@tp4.ep4.tokens33", expert(15, lambda t: 0 * t, "w2"), "the w2 of expert 15 counts 0", "F7"),
    "experts in the order of their names": ("deepseek_v3@tp2.tokens33", {"weights": by_strings}, "expert 10 computes for expert 2", "F7"),
    "the router's tokens in bf16": ("deepseek_v3@tp2.tokens33", reading(lambda x: x.bfloat16().to(x.dtype)), "the router reads bf16 tokens", "D9"),
    "the router's matrix in fp16": ("qwen3_next@tp2", stored(lambda t: t.half().to(t.dtype), "router_weight"), "the router reads its matrix in fp16", "D9"),
    "router weights in fp16": ("qwen3_next@tp2", {"layer": rerouted(lambda w, i: (w.half().float(), i))}, "the router weights are rounded to fp16", "D9"),
    "weights with s squared": ("deepseek_v3@tp2+scale=router", {"layer": rerouted(lambda w, i: (w * w, i))}, "the router weight, with s in it, is applied twice", "D10"),
    "weights with s on the input": ("deepseek_v3@tp2+scale=router", on_inputs(), "the router weight, with s in it, multiplies the expert's input", "D10"),
    "one expert 3 % too large": ("deepseek_v3@tp2.fp16.tokens33", expert(8, lambda t: t * 1.03, "w2"), "expert 8 counted 2.51", "F7"),
    "another token's row": ("olmoe@tp2.tokens33", rows(lambda x, n: x.roll(-1, 0)), "compute the rows of other tokens: each token gets what its experts make of the one after it", "H2"),
    "rows beyond the 20th": ("mixtral@tokens33", rows(lambda x, n: torch.cat([x[:20], x[:1].expand(max(n - 20, 0), -1)])), "every token gets what its experts make of token 0", "H2"),
    "columns of R": ("deepseek_v3@tp2.tokens33", stored(lambda t: t.roll(1, 1), "w2"), "columns of R stand in the wrong places", "H4"),
    "half of the rows summed": ("mixtral@tp2.tokens33", sum_of(lambda p, c: torch.cat([c.tp.all_reduce(p)[:16], p[16:]])), "y = R_own instead of R in 17 of 33 tokens", "B1"),
    "a choice made twice": ("deepseek_v3@tp2.tokens33", {"layer": rerouted(lambda w, i: again(1, w, i))}, "choice 2 of each token is choice 1 again", "D13"),
    "half of x": ("deepseek_v3@tp4.ep4", {"layer": answering(lambda y, x, layer, comm: y + x / 2)}, "adds its input x, times 1/2", "H1"),
    "x in place of y on one rank": ("mixtral@tp2", {"layer": answering(lambda y, x, layer, comm: x if comm.rank == 1 else y)}, "returns its input", "H1"),
    "s on one rank's S": ("deepseek_v3@tp4.ep4.tokens33", {"layer": sharing(lambda module, x, comm: module(x) * (2.4375 if comm.rank == 0 else 1.0))}, "multiplies the share of S of rank 0", "A3"),
    "averaged over dp": ("mixtral@tp2.ep4.dp2.tokens34", {"layer": scattering(lambda group, out, home: group.reduce_scatter(out, 0, home) / group.size)}, "y = 1/dp*R instead of R", "B13"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_fault_that_nobody_planted_is_named_by_what_it_computes(name: str):
    case, hooks, words, family = NAMED[name]
    finding = found(case, **hooks)
    assert words in finding.diagnosis, finding.diagnosis
    assert finding.family == family, finding.diagnosis


# Several causes compute the same here, or none of ours does: what is read may be told, a name may not.
NAMELESS = {
    "S halved where tp is 2": ("deepseek_v3@tp2", {"layer": sharing(lambda module, x, comm: module(x) / 2)}, "y = s*R + 1/2*S"),
    "a quarter where tp and K are 4": ("gpt_oss@tp4.ep4", {"layer": rerouted(lambda w, i: (w / 4, i))}, "but tp=3, ep=3 reads otherwise"),
    "a quarter where tp is 4 and K is not": ("mixtral@tp4", {"layer": answering(lambda y, x, layer, comm: y / 4)}, "but tp=3 reads otherwise"),
    "shared experts of half the input": ("ernie4_5_vl_moe@tp4.bf16.tokens33", {"layer": sharing(lambda module, x, comm: module(x / 2))}, ""),
    "two ranks' results exchanged": ("mixtral@tp2", sum_of(lambda p, c: gathered(p, c)[(c.tp.rank + 1) % c.tp.size]), "y = [0, 1]*R_r"),
    "the largest of the ranks": ("mixtral@tp4", sum_of(lambda p, c: gathered(p, c).amax(0)), "unknown"),
    "one choice, one expert gone": ("llama4@tp2.ep4.dp2.tokens33", expert(15, lambda t: 0 * t, "w2"), "exactly the tokens that visit expert 15"),
    "another temperature": ("phimoe@tp2.ep4.dp2.tokens34", {"layer": logits(lambda each: each / 2)}, "another normalisation"),
    "one gate 3 % too large": ("deepseek_v3@tp2.fp16.tokens33", expert(8, louder_gate, "w13"), ""),
    "y cut at a half": ("deepseek_v3@tp2", {"layer": answering(lambda y, x, layer, comm: y.clamp(-0.5, 0.5))}, "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMELESS)
def test_what_could_be_several_causes_or_none_of_ours_is_found_without_a_name(name: str):
    case, hooks, words = NAMELESS[name]
    finding = found(case, **hooks)
    assert finding.family is None, finding.diagnosis
    assert words in finding.diagnosis, finding.diagnosis


def test_ranks_without_work_that_return_their_buffer_are_counted():
    def stale(inner, right):
        return lambda x, w, ids: right(x, w, ids) + (0 if bool((ids >= 0).any()) else x)

    finding = found("mixtral@tp8.ep8.tokens1", layer=experts(stale))
    assert finding.family == "G7", finding.diagnosis
    assert "ranks that no token needs return what stood in the buffer" in finding.diagnosis
    every = found("mixtral@tp8.ep8.tokens1", layer=answering(lambda y, x, layer, comm: y + 5 * x))
    assert every.family == "H1", every.diagnosis


def test_a_rounding_is_named_by_its_numbers_and_not_by_its_size():
    """As small an error that is no rounding to bf16 stays unknown."""

    def shaken(t: Tensor) -> Tensor:
        return t * (1 + 2.0**-9 * torch.rand(t.shape, generator=torch.Generator().manual_seed(0)).sub(0.5)).to(t.dtype)

    finding = found("mixtral@tp2.tokens33", **stored(shaken, "w13"))
    assert finding.family is None, finding.diagnosis


def of_scores(change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, object]:
    """The router's weights from other scores: (scores, correction bias) -> scores."""

    def select(right: FusedMoERouter, logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        ids_MK, bias_E = right.select_experts(logits_ME)[1], right.bias_E  # type: ignore[attr-defined]
        weights_MK = change(logits_ME.float().sigmoid(), bias_E).gather(1, ids_MK)
        return weights_MK / weights_MK.sum(-1, keepdim=True) * right.scale, ids_MK  # type: ignore[attr-defined]

    return {"layer": routing(select)}


def test_a_bias_taken_off_again_in_bf16_is_told_with_and_without_an_offset():
    def taken_off(offset: float) -> dict[str, object]:
        return of_scores(
            lambda scores, bias: ((scores + bias + offset).bfloat16() - (bias + offset).bfloat16()).float()
        )

    plain, far = (found("sarvam_moe@tp2.tokens33", **taken_off(offset)) for offset in (0.0, 16.0))
    assert plain.family == far.family == "D4"
    assert "added to the scores and taken off again in bf16" in plain.diagnosis
    assert "the scores are multiples of" in far.diagnosis


def test_scores_rounded_to_the_nearest_eighth_are_no_bias_that_was_taken_off():
    finding = found("sarvam_moe@tp2.tokens33", **of_scores(lambda scores, bias: (scores * 8).round() / 8))
    assert finding.family is None, finding.diagnosis


def test_a_row_that_no_single_token_explains_is_not_called_another_tokens_row():
    finding = found("olmoe@tp2.tokens33", **rows(lambda x, n: (x.roll(1, 0) + x.roll(2, 0)) / 2))
    assert finding.family is None, finding.diagnosis


def test_a_wrong_law_of_one_expert_is_not_told_where_its_input_is_wrong_as_well():
    hooks = expert(3, lambda t: swapped(t) * 1.5, "w13")
    finding = found("mixtral@tokens33", **hooks)
    assert finding.family is None, finding.diagnosis


def test_int32_ids_in_a_second_half_are_no_first_half():
    """The table read from its middle on is another misreading than the one that is known."""

    def second_half(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        read = ids.long().flatten().view(torch.int32)[ids.numel() :]
        return weights, read.view(ids.shape).to(ids.dtype)

    assert found("olmoe@tokens33", layer=rerouted(second_half)).family is None


def test_a_spec_that_is_the_models_own_passes_on_every_grid_used_here():
    for case in {case for case, *_ in (*NAMED.values(), *NAMELESS.values())}:
        clean = Fault(name="", family="", computes="", references=(), case="", words="", spec=replace)
        assert check(parse(case), FaultyRunner(clean)).verdict is Verdict.OK
