"""Ranks that talk: the communicator a layer receives, the calls it makes on it, and the ledger that records them.

A group is a set of ranks with a name; "size" counts ranks. Collectives take and return tensors: nothing is changed in
place, every rank gets memory of its own, and no gradient flows through. `simulated.run_ranks` runs all ranks of a grid
in this process, in lock step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_ARGUMENT = {"all_gather": "dim", "reduce_scatter": "dim", "broadcast": "source"}


class Call(NamedTuple):
    """One rank's part in a collective; a tuple, because a case makes many and frozen dataclasses cost three times that.

    argument: dim of all_gather and reduce_scatter, source of broadcast, else 0.    sizes: the rows for each rank of an
    all_to_all_single; the unequal shares of a reduce_scatter, () for equal ones.    number counts the calls of this rank on this group from 0.
    """

    rank: int
    group: Group
    number: int
    op: str
    tensors: tuple[Tensor, ...]
    argument: int
    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        shapes = ", ".join(tensor_text(tensor) for tensor in self.tensors)
        argument = f", {_ARGUMENT[self.op]}={self.argument}" if self.argument else ""
        return f"{self.op}({shapes}{argument}{f', sizes={list(self.sizes)}' if self.sizes else ''})"


class Entry(NamedTuple):
    """A collective that took place, as the ledger of one rank holds it.

    dtype, shape: of the tensor this rank gave; of all_to_all, of the first.
    """

    group: str
    op: str
    ranks: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Group:
    """The ranks that share a name in the grid, as one of them sees it.

    name: "tp", "dp", or "ep": the ranks that together hold all experts once.    ranks: global numbers.    rank: this one's place among them.    size: how many they are.
    post: hands a call to the scheduler and returns this rank's result, also in groups of one rank.
    calls: how many collectives this rank has called here.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    post: Callable[[Call], tuple[Tensor, ...]]
    calls: int = field(default=0)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the group, added in rank order, on every rank. [*] -> [*], same dtype."""
        return self._collect("all_reduce", (tensor,), 0)[0]

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks one after the other along dim; they may differ in that dim."""
        return self._collect("all_gather", (tensor,), dim)[0]

    def reduce_scatter(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] = ()) -> Tensor:
        """This rank's share, along dim, of the sum over the group.

        sizes: the share of each rank; without them all are equal. UsageError if dim has no such shares.
        """
        return self._collect("reduce_scatter", (tensor,), dim, tuple(sizes))[0]

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sends tensors[i] to rank i of the group, returns what each rank sent here, in rank order; any shapes."""
        return list(self._collect("all_to_all", tuple(tensors), 0))

    def all_to_all_single(self, tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Sends the first sizes[0] rows to rank 0 of the group, the next sizes[1] to rank 1 and so on.

        Returns the rows that came here, in rank order, and how many came from each rank.
        """
        rows, counts = self._collect("all_to_all_single", (tensor,), 0, tuple(sizes))
        return rows, counts.tolist()

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of the group's rank `source` on every rank; the others give one of its shape and dtype."""
        return self._collect("broadcast", (tensor,), source)[0]

    def _collect(
        self, op: str, tensors: tuple[Tensor, ...], argument: int, sizes: tuple[int, ...] = ()
    ) -> tuple[Tensor, ...]:
        call = Call(self.ranks[self.rank], self, self.calls, op, tensors, argument, sizes)
        self.calls += 1
        return self.post(call)


@dataclass(slots=True, eq=False)
class Communicator:
    """What a layer receives: its rank, and the groups it belongs to. Collectives without a group run over tp.

    rank, world_size: among all ranks of the grid.    tp, ep, dp: Group.
    """

    rank: int
    world_size: int
    tp: Group
    ep: Group
    dp: Group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.tp.all_reduce(tensor)

    def all_gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        return self.tp.all_gather(tensor, dim)

    def reduce_scatter(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] = ()) -> Tensor:
        return self.tp.reduce_scatter(tensor, dim, sizes)

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.tp.all_to_all(tensors)

    def all_to_all_single(self, tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[int]]:
        return self.tp.all_to_all_single(tensor, sizes)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return self.tp.broadcast(tensor, source)


def dtype_text(dtype: torch.dtype) -> str:
    """'bf16' for torch.bfloat16, 'int64' for torch.int64."""
    return _SHORT.get(dtype) or str(dtype).removeprefix("torch.")


def tensor_text(tensor: object) -> str:
    """'fp32[7, 64]' for a tensor, the type's name for anything else."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{dtype_text(tensor.dtype)}{list(tensor.shape)}"
