"""Ranks that talk: the communicator a layer receives, the calls it makes on it, and the ledger that records them.

A group is a set of ranks with a name; "size" counts ranks. Collectives take and return tensors, nothing is changed in
place. `simulated.py` runs all ranks of a grid in this process, in lock step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One rank's part in a collective. argument: dim of all_gather and reduce_scatter, source of broadcast.

    index counts the calls of this rank on this group from 0.
    """

    rank: int
    group: Group
    index: int
    op: str
    tensors: tuple[Tensor, ...]
    argument: int

    def __str__(self) -> str:
        shapes = ", ".join(tensor_text(tensor) for tensor in self.tensors)
        extra = {"all_gather": "dim", "reduce_scatter": "dim", "broadcast": "source"}.get(self.op)
        return f"{self.op}({shapes}{f', {extra}={self.argument}' if extra and self.argument else ''})"


@dataclass(frozen=True, slots=True)
class Entry:
    """A collective that took place, as the ledger of one rank holds it."""

    group: str
    op: str
    ranks: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Group:
    """The ranks that share a name in the grid, as one of them sees it.

    name: "tp", "ep", "dp".    ranks: global numbers.    rank: this one's place among them.    size: how many they are.
    post: hands a call to the scheduler and returns this rank's result; groups of one rank never call it.
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

    def reduce_scatter(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """This rank's equal share, along dim, of the sum over the group."""
        return self._collect("reduce_scatter", (tensor,), dim)[0]

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sends tensors[i] to rank i of the group, returns what each rank sent here, in rank order."""
        return list(self._collect("all_to_all", tuple(tensors), 0))

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of the group's rank `source`, on every rank."""
        return self._collect("broadcast", (tensor,), source)[0]

    def _collect(self, op: str, tensors: tuple[Tensor, ...], argument: int) -> tuple[Tensor, ...]:
        call = Call(self.ranks[self.rank], self, self.calls, op, tensors, argument)
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

    def reduce_scatter(self, tensor: Tensor, dim: int = 0) -> Tensor:
        return self.tp.reduce_scatter(tensor, dim)

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.tp.all_to_all(tensors)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return self.tp.broadcast(tensor, source)


def tensor_text(tensor: object) -> str:
    """'fp32[7, 64]' for a tensor, the type's name for anything else."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    dtype = _SHORT.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return f"{dtype}{list(tensor.shape)}"
