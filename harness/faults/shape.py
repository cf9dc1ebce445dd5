"""Faults of shape: ids that are nobody's, slots that nobody wrote, rows that are padding, no rows at all, lists of tokens.

M tokens, N tokens on this rank, K top-k, H hidden, P kernel width. A local id is -1 where the expert is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.faults.applies import both, has_experts_elsewhere, takes_rows
from harness.faults.fault import Fault
from harness.faults.plant import Apply, Plant, Routes, experts, put, rerouted
from harness.faults.rules import tensors
from harness.runner.experts import TorchExperts
from harness.runner.layer import FusedMoE
from reference.spec import MoESpec


def _held(inner: TorchExperts) -> int:
    return inner.weights.w13_EnP.shape[0]


def _rows_elsewhere(case: Case) -> bool:
    """Experts are asked for slots that are none of theirs."""
    return has_experts_elsewhere(case) and takes_rows(case)


# ---- G1, G3: the id -1


def _wraps(inner: TorchExperts, right: Apply) -> Apply:
    return lambda x_NP, weights_NK, local_NK: right(x_NP, weights_NK, local_NK % max(_held(inner), 1))


def _is_expert_0(inner: TorchExperts, right: Apply) -> Apply:
    return lambda x_NP, weights_NK, local_NK: right(x_NP, weights_NK, local_NK.clamp(min=0))


# ---- G2, G4: slots and rows that nobody wrote


def _unwritten(value: float) -> Callable[[TorchExperts, Apply], Apply]:
    """The results of all K slots are added, those too that no expert here has written."""

    def wrong(inner: TorchExperts, right: Apply) -> Apply:
        def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
            y = right(x_NP, weights_NK, local_NK)
            elsewhere = (local_NK < 0)[:, :, None] if y.dim() == 3 else (local_NK < 0).sum(1, keepdim=True)
            return torch.where(elsewhere > 0, y + elsewhere * value, y).to(y.dtype)

        return apply

    return wrong


def _bias_for_nobody(inner: TorchExperts, right: Apply) -> Apply:
    """Slots of experts elsewhere get the second bias of the first expert here, and it is not masked afterwards."""
    bias_EP = inner.weights.b2_EP
    assert bias_EP is not None

    def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        y = right(x_NP, weights_NK, local_NK)
        elsewhere = (local_NK < 0)[:, :, None] if y.dim() == 3 else (local_NK < 0).sum(1, keepdim=True)
        return (y + elsewhere * bias_EP[:1]).to(y.dtype)

    return apply


# ---- G5, G6: rows of padding


def _scaled_by_the_largest(inner: TorchExperts, right: Apply) -> Apply:
    """Rows are divided by a power of two near their largest number and multiplied by it: exact, if that is a number."""

    def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        largest = x_NP.abs().amax() if x_NP.numel() else x_NP.new_ones(())
        scale = 2.0 ** largest.log2().ceil()
        return right(x_NP / scale * scale, weights_NK, local_NK)

    return apply


def _padding_fills_expert_0(layer: FusedMoE, comm: Communicator) -> None:
    """NaN logits of padding choose expert 0 K times; its list has one place for each token, and real ones are pushed out."""
    right = layer.runner._route

    def route(logits_ME: Tensor, num_tokens: int | None, micro_batch: int) -> Routes:
        weights_MK, ids_MK = right(logits_ME, num_tokens, micro_batch)
        if num_tokens is not None:
            row, slot = (ids_MK == 0).nonzero(as_tuple=True)
            pushed = (len(ids_MK) - num_tokens) * ids_MK.shape[1]
            weights_MK[row[-pushed:], slot[-pushed:]] = 0.0
        return weights_MK, ids_MK

    put(layer.runner, "_route", route)


def _first_choice_again(weights_MK: Tensor, ids_MK: Tensor) -> Routes:
    """What was chosen is not taken out of the race."""
    return weights_MK[:, :1].expand_as(weights_MK).clone(), ids_MK[:, :1].expand_as(ids_MK).clone()


# ---- G7: no rows


def _without_rows(change: Callable[[Tensor], Tensor]) -> Plant:
    """What a layer answers to M = 0."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.runner.steps

        def steps(x_MH: Tensor, *given: Any) -> Generator[None, None, Tensor]:
            y_MH = yield from right(x_MH, *given)
            return change(y_MH) if len(x_MH) == 0 else y_MH

        put(layer.runner, "steps", steps)

    return plant


def _refused(y_MH: Tensor) -> Tensor:
    raise RuntimeError("invalid argument: the pointer of an empty batch is null")


