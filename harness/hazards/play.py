"""Plays a script of calls on all ranks of a grid, in lock step, and keeps what each call returned and what it touched."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.case import Case, groups_of
from harness.comm import Communicator, tensor_text
from harness.comm.simulated import run_ranks
from harness.errors import CollectiveMismatch, CouldNotRun, UsageError, raised_text
from harness.hazards.script import SECOND, Step
from harness.problem import Problem
from harness.systems import Layer, System

_FILL: Any = torch.utils.deterministic  # its one switch is a property that no stub knows
# torch.use_deterministic_algorithms also tells the compiler, which it imports for that: 2 s and 150 MiB
_set_deterministic: Any = torch._C._set_deterministic_algorithms
Inputs = Callable[[int, int], tuple[Tensor, dict[str, Tensor]]]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """The tokens, weights and law of the layers in a script: those of SECOND have another seed."""

    first: Problem
    second: Problem

    def of(self, layer: str) -> Problem:
        return self.second if layer == SECOND else self.first


@dataclass(slots=True, eq=False)
class Outcome:
    """What one call did on one rank.

    output: a copy of what it returned, [m, H], None where that has another shape, dtype or type, which `misshapen` tells.
    unit: it returned y * unit.    wrote_input: the hidden states were changed.
    calls: how many collectives the rank had made so far over tp, ep and dp.
    overwritten_by: the number of the step after which the tensor that it had returned held something else.
    """

    output: Tensor | None
    misshapen: str | None
    unit: float
    wrote_input: bool
    calls: tuple[int, int, int]
    overwritten_by: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class WrittenWeights:
    """names: of the tensors that a layer was given and that hold something else.    when: in words."""

    names: tuple[str, ...]
    when: str


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """The step that raised, or in which the ranks disagreed about collectives, and how that is told."""

    step: int
    sentence: str


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """outcomes: [step][rank], of the steps before the failure.    written: of each rank, None where nothing was written."""

    steps: Sequence[Step]
    outcomes: list[list[Outcome]]
    written: list[WrittenWeights | None]
    failure: Failure | None


@dataclass(slots=True)
class _Rank:
    """One rank while it plays. at: the number of its step."""

    at: int = 0
    built: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    written: WrittenWeights | None = None


class _Raised(Exception):
    """A layer raised; it says so on the rank's behalf."""


def play(case: Case, system: System, pools: Pools, steps: Sequence[Step]) -> Played:
    """Build each layer once on each rank and make the calls. Raises CouldNotRun if the first layer cannot be built."""
    states = [_Rank() for _ in range(case.grid.ranks)]
    given = functools.cache(lambda number, dp_rank: _inputs(steps[number], pools.of(steps[number].layer), dp_rank))

    def body(comm: Communicator) -> None:
        _play_rank(case, system, pools, steps, given, comm, states[comm.rank])

    with torch.inference_mode():
        ranks = run_ranks(case.grid, body, threads=system.foreign)
    _POISON.reset()
    done = min(len(state.outcomes) for state in states)
    outcomes = [[state.outcomes[number] for state in states] for number in range(done)]
    failure = _fewer_calls(case, outcomes)
    if ranks.failure is not None and failure is None:
        failure = _failure(ranks.failure, ranks.failed_rank, states)
    if failure is not None:
        del outcomes[failure.step :]
    return Played(steps, outcomes, [state.written for state in states], failure)


def _play_rank(
    case: Case, system: System, pools: Pools, steps: Sequence[Step], inputs_of: Inputs, comm: Communicator, state: _Rank
) -> None:
    """inputs_of: hidden states and keyword arguments of a step for a dp rank, to be copied before a layer gets them."""
    dp_rank = comm.rank // case.grid.tp
    layers: dict[str, Layer] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    kept: list[tuple[Tensor, Tensor]] = []  # what each call returned, and a copy of it
    sharers: dict[int, list[int]] = {}  # storage -> the steps that returned it
    for number, step in enumerate(steps):
        state.at = number
        given = pools.of(step.layer)
        x_MH, inputs = inputs_of(number, dp_rank)
        own_MH, inputs = x_MH.clone(), {name: rows.clone() for name, rows in inputs.items()}
        first = step.layer not in layers
        with _poisoned(step.poison):
            if first:
                weights[step.layer] = {name: tensor.clone() for name, tensor in given.weights.items()}
                layers[step.layer] = _build(case, system, weights[step.layer], comm, state)
                _look_at_weights(state, weights[step.layer], given, "while it was built")
            layer = layers[step.layer]
            try:
                output = layer(own_MH, **inputs)
            except (Exception, SystemExit) as error:
                raise _Raised(f"raises {raised_text(error)}") from error
        if first:
            _look_at_weights(state, weights[step.layer], given, "in its first call")
        misshapen = None
        if not isinstance(output, Tensor) or output.shape != x_MH.shape or output.dtype != x_MH.dtype:
            misshapen = f"returned {tensor_text(output)}, expected {tensor_text(x_MH)}"
        unit = float(getattr(layer, "output_unit", 1.0))
        calls = comm.tp.calls, comm.ep.calls, comm.dp.calls
        copy = output.clone() if isinstance(output, Tensor) else None
        good = copy if misshapen is None else None
        state.outcomes.append(Outcome(good, misshapen, unit, not same(own_MH, x_MH), calls))
        if kept and not same(*kept[-1]):
            state.outcomes[number - 1].overwritten_by = number
        kept.append((x_MH, x_MH) if copy is None else (output, copy))
        sharing = sharers.setdefault(kept[-1][0].untyped_storage().data_ptr(), [])
        for earlier in sharing:
            if state.outcomes[earlier].overwritten_by is None and not same(*kept[earlier]):
                state.outcomes[earlier].overwritten_by = number
        sharing.append(number)
    for outcome, (returned, copy) in zip(state.outcomes, kept, strict=True):
        if outcome.overwritten_by is None and not same(returned, copy):
            outcome.overwritten_by = len(steps)
    for layer_name, mine in weights.items():
        _look_at_weights(state, mine, pools.of(layer_name), "in a later call")


