"""What each collective demands of its callers and what it gives them: pure functions over the calls of one group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from harness.comm import Call, tensor_text
from harness.errors import CollectiveMismatch, UsageError, ranks_text

Results = Sequence[tuple[Tensor, ...]]


def resolve(calls: Sequence[Call]) -> Results:
    """Each rank's result, in the order of the group; calls holds one call of every rank, in that order.

    Every result is new memory, so a rank that changes it, or what it gave, reaches no other.
    Raises CollectiveMismatch if the calls differ in what has to be equal, UsageError if they ask the impossible.
    """
    first = calls[0]
    agreement = _agreement(first)
    for call in calls[1:]:
        if call.op != first.op or _agreement(call) != agreement:
            raise CollectiveMismatch(first.number, first.group.name, {c.rank: str(c) for c in calls})
    rule = RULES[first.op]
    if problem := _not_tensors(first) or (None if rule.each else rule.problem(first)):
        everybody = ranks_text(first.group.ranks)
        raise UsageError(f"collective {first.number} of group {first.group.name}: {everybody}: {first}: {problem}")
    if rule.each:
        for call in calls:
            if problem := rule.problem(call):
                raise UsageError(
                    f"collective {call.number} of group {call.group.name}: rank {call.rank}: {call}: {problem}"
                )
    if torch.is_grad_enabled():
        with torch.no_grad():
            return rule.compute(calls)
    return rule.compute(calls)


def _agreement(call: Call) -> Hashable:
    """What has to be the same on all ranks."""
    for tensor in call.tensors:
        if not isinstance(tensor, Tensor):
            return tuple(map(tensor_text, call.tensors))
    return RULES[call.op].agreement(call)


def _not_tensors(call: Call) -> str | None:
    for tensor in call.tensors:
        if not isinstance(tensor, Tensor):
            return f"expected tensors, got {', '.join(map(tensor_text, call.tensors))}"
    return None


def _dtype_shape_argument(call: Call) -> Hashable:
    tensor = call.tensors[0]
    return tensor.dtype, tensor.shape, call.argument


def _dtype_and_shape_beside_dim(call: Call) -> Hashable:
    tensor, dim = call.tensors[0], _dim(call)
    return tensor.dtype, tensor.shape[:dim], tensor.shape[dim + 1 :], dim


def _dtype_and_row_shape(call: Call) -> Hashable:
    return call.tensors[0].dtype, call.tensors[0].shape[1:]


def _dtype_shape_dim(call: Call) -> Hashable:
    return call.tensors[0].dtype, call.tensors[0].shape, _dim(call), call.sizes


def _dtypes(call: Call) -> Hashable:
    return tuple(tensor.dtype for tensor in call.tensors)


def _dim(call: Call) -> int:
    """dim counted from the front; one that the tensor does not have stays as it came."""
    dims = call.tensors[0].dim()
    return call.argument + dims if -dims <= call.argument < 0 else call.argument


def _anything_goes(call: Call) -> None:
    return None


def _dim_missing(call: Call) -> str | None:
    dims = call.tensors[0].dim()
    return None if -dims <= call.argument < dims else f"expected a dim from {-dims} to {dims - 1}"


def _no_shares(call: Call) -> str | None:
    if problem := _dim_missing(call):
        return problem
    width, size = call.tensors[0].shape[call.argument], call.group.size
    if call.sizes:
        right = len(call.sizes) == size and min(call.sizes) >= 0 and sum(call.sizes) == width
        return None if right else f"expected {size} sizes of 0 or more that add up to {width}"
    if width % size:
        return f"dim {call.argument} of width {width} has no {size} equal shares; pad it to {width + -width % size}"
    return None


def _source_missing(call: Call) -> str | None:
    size = call.group.size
    return None if 0 <= call.argument < size else f"expected a source from 0 to {size - 1}, a rank's place in its group"


def _not_one_each(call: Call) -> str | None:
    size = call.group.size
    return None if len(call.tensors) == size else f"expected {size} tensors, one for each rank; got {len(call.tensors)}"


def _no_row_sizes(call: Call) -> str | None:
    rows, size = call.tensors[0].shape[0] if call.tensors[0].dim() else 0, call.group.size
    right = len(call.sizes) == size and min(call.sizes) >= 0 and sum(call.sizes) == rows
    return None if right else f"expected {size} sizes of 0 or more that add up to its {rows} rows"


def _all_reduce(calls: Sequence[Call]) -> Results:
    total = _sum(calls)
    return [(total,), *((total.clone(),) for _ in calls[1:])]


def _all_gather(calls: Sequence[Call]) -> Results:
    gathered = torch.cat([call.tensors[0] for call in calls], calls[0].argument)
    return [(gathered,), *((gathered.clone(),) for _ in calls[1:])]


def _reduce_scatter(calls: Sequence[Call]) -> Results:
    first, total = calls[0], _sum(calls)
    shares = total.split(first.sizes, first.argument) if first.sizes else total.chunk(len(calls), first.argument)
    return [(share.clone(),) for share in shares]


def _all_to_all(calls: Sequence[Call]) -> Results:
    return [tuple(sender.tensors[receiver].clone() for sender in calls) for receiver in range(len(calls))]


def _all_to_all_single(calls: Sequence[Call]) -> Results:
    parts = [call.tensors[0].split(call.sizes) for call in calls]
    counts = torch.tensor([call.sizes for call in calls])
    return [(torch.cat([sent[place] for sent in parts]), counts[:, place]) for place in range(len(calls))]


def _broadcast(calls: Sequence[Call]) -> Results:
    sent = calls[calls[0].argument].tensors[0]
    return [(sent.clone(),) for _ in calls]


def _sum(calls: Sequence[Call]) -> Tensor:
    """New memory; rounded to the dtype after each rank, in rank order."""
    total = calls[0].tensors[0]
    if len(calls) == 1:
        return total.clone()
    total = total + calls[1].tensors[0]
    for call in calls[2:]:
        total += call.tensors[0]
    return total


class Rule(NamedTuple):
    """agreement: what has to be equal.    problem: why no rank could ever call this.    compute: the results.

    each: whether ranks may ask for different things, so that the problem can be one rank's alone.
    """

    agreement: Callable[[Call], Hashable]
    problem: Callable[[Call], str | None]
    compute: Callable[[Sequence[Call]], Results]
    each: bool = False


RULES = {
    "all_reduce": Rule(_dtype_shape_argument, _anything_goes, _all_reduce),
    "all_gather": Rule(_dtype_and_shape_beside_dim, _dim_missing, _all_gather),
    "reduce_scatter": Rule(_dtype_shape_dim, _no_shares, _reduce_scatter),
    "all_to_all": Rule(_dtypes, _not_one_each, _all_to_all),
    "all_to_all_single": Rule(_dtype_and_row_shape, _no_row_sizes, _all_to_all_single, each=True),
    "broadcast": Rule(_dtype_shape_argument, _source_missing, _broadcast),
}