def _last_calls_row(y_MH: Tensor) -> Tensor:
    return y_MH.new_ones(1, y_MH.shape[1])


def _stale_without_work(inner: TorchExperts, right: Apply) -> Apply:
    """A rank that no token needs returns its buffer as it is: the tokens that came in."""

    def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        y = right(x_NP, weights_NK, local_NK)
        return y if bool((local_NK >= 0).any()) else y + (x_NP if y.dim() == 2 else x_NP[:, None])

    return apply


def _without_tokens(case: Case) -> bool:
    return any(rows.stop == rows.start for rows in case.rows) and case.grid.sp == 1


# ---- G8: offsets that do not fit their integer


def _offsets_wrap(spec: MoESpec, stored: Tensor) -> Tensor:
    """The arithmetic of 32 bits on an integer that the twin's w13 outgrows: the largest power of two that is too small."""
    offsets = torch.arange(stored.numel()) % 2 ** ((stored.numel() - 1).bit_length() - 1)
    return stored.flatten()[offsets].view(stored.shape)


# ---- G9: lists of tokens


def _beyond(capacity: int) -> Callable[[TorchExperts, Apply], Apply]:
    """An expert serves its first tokens alone."""

    def wrong(inner: TorchExperts, right: Apply) -> Apply:
        def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
            local_NK = local_NK.clone()
            for expert in range(_held(inner)):
                row, slot = (local_NK == expert).nonzero(as_tuple=True)
                local_NK[row[capacity:], slot[capacity:]] = -1
            return right(x_NP, weights_NK, local_NK)

        return apply

    return wrong


def _lists_off_by_one(inner: TorchExperts, right: Apply) -> Apply:
    """Unless the tokens fill whole tiles of 32, experts beyond the first read the row before."""

    def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        if len(x_NP) % 32 == 0:
            return right(x_NP, weights_NK, local_NK)
        first = right(x_NP, weights_NK, torch.where(local_NK == 0, local_NK, -1))
        return first + right(x_NP.roll(1, 0), weights_NK, torch.where(local_NK > 0, local_NK, -1))

    return apply


def _lists_overwritten(inner: TorchExperts, right: Apply) -> Apply:
    """The last block of 8 experts is not full, and its lists are written over those of the first three."""

    def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        lost = (local_NK >= 0) & (local_NK < 3)
        return right(x_NP, weights_NK, local_NK.masked_fill(lost, -1))

    return apply


def _no_whole_blocks(case: Case) -> bool:
    return case.grid.ep == 1 and case.shared == "separate" and case.spec.routing.num_experts % 8 != 0


_PADDED = ("tp1.tokens33+junk=3", "tp2.ep2.tokens33+junk=3", "tp2.ep4.dp2.tokens33+junk=3.kernel=deepep_ht")
_EMPTY = ("tp1.tokens0", "tp2.ep2.tokens0", "tp2.ep4.dp2.tokens7_0+kernel=deepep_ht")

