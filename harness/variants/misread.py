"""Bytes read as what they are not: another dtype, the transpose, one place too far; of tables of a call and of weights.

A table is read by each group of ranks with tokens of its own: a block of rows. What stands behind its end is not known;
rows that would come from there are NaN in the output, and nobody is judged by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.problem import Problem
from harness.variants.law import Variant, run, ties_as_picked, with_tensor, with_weights
from reference.moe import Choice, Stages

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}

# One block of a table [m, n] -> as it is read; NaN, or -1 among ids, where it is not known.
Reading = Callable[[Tensor], Tensor]


def tables(given: Problem, picks_MK: Tensor | None, blocks: Sequence[Tensor]) -> Iterator[Variant]:
    """Logits, correction bias, ids and weights.    blocks: the rows of each table, int64; the commonest misreadings alone."""
    if given.spec.vision is not None:
        return
    stages = given.stages
    for what, read in _of_logits(given.dtype):
        yield Variant("D9", "logits", f"the logits {what}", partial(_by_logits, given, picks_MK, blocks, read))
    if given.spec.routing.correction_bias:
        for dtype, name in _SHORT.items():
            told = f"the fp32 correction bias is read as {name}, the first half of its bytes for all"
            name = "e_score_correction_bias"
            yield Variant("D3", "topk_ids", told, partial(with_tensor, given, name, partial(_cut_short, dtype)))
    if stages.topk_ids_MK.shape[1] > 1:
        for what, read in _OF_ROWS.items():
            yield Variant("D15", "topk_ids", f"the table of ids {what}", partial(_by_ids, given, blocks, read))
            yield Variant(
                "D15", "topk_weights", f"the table of weights {what}", partial(_by_weights, given, blocks, read)
            )
    for k in range(1, stages.topk_ids_MK.shape[1]):
        for j in dict.fromkeys((0, k - 1)):
            told = f"choice {k + 1} of each token is choice {j + 1} again, with its own weight"
            yield Variant("D13", "topk_ids", told, partial(_by_ids, given, blocks, partial(_again, k, j)))
    for what, read in _OF_IDS.items():
        yield Variant("D15", "topk_ids", f"the table of ids {what}", partial(_by_ids, given, blocks, read))


def matrices(given: Problem, tp: int) -> Iterator[Variant]:
    """Weights in the layout of their transpose, whole or piece by piece, in another short dtype, or one column too late."""
    if given.is_quantised:
        return
    own, shared = _Matrices(given, "", "routed"), _Matrices(given, "shared_", "shared")
    for side in (own, shared) if given.spec.shared is not None else (own,):
        for names in (("w13",), ("w2",), ("w13", "w2")):
            yield side.variant(names, "taken for those of the transpose", _transposed)
        if tp > 1 and side is own and given.spec.vision is None:
            pieces = partial(_piece_transposed, tp, given.spec.experts.transposed)
            yield side.variant(("w2",), "of each rank's piece taken for those of its transpose", pieces)
        for dtype, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
            if given.dtype is dtype:
                told = f"stored as {_SHORT[dtype]} and read as {_SHORT[other]}"
                yield side.variant(("w13", "w2"), told, partial(_as_dtype, dtype, other))
    for side in (own, shared) if given.spec.shared is not None else (own,):
        for name in ("w13", "w2"):
            most = (given.exact[side.prefix + name].numel() - 1).bit_length()  # of an offset that wraps nowhere
            for bits in range(most - 3, most):
                yield side.variant(
                    (name,), f"addressed by offsets that wrap at 2^{bits}", partial(_wrapped, bits), "G8"
                )
    latent = [name for name in ("fc1_latent", "fc2_latent") if name in given.exact]
    for name in (*latent, "router_weight"):
        family, stage = ("D9", "logits") if name == "router_weight" else ("F2", "output")
        told = f"the bytes of {name} are taken for those of the transpose"
        yield Variant(family, stage, told, partial(with_tensor, given, name, _transposed))


class _Matrices:
    """The matrices of the routed or of the shared experts. prefix: of their names.    stage: of a Variant."""

    def __init__(self, given: Problem, prefix: str, stage: str) -> None:
        self._given, self.prefix, self._stage = given, prefix, stage

    def variant(
        self, names: Sequence[str], what: str, change: Callable[[Tensor], Tensor], family: str = "F2"
    ) -> Variant:
        told = f"the bytes of {' and '.join(names)} are {what}, in the {self._stage} experts"
        whole = [self.prefix + name for name in names]
        return Variant(family, self._stage, told, partial(_changed, self._given, whole, change))


def _changed(given: Problem, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> Stages:
    exact = {n: change(t) if n.removeprefix("vision_") in names else t for n, t in given.exact.items()}
    return run(given, weights=exact)


def _transposed(stored: Tensor) -> Tensor:
    """The bytes of [.., a, b] as those of [.., b, a], back in the shape that is asked for."""
    return stored.reshape(*stored.shape[:-2], stored.shape[-1], stored.shape[-2]).mT


def _wrapped(bits: int, stored: Tensor) -> Tensor:
    """Offsets of an integer that is too short for them: what lies beyond is read from the start again."""
    offsets = torch.arange(stored.numel()) % 2**bits
    return stored.flatten()[offsets].view(stored.shape)


def _piece_transposed(tp: int, transposed: bool, stored: Tensor) -> Tensor:
    pieces = (stored.mT if transposed else stored).chunk(tp, -1)
    read = torch.cat([_transposed(piece.contiguous()) for piece in pieces], -1)
    return read.mT if transposed else read


def _as_dtype(dtype: torch.dtype, other: torch.dtype, stored: Tensor) -> Tensor:
    return stored.to(dtype).view(other).double()


def _cut_short(dtype: torch.dtype, bias_E: Tensor) -> Tensor:
    return bias_E.float().view(dtype)[: len(bias_E)].double()


def _of_logits(layer: torch.dtype) -> Iterator[tuple[str, Reading]]:
    for dtype, name in _SHORT.items():
        yield f"are stored as {name} and read as fp32", partial(_longer, dtype)
        yield f"are stored as fp32 and read as {name}, the first half of the bytes for all", partial(_shorter, dtype)
    yield "are stored as bf16 and read as fp16", partial(_as_dtype, torch.bfloat16, torch.float16)
    yield "are stored as fp16 and read as bf16", partial(_as_dtype, torch.float16, torch.bfloat16)
    yield from _OF_ROWS.items()


def _longer(dtype: torch.dtype, logits_mE: Tensor) -> Tensor:
    short = logits_mE.to(dtype).flatten()
    pairs = short[: len(short) // 2 * 2].view(torch.float32).double()
    return torch.cat([pairs, pairs.new_full((len(short) - len(pairs),), torch.nan)]).view(logits_mE.shape)


def _shorter(dtype: torch.dtype, logits_mE: Tensor) -> Tensor:
    return logits_mE.float().flatten().view(dtype)[: logits_mE.numel()].double().view(logits_mE.shape)


def _column_major(table_mn: Tensor) -> Tensor:
    return table_mn.flatten().view(table_mn.shape[1], table_mn.shape[0]).T


def _stored_column_major(table_mn: Tensor) -> Tensor:
    return table_mn.T.flatten().view(table_mn.shape)


def _from_the_next(table_mn: Tensor) -> Tensor:
    flat, unknown = table_mn.flatten(), -1 if table_mn.dtype is torch.int64 else torch.nan
    return torch.cat([flat[1:], flat.new_full((min(1, len(flat)),), unknown)]).view(table_mn.shape)


_OF_ROWS: dict[str, Reading] = {
    "is read by columns, it is stored by rows": _column_major,
    "is stored by columns and read by rows": _stored_column_major,
    "is read from one entry too far": _from_the_next,
}
_OF_IDS: dict[str, Reading] = {
    "is stored as int64 and read as int32, the first half of the bytes for all": lambda ids: (
        ids.contiguous().flatten().view(torch.int32)[: ids.numel()].long().view(ids.shape)
    ),
}


def _again(k: int, j: int, ids_mK: Tensor) -> Tensor:
    return ids_mK.index_copy(1, torch.tensor([k]), ids_mK[:, j : j + 1])


def _block_by_block(table: Tensor, blocks: Sequence[Tensor], read: Reading) -> Tensor:
    found = table.clone()
    for rows in blocks:
        found[rows] = read(table[rows])
    return found


def _by_logits(given: Problem, picks_MK: Tensor | None, blocks: Sequence[Tensor], read: Reading) -> Stages:
    logits_ME = _block_by_block(given.stages.logits_ME, blocks, read)
    unknown_M = logits_ME.isnan().any(-1)
    choice = ties_as_picked(given, given.spec.routing, picks_MK, logits_ME.nan_to_num(0.0, 3e38, -3e38))
    return _without(run(given, choice=choice), unknown_M)


def _by_ids(given: Problem, blocks: Sequence[Tensor], read: Reading) -> Stages:
    stages = given.stages
    ids_MK = _block_by_block(stages.topk_ids_MK, blocks, read)
    unknown_M = (ids_MK < 0).any(-1)
    choice = Choice(ids_MK.clamp(min=0), stages.topk_weights_MK, stages.margin_M)
    return _without(run(given, choice=choice), unknown_M)


def _by_weights(given: Problem, blocks: Sequence[Tensor], read: Reading) -> Stages:
    weights_MK = _block_by_block(given.stages.topk_weights_MK, blocks, read)
    return _without(with_weights(given, weights_MK.nan_to_num(0.0)), weights_MK.isnan().any(-1))


def _without(stages: Stages, unknown_M: Tensor) -> Stages:
    return replace(stages, output_MH=stages.output_MH.masked_fill(unknown_M[:, None], torch.nan))
