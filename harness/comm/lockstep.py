"""Who runs next: the ranks of a grid in lock step, as a state machine without threads, greenlets or clocks.

A rank runs until it calls a collective; it goes on when every rank of the group has called. When no rank can go on and
some still wait, they can never meet: that is known at once, and nobody hangs.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from harness.comm import Call, Entry, dtype_text
from harness.comm.collectives import resolve
from harness.errors import CollectiveMismatch, HarnessError


class Abandoned(BaseException):
    """Unwinds a rank whose run has failed elsewhere; no Exception, so that a layer's own handlers let it pass."""


class Lockstep:
    """The state of all ranks. A scheduler asks `next`, lets that rank run, and reports `arrive`, `finish` or `fail`.

    running: the rank that may run now.    results, ledger: one place for each rank.
    failure: the first error, or None.    failed_rank: who raised it; None if it is about several ranks.
    """

    def __init__(self, size: int) -> None:
        self.running: int | None = None
        self.results: list[Any] = [None] * size
        self.ledger: list[list[Entry]] = [[] for _ in range(size)]
        self.failure: BaseException | None = None
        self.failed_rank: int | None = None
        self._ready = deque(range(size))
        self._waiting: dict[int, Call] = {}
        self._delivered: dict[int, tuple[Tensor, ...]] = {}

    def next(self) -> int | None:
        """The rank to resume, or None if all have ended. After a failure: those that wait, to be unwound by `take`."""
        if not self._ready and self._waiting and self.failure is None:
            self.fail(None, self._mismatch())
        self.running = self._ready.popleft() if self._ready else None
        return self.running

    def arrive(self, call: Call) -> None:
        """The running rank has called a collective and stops; the last one of a group lets all of it go on."""
        if self.failure is not None:
            raise Abandoned  # a finally block that calls again
        self._waiting[call.rank] = call
        ranks, name = call.group.ranks, call.group.name
        calls = []
        for rank in reversed(ranks):  # the last rank comes last, so the first look settles it
            other = self._waiting.get(rank)
            if other is None or other.group.name != name:
                return
            calls.append(other)
        calls.reverse()
        try:
            results = resolve(calls)
        except HarnessError as error:
            self.fail(None, error)
            return
        entry = _entry(calls[0])
        for other, result in zip(calls, results, strict=True):
            rank = other.rank
            del self._waiting[rank]
            self._delivered[rank] = result
            self.ledger[rank].append(entry if other.tensors[0].shape == entry.shape else _entry(other))
        self._ready.extend(ranks)

    def take(self, rank: int) -> tuple[Tensor, ...]:
        """The result of the collective that the resumed rank had called. Raises Abandoned after a failure."""
        if self.failure is not None:
            raise Abandoned
        return self._delivered.pop(rank)

    def finish(self, rank: int, result: object) -> None:
        """The running rank has returned."""
        self.results[rank] = result

    def fail(self, rank: int | None, error: BaseException) -> None:
        """Ends the run: the first failure stays, ranks that wait are unwound, those that never started are dropped."""
        if self.failure is None:
            self.failure, self.failed_rank = error, rank
            self._ready = deque(sorted(self._waiting.keys() | self._delivered.keys()))

    def _mismatch(self) -> CollectiveMismatch:
        """Nobody can go on: told from the group of the lowest waiting rank."""
        call = self._waiting[min(self._waiting)]
        calls = {rank: self._doing(rank, call.group.name) for rank in call.group.ranks}
        return CollectiveMismatch(call.number, call.group.name, calls)

    def _doing(self, rank: int, group: str) -> str:
        call = self._waiting.get(rank)
        if call is None:
            return "returned"
        return str(call) if call.group.name == group else f"{call} of group {call.group.name}"


def _entry(call: Call) -> Entry:
    tensor = call.tensors[0]
    return Entry(call.group.name, call.op, call.group.ranks, dtype_text(tensor.dtype), tuple(tensor.shape))
