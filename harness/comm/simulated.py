"""All ranks of a grid in this process, one at a time: `run_ranks(grid, body)`.

Greenlets are the fast way and fit our own code. Torch ends the process when a greenlet switches below one of its own
calls (a `torch.library` operator), so code that we do not know runs on threads, which hand one baton around.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import greenlet  # type: ignore[import-untyped]
import torch
from torch import Tensor

from harness.case import Grid, groups_of
from harness.comm import Call, Communicator, Entry, Group, modes
from harness.comm.lockstep import Lockstep
from harness.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Ranks(Generic[T]):
    """What all ranks did, one place for each.

    results: what body returned, None on a rank that did not.    ledger: the collectives that took place.
    failure: the exception that ended the run early, or None.    failed_rank: who raised it; None if several disagree.
    """

    results: tuple[T, ...]
    ledger: tuple[tuple[Entry, ...], ...]
    failure: BaseException | None
    failed_rank: int | None

    def unwrap(self) -> tuple[T, ...]:
        """The results; raises the error of a failed run, with the rank as a note."""
        if self.failure is None:
            return self.results
        if self.failed_rank is not None:
            self.failure.add_note(f"raised on rank {self.failed_rank} of {len(self.results)}")
        raise self.failure


def run_ranks(grid: Grid, body: Callable[[Communicator], T], *, threads: bool = False) -> Ranks[T]:
    """Calls body on every rank of the grid, in lock step and in rank order; the same each time, to the bit.

    body starts in the mode state of torch that the caller has (gradients, inference mode, autocast, mode stacks), and
    what it changes there stays on its rank. threads: for code that we do not know.

    Never raises what body raises: a rank's exception (SystemExit included), a CollectiveMismatch, an impossible
    collective (UsageError) or a changed default dtype (UsageError) becomes the failure, and the other ranks are unwound
    through their finally blocks. Only KeyboardInterrupt passes through.
    """
    run = _Run(grid, body)
    if grid.ranks == 1:
        run.alone()
    elif threads:
        _on_threads(run)
    else:
        _on_greenlets(run)
    lockstep = run.close()
    if isinstance(lockstep.failure, KeyboardInterrupt):
        raise lockstep.failure
    ledger = tuple(map(tuple, lockstep.ledger))
    return Ranks(tuple(lockstep.results), ledger, lockstep.failure, lockstep.failed_rank)


class _Run:
    """One call of run_ranks. switch(rank): gives control away and returns when `rank`, the caller, may go on."""

    def __init__(self, grid: Grid, body: Callable[[Communicator], object]) -> None:
        self.size = grid.ranks
        self.body = body
        self.lockstep = Lockstep(self.size)
        self.home = modes.current()
        self.threads = [threading.get_ident()] * self.size
        self.comms = [
            Communicator(rank, self.size, *(Group(name, ranks, place, self.post) for name, ranks, place in groups))
            for rank, groups in enumerate(_groups(grid))
        ]
        self.switch: Callable[[int], object]

    def alone(self) -> None:
        """A grid of one rank: every collective is complete when it is called, so nothing ever switches."""
        self.switch = lambda rank: self.lockstep.next()
        self.lockstep.next()
        self.play(0)
        self.lockstep.next()

    def play(self, rank: int) -> None:
        """Runs body on one rank from beginning to end, inside its greenlet or thread; never raises."""
        try:
            try:
                result = self.body(self.comms[rank])
            finally:
                left = modes.leave_for(self.home)
                if left is not None:
                    left.stay()
            if left is not None and left.own.default_dtype != self.home.default_dtype:
                raise UsageError(_dtype_left(rank, left.own.default_dtype, self.home.default_dtype))
            self.lockstep.finish(rank, result)
        except BaseException as error:  # a layer's sys.exit is its failure, not ours
            self.lockstep.fail(rank, error)

    def post(self, call: Call) -> tuple[Tensor, ...]:
        """Stops the calling rank at its collective and returns its result when the group has met."""
        if call.rank != self.lockstep.running or threading.get_ident() != self.threads[call.rank]:
            raise UsageError(_not_running(call, self.lockstep.running))
        away = modes.leave_for(self.home)
        try:
            self.lockstep.arrive(call)
            self.switch(call.rank)
            results = self.lockstep.take(call.rank)
        finally:
            if away is not None:
                away.back()
        return results if away is None else modes.owned(results, away)

    def close(self) -> Lockstep:
        """The final state; lets go of it here, for a layer that is kept holds its communicator, and so this run."""
        lockstep, self.lockstep = self.lockstep, Lockstep(0)
        del self.switch, self.body
        return lockstep


class _Fibers(threading.local):
    """Idle greenlets of this thread; running code in a new one costs 30 us more than in one that ran before."""

    def __init__(self) -> None:
        self.idle: list[greenlet.greenlet] = []

    def take(self, count: int) -> list[greenlet.greenlet]:
        fibers = [self.idle.pop() if self.idle else self._new() for _ in range(count)]
        for fiber in fibers:
            fiber.parent = greenlet.getcurrent()
            fiber.gr_context = contextvars.copy_context()
        return fibers

    @staticmethod
    def _new() -> greenlet.greenlet:
        def serve() -> None:
            """Runs one job after the other, and goes back to the parent after each."""
            current = greenlet.getcurrent()
            while True:
                current.parent.switch()()

        fiber = greenlet.greenlet(serve)
        fiber.switch()
        return fiber


_FIBERS = _Fibers()


def _on_greenlets(run: _Run) -> None:
    fibers = _FIBERS.take(run.size)
    jobs = [functools.partial(run.play, rank) for rank in range(run.size)]
    next_rank = run.lockstep.next

    def switch(rank: int) -> None:
        chosen = next_rank()
        assert chosen is not None  # the caller waits, so somebody can go on or has to be unwound
        if chosen != rank:
            fibers[chosen].switch(jobs[chosen])  # the job starts a fiber; one that waits in its job ignores it

    run.switch = switch
    while (chosen := next_rank()) is not None:  # a fiber whose job ends returns to here
        fibers[chosen].switch(jobs[chosen])
    _FIBERS.idle.extend(fibers)  # not after a KeyboardInterrupt: a rank may still be in its job then


class _RankThread(threading.Thread):
    """A thread that waits for one job after the other; starting one for each case would double the cost."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="simulated-rank")
        self.job: Callable[[], None]
        self.wake = threading.Lock()
        self.wake.acquire()
        self.start()

    def run(self) -> None:
        while True:
            self.wake.acquire()
            self.job()