FAULTS: tuple[Fault, ...] = (
    Fault(
        name="minus_1_wraps", family="G1", computes="+ w E_last on every rank that has not the expert",
        references=("vllm-project/vllm#46408", "vllm-project/vllm#42034", "sgl-project/sglang#24171"),
        case="mixtral@tp2.ep2", words="the id -1 of experts that are elsewhere is taken for the last expert", applies=_rows_elsewhere, layer=experts(_wraps),
    ),
    Fault(
        name="unwritten_slots_added", family="G2", computes="+ junk for each slot that nobody wrote",
        references=("vllm-project/vllm#46408",),
        case="mixtral@tp4.ep4.tokens33+kernel=deepep_ht", words="slots that nobody wrote hold 3 and are added",
        applies=_rows_elsewhere, layer=experts(_unwritten(3.0)),
    ),
    Fault(
        name="unwritten_slots_are_nan", family="G2", computes="NaN", references=("pytorch/torchtitan#1237",), also=("G5",),
        case="mixtral@tp2.ep2", words="NaN", applies=_rows_elsewhere, layer=experts(_unwritten(float("nan"))),
    ),
    Fault(
        name="padding_given_to_expert_0", family="G3", computes="+ w E_0 on every rank that has not the expert",
        references=("vllm-project/vllm#35161", "sgl-project/sglang#12701"),
        case="mixtral@tp2.ep2", words="the id -1 of experts that are elsewhere is taken for the first expert", applies=_rows_elsewhere, layer=experts(_is_expert_0),
    ),
    Fault(
        name="bias_for_nobody", family="G4", computes="out(pad) = b in place of 0", references=("AI-Hypercomputer/maxtext#3699",),
        case="gpt_oss@tp2.ep2", words="unknown", applies=lambda case: _rows_elsewhere(case) and case.spec.experts.bias,
        layer=experts(_bias_for_nobody),
    ),
    Fault(
        name="scale_reads_padding", family="G5", computes="amax over rows of padding: NaN", references=("flashinfer-ai/flashinfer#3057",),
        grids=_PADDED,
        case="mixtral@tp2+junk=3", words="NaN in 7 of 7 rows",
        applies=lambda case: takes_rows(case) and case.junk != "0", layer=experts(_scaled_by_the_largest),
    ),
    Fault(
        name="padding_fills_expert_0", family="G6", computes="real tokens of expert 0 are lost",
        references=("vllm-project/vllm#39391", "vllm-project/vllm#39593"), also=("F7", "G9"),
        grids=_PADDED,
        case="mixtral@tokens33+junk=3", words="expert 0 counted 0", applies=lambda case: case.junk != "0",
        layer=_padding_fills_expert_0,
    ),
    Fault(
        name="first_choice_again", family="G6", computes="ids = [e] * K", references=("vllm-project/vllm-omni#7175", "vllm-project/vllm#39391"),
        case="mixtral", words="the first choice of a token is all its choices", applies=lambda case: case.spec.routing.top_k > 1, layer=rerouted(_first_choice_again),
    ),
    Fault(
        name="a_row_for_no_rows", family="G7", computes="[1, H] for [0, H]", references=("ROCm/Megatron-LM#155",),
        grids=_EMPTY,
        case="mixtral@tp2.tokens0", words="], expected fp32[0, ", applies=_without_tokens,
        layer=_without_rows(_last_calls_row),
    ),
    Fault(
        name="no_rows_refused", family="G7", computes="an error for [0, H]", references=("sgl-project/sglang#38773",),
        grids=_EMPTY,
        case="mixtral@tp2.tokens0", words="RuntimeError", applies=_without_tokens,
        layer=_without_rows(_refused),
    ),
    Fault(
        name="stale_without_work", family="G7", computes="R + what stood in the buffer", references=("ROCm/Megatron-LM#155",),
        grids=("tp8.ep8.tokens1", "tp8.ep8.bf16.tokens1", "tp2.ep8.dp4.tokens1_0_1_0"),
        case="mixtral@tp4.ep4.tokens1", words="y = R + 2*x", also=("H1", "G2"), applies=_rows_elsewhere, layer=experts(_stale_without_work),
    ),
    Fault(
        name="offsets_too_short", family="G8", computes="late experts read from the start of w13, by shorter integers than 32 bits",
        references=("linkedin/Liger-Kernel#1296", "vllm-project/vllm#45907", "vllm-project/vllm#50220"),
        case="mixtral@tokens33", words="offsets that wrap at 2^15", applies=lambda case: case.quant == "none",
        weights=tensors(_offsets_wrap, "w13"),
    ),
    Fault(
        name="first_token_alone", family="G9", computes="each expert serves one token", references=("vllm-project/vllm-xpu-kernels#453",),
        case="jamba@tokens33", words="no expert serves more than its first 1 token", applies=takes_rows, layer=experts(_beyond(1)),
    ),
    Fault(
        name="sixteen_tokens_alone", family="G9", computes="each expert serves 16 tokens", references=("NVIDIA/Megatron-LM#6086",),
        grids=("tp1.tokens256", "tp4.ep4.tokens256", "tp2.ep4.dp2.bf16.tokens256+kernel=deepep_ht"),
        case="mixtral@tokens128", words="no expert serves more than its first 16 tokens", applies=takes_rows,
        layer=experts(_beyond(16)),
    ),
    Fault(
        name="lists_off_by_one", family="G9", computes="rows of other tokens, expert 0 right", references=("tenstorrent/tt-metal#50669",),
        case="mixtral@tokens33", words="the lists of experts 1 to 7 hold other tokens", also=("H2",), applies=takes_rows, layer=experts(_lists_off_by_one),
    ),
    Fault(
        name="lists_overwritten", family="G9", computes="R without experts 0 to 2", references=("ModelTC/LightLLM#1369",), also=("F7",),
        case="glm4_moe@tokens33", words="counted 0", applies=both(takes_rows, _no_whole_blocks), layer=experts(_lists_overwritten),
    ),
)  # fmt: skip