def _build(case: Case, system: System, weights: dict[str, Tensor], comm: Communicator, state: _Rank) -> Layer:
    try:
        layer = system.build(case, weights, comm)
    except CouldNotRun as error:
        if not state.built:
            raise
        raise _Raised(f"cannot be built: {error}") from error
    except (Exception, SystemExit) as error:
        if not state.built:
            raise CouldNotRun(f"{raised_text(error)} while it was built") from error
        raise _Raised(f"cannot be built: {raised_text(error)}") from error
    state.built = True
    return layer


def _inputs(step: Step, given: Problem, dp_rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    rows = step.rows[dp_rank]
    x_MH = given.tokens.hidden_states[rows]
    inputs = {} if given.tokens.is_vision is None else {"modality": given.tokens.is_vision[rows].long()}
    junk_M = step.junk_at(dp_rank)
    if junk_M is not None:
        assert step.junk is not None
        x_MH[junk_M] = step.junk
    return x_MH, inputs


def _look_at_weights(state: _Rank, mine: dict[str, Tensor], given: Problem, when: str) -> None:
    """Remember the first time at which tensors that the layer was given are not what they were."""
    if state.written is not None:
        return
    names = tuple(name for name, tensor in given.weights.items() if not same(mine[name], tensor))
    if names:
        state.written = WrittenWeights(names, when)


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    bits = _BITS.get(one.element_size())
    if bits is None or one.is_complex():
        return False
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def _fewer_calls(case: Case, outcomes: Sequence[Sequence[Outcome]]) -> Failure | None:
    """The first step in which ranks of a group made different numbers of collectives.

    Nobody need wait for that: the next call of one meets the last one of another.
    """
    for number, row in enumerate(outcomes):
        for place, name in enumerate(("tp", "ep", "dp")):
            for ranks in groups_of(case.grid)[name]:
                made = {rank: row[rank].calls[place] for rank in ranks}
                if len(set(made.values())) > 1:
                    before = {rank: outcomes[number - 1][rank].calls[place] if number else 0 for rank in ranks}
                    told = ", ".join(f"rank {rank}: {made[rank] - before[rank]}" for rank in ranks)
                    return Failure(number, f"makes more collectives over {name} on some ranks than on others ({told})")
    return None


def _failure(error: BaseException, failed_rank: int | None, states: Sequence[_Rank]) -> Failure:
    step = min(state.at for state in states)
    if isinstance(error, CollectiveMismatch):
        return Failure(step, f"leaves the ranks waiting for each other: {error}")
    if isinstance(error, _Raised):  # the others may still wait in the call before
        return Failure(step if failed_rank is None else states[failed_rank].at, str(error))
    if isinstance(error, UsageError):
        return Failure(step, f"asks for what cannot be: {error}")
    raise error if isinstance(error, CouldNotRun) else CouldNotRun(raised_text(error))


class _Poison:
    """Torch's own switch fills what it hands out uninitialised with NaN (integers with their largest value).

    It is one for the process, and ranks take turns within a call: on as long as any of them is inside.
    """

    def __init__(self) -> None:
        self._inside, self._before, self._lock = 0, (False, False, True), threading.Lock()

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = (
                    torch.are_deterministic_algorithms_enabled(),
                    torch.is_deterministic_algorithms_warn_only_enabled(),
                    _FILL.fill_uninitialized_memory,
                )
                _set_deterministic(True, warn_only=True)
                _FILL.fill_uninitialized_memory = True
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()

    def reset(self) -> None:
        """After a run: a rank that was unwound has left, but whoever was dropped has not."""
        with self._lock:
            if self._inside:
                self._inside = 0
                self._restore()

    def _restore(self) -> None:
        enabled, warn_only, fill = self._before
        _set_deterministic(enabled, warn_only=warn_only)
        _FILL.fill_uninitialized_memory = fill


_POISON = _Poison()


@contextmanager
def _poisoned(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    _POISON.enter()
    try:
        yield
    finally:
        _POISON.leave()
