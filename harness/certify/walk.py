"""One grid: all its states run, each one held against the law."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.certify import law, stacked, states
from harness.certify.law import Coefficients, Ledger
from harness.certify.ranks import on_ranks
from harness.certify.stacked import AskedForRank, Kept, StackedLayer
from harness.certify.states import CallState, LayerState
from harness.certify.world import DTYPES, LATER, World, world

# for every call of a layer: its code, and the places of its coefficients and of its ledger in the lists of them
Table = tuple[tuple[int, int, int], ...]
TOLD = 20  # wrong states that a grid tells of


@dataclass(frozen=True, slots=True)
class Wrong:
    """A state that does not give what the law demands: what came, or the error instead."""

    state: str
    text: str


@dataclass(slots=True)
class Walked:
    """What a grid gave. layers: code of each, and the place of its table.    runs: calls of the runner that were made.

    alike: states after a swap whose runner saw nothing else than that of a first call, which had been run.
    apart: states whose code asked for its rank, so that they were run rank by rank.    wrong: the first of them in full.
    """

    layers: list[tuple[int, int]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    coefficients: list[Coefficients] = field(default_factory=list)
    ledgers: list[Ledger] = field(default_factory=list)
    states: int = 0
    runs: int = 0
    alike: int = 0
    apart: int = 0
    wrongs: int = 0
    wrong: list[Wrong] = field(default_factory=list)


def walk(grid: str, every: int = 1) -> Walked:
    """every: 1 for all layers of the grid, n for each n-th of them."""
    with torch.inference_mode():
        return _Walk(grid).over(every)


@dataclass(frozen=True, slots=True)
class _Start:
    """A layer and what it remembers now, to start calls from. seen: what its runner then sees."""

    built: StackedLayer | None
    kept: Kept | None
    seen: object

    @classmethod
    def of(cls, built: StackedLayer | None) -> _Start:
        return cls(None, None, None) if built is None else cls(built, Kept(built), built.seen)

    def restored(self) -> StackedLayer:
        if self.built is None or self.kept is None:
            raise AskedForRank  # by its constructor
        self.kept.restore()
        return self.built


def _is_control(layer: LayerState, dtype: str) -> bool:
    """Whether calls after a swap are run even if nothing that the runner sees is left of the call before it."""
    return (layer.pad, layer.share, dtype) == ("0", "1", "fp32")


class _Walk:
    def __init__(self, grid: str) -> None:
        self._world: World = world(grid)
        self._grid = grid
        self._found = Walked()
        self._tokens = {name: self._two(dtype) for name, dtype in DTYPES.items()}
        self._tables: dict[object, int] = {}
        self._lawful: dict[tuple[Coefficients, Ledger, str], tuple[tuple[Tensor, ...], Ledger, int, int]] = {}
        self._coefficients: dict[Coefficients, int] = {}
        self._ledgers: dict[Ledger, int] = {}

    def _two(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x_nH = self._world.tokens(dtype)
        return x_nH, x_nH * LATER

    def over(self, every: int) -> Walked:
        found = self._found
        contents: dict[Table, int] = {}
        for number, (layer, kernels) in enumerate(states.layers_of(self._grid)):
            if number % every:
                continue
            built = self._built(layer, kernels[0])
            key = (kernels, built.seen if built else layer)
            if key not in self._tables:
                table = tuple(sorted(self._run(layer, kernels)))
                self._tables[key] = contents.setdefault(table, len(contents))
            place = self._tables[key]
            found.layers.append((states.layer_code(layer), place))
            found.states += len(states.calls_of(kernels))
        found.tables = list(contents)
        found.coefficients, found.ledgers = list(self._coefficients), list(self._ledgers)
        return found

    def _built(self, layer: LayerState, kernel: str) -> StackedLayer | None:
        """None where a layer cannot be built, which its first call will tell."""
        try:
            return StackedLayer(layer, kernel)
        except (Exception, AskedForRank):
            return None

    def _run(self, layer: LayerState, kernels: tuple[str, ...]) -> Iterator[tuple[int, int, int]]:
        """All calls of a layer; those with a history start from one call that several of them share."""
        fresh = {kernel: _Start.of(self._built(layer, kernel)) for kernel in kernels}
        for dtype in DTYPES:
            forgetful = {}
            after = {}
            for kernel in kernels:
                start = fresh[kernel]
                yield self._judged(layer, CallState(dtype, kernel, "first"), start)
                forgetful[kernel] = start.built is not None and not stacked.read_history(start.built)
                after[kernel] = _Start.of(start.built)
                yield self._judged(layer, CallState(dtype, kernel, "two_batches"), start)
            alike = not _is_control(layer, dtype)
            for first, kernel in itertools.permutations(kernels, 2):
                known = fresh[kernel].seen if alike and forgetful[kernel] else None
                yield self._judged(layer, CallState(dtype, kernel, f"after_{first}"), after[first], known)

    def _judged(
        self, layer: LayerState, call: CallState, start: _Start, known: object = None
    ) -> tuple[int, int, int]:
        """known: what the runner of a first call with this kernel sees, if that call reads nothing of earlier ones: a
        runner that sees the same after a swap needs no run to do the same."""
        state = (layer, call)
        lawful = (law.coefficients(state), law.ledger(state), call.dtype)
        wanted_nH, wanted, coefficients, ledger = self._lawful.get(lawful) or self._expected(*lawful)
        tokens = self._tokens[call.dtype]
        code = (states.call_code(call), coefficients, ledger)
        try:
            built = start.restored()
            if call.history.startswith("after"):
                built.swap_kernel(call.kernel)  # type: ignore[arg-type]
                if known is not None and built.seen == known:
                    self._found.alike += 1
                    return code
            self._found.runs += 1
            given_nH, seen = stacked.call(built, tokens if call.history == "two_batches" else tokens[:1])
            right = seen == wanted and all(map(torch.equal, given_nH, wanted_nH))
            told = "" if right else self._told(state, given_nH, seen)
        except AskedForRank:
            self._found.apart += 1
            told = self._apart(state)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        if told:
            self._found.wrongs += 1
            if len(self._found.wrong) < TOLD:
                self._found.wrong.append(Wrong(states.told(state), told))
        return code

    def _expected(
        self, coefficients: Coefficients, ledger: Ledger, dtype: str
    ) -> tuple[tuple[Tensor, ...], Ledger, int, int]:
        wanted_nH = tuple(self._world.output(coefficients, x_nH) for x_nH in self._tokens[dtype])
        places = (
            self._coefficients.setdefault(coefficients, len(self._coefficients)),
            self._ledgers.setdefault(ledger, len(self._ledgers)),
        )
        self._lawful[coefficients, ledger, dtype] = (wanted_nH, ledger, *places)
        return self._lawful[coefficients, ledger, dtype]

    def _apart(self, state: states.State) -> str:
        """The same state on ranks that are apart; what is wrong with it, or nothing."""
        try:
            coefficients, ledgers = on_ranks(state)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return difference((law.coefficients(state), law.ledger(state)), coefficients, ledgers)

    def _told(self, state: states.State, given_nH: list[Tensor], seen: Ledger) -> str:
        tokens, shape = self._tokens[state[1].dtype], (self._world.sizes.ranks, self._world.hidden)
        if any(each.shape != shape for each in given_nH):
            return f"output {[list(each.shape) for each in given_nH]}, expected {list(shape)}"
        read = [self._world.read(each, x_nH) for each, x_nH in zip(given_nH, tokens, strict=False)]
        right = (law.coefficients(state), law.ledger(state))
        return difference(right, read, [seen] * self._world.sizes.ranks)


def difference(right: tuple[Coefficients, Ledger], batches: list[Coefficients], ledgers: list[Ledger]) -> str:
    """What differs from what is right, in words; nothing if nothing does. batches: coefficients of each micro-batch."""
    wanted, ledger = right
    told: list[str] = []
    for number, given in enumerate(batches):
        for rank, (row, due) in enumerate(zip(given, wanted, strict=True)):
            where = f"rank {rank}" + (f", micro-batch {number}" if number else "")
            told += [f"{where}: {text}" for text in _columns(row, due, len(given))]
    for rank, seen in enumerate(ledgers):
        if seen != ledger:
            told.append(f"rank {rank}: ledger {_calls(seen)}, expected {_calls(ledger)}")
            break
    return "; ".join(told[:6]) + (f"; and {len(told) - 6} more" if len(told) > 6 else "")


def _columns(row: tuple[float, ...], right: tuple[float, ...], ranks: int) -> Iterator[str]:
    """'routed 6.25 6.25, expected 2.5 2.5' for each kind of column that is wrong."""
    kinds = {
        "zero experts": slice(0, 1),
        "routed": slice(1, 1 + ranks),
        "expert bias": slice(1 + ranks, 1 + 2 * ranks),
        "shared": slice(1 + 2 * ranks, 1 + 3 * ranks),
        "transform bias": slice(1 + 3 * ranks, None),
    }
    for kind, columns in kinds.items():
        if row[columns] != right[columns]:
            numbers: Callable[[tuple[float, ...]], str] = lambda values: " ".join(f"{value:g}" for value in values)
            yield f"{kind} {numbers(row[columns])}, expected {numbers(right[columns])}"


def _calls(ledger: Ledger) -> str:
    return " ".join(f"{op}({group})" for op, group in ledger) or "empty"