_IDLE: list[_RankThread] = []


def _on_threads(run: _Run) -> None:
    """The baton is the permission to run: whoever stops wakes the next one; the caller sleeps until all have ended."""
    threads = [_IDLE.pop() if _IDLE else _RankThread() for _ in range(run.size)]
    home = threading.Lock()
    home.acquire()

    def pass_baton(chosen: int | None) -> None:
        (home if chosen is None else threads[chosen].wake).release()

    def switch(rank: int) -> None:
        chosen = run.lockstep.next()
        if chosen != rank:
            pass_baton(chosen)
            threads[rank].wake.acquire()

    def job(rank: int, context: contextvars.Context) -> None:
        run.threads[rank] = threading.get_ident()
        arrival = modes.leave_for(run.home)
        context.run(run.play, rank)
        if arrival is not None:
            arrival.back()
        pass_baton(run.lockstep.next())

    run.switch = switch
    for rank, thread in enumerate(threads):
        thread.job = functools.partial(job, rank, contextvars.copy_context())
    pass_baton(run.lockstep.next())
    home.acquire()
    _IDLE.extend(threads)  # not after a KeyboardInterrupt: a rank may still be running then


@functools.cache
def _groups(grid: Grid) -> tuple[tuple[tuple[str, tuple[int, ...], int], ...], ...]:
    """For each rank its groups as (name, global ranks, place among them), in the order of a Communicator."""
    groups = groups_of(grid)
    mine = {(name, rank): ranks for name in ("tp", "ep", "dp") for ranks in groups[name] for rank in ranks}
    return tuple(
        tuple((name, mine[name, rank], mine[name, rank].index(rank)) for name in ("tp", "ep", "dp"))
        for rank in range(grid.ranks)
    )


def _not_running(call: Call, running: int | None) -> str:
    if running is None:
        who = "whose run is over; a layer keeps to the communicator of the run that built it"
    elif running != call.rank:
        who = f"but rank {running} is running; a layer keeps to the communicator that its build received"
    else:
        who = "but from another thread; collectives belong on the thread that calls the layer"
    return f"{call} on the communicator of rank {call.rank}, {who}"


def _dtype_left(rank: int, left: torch.dtype, home: torch.dtype) -> str:
    return (
        f"rank {rank} returned with the default dtype changed from {home} to {left}, for all that runs in its process. "
        f"Set it back before returning, or give the dtype to each tensor"
    )
