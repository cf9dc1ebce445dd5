"""One grid: all its states run, each one held against the law."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.case import KERNELS
from harness.certify import law, stacked, states
from harness.certify.law import Coefficients, Ledger
from harness.certify.ranks import on_ranks
from harness.certify.stacked import AskedForRank, Kept, StackedLayer
from harness.certify.states import CallState, LayerState, batches_of, before
from harness.certify.world import DTYPES, LATER, World, world

# a call's code, and the places of its coefficients and of its ledger in the lists of them
Row = tuple[int, int, int]
Table = tuple[Row, ...]
TOLD = 30  # wrong states that a grid tells of
# layers whose kernels are run rank by rank as well
FEATURES: tuple[dict[str, str], ...] = (
    {"shared": "sharded", "latent": "bias", "bias": "yes", "zero": "no", "pad": "8", "share": "1"},
    {"shared": "gated", "latent": "none", "bias": "yes", "zero": "yes", "pad": "0", "share": "0.5"},
    {"shared": "fused", "latent": "none", "bias": "no", "zero": "no", "pad": "8", "share": "1"},
)


@dataclass(frozen=True, slots=True)
class Wrong:
    """A state that does not give what the law demands: what came, or the error instead."""

    state: str
    text: str


@dataclass(slots=True)
class Walked:
    """What a grid gave. layers: code of each, and the place of its table.    runs: calls of the runner that were made.

    alike: states after a swap whose runner saw nothing else than that of a first call, which had been run.
    apart: states that were run rank by rank: some of every transport, and those whose code asked for its rank.    wrong: the first of them in full.
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


def walk(grid: str, **only: str) -> Walked:
    """only: layers with these words alone, by axis, as in zero="yes"; all layers of the grid without."""
    with torch.inference_mode():
        return _Walk(grid).over(only)


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

    def swapped(self, kernel: str) -> StackedLayer:
        built = self.restored()
        built.runner.planned = False  # type: ignore[attr-defined]  # a swap that reads the last plan is told on
        built.swap_kernel(kernel)  # type: ignore[arg-type]  # a word of CALL_AXES
        return built


@dataclass(slots=True)
class _Known:
    """Of a layer that no other one is like. keys: all that the runner sees; and the same with plans in place of what they
    are made of, which counts only where nothing was decided outside of them.    planned: the second, kernel by kernel.
    whole: it was right, and may stand for others.
    """

    keys: list[object]
    planned: list[object]
    whole: bool = False


class _Walk:
    def __init__(self, grid: str) -> None:
        self._world: World = world(grid)
        self._grid = grid
        self._found = Walked()
        self._tokens = {name: self._two(dtype) for name, dtype in DTYPES.items()}
        self._places: dict[object, int] = {}
        self._rows: dict[object, list[Row]] = {}
        self._unlike = 0
        self._lawful: dict[tuple[int, int, str], tuple[tuple[Tensor, ...], Ledger, int, int]] = {}
        self._coefficients: dict[Coefficients, int] = {}
        self._ledgers: dict[Ledger, int] = {}

    def _two(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x_nH = self._world.tokens(dtype)
        return x_nH, x_nH * LATER

    def over(self, only: Mapping[str, str]) -> Walked:
        found = self._found
        contents: dict[Table, int] = {}
        # an order that the kernel chooses comes last: for each kernel it is one that was asked for before
        for layer, kernels in sorted(states.layers_of(self._grid), key=lambda each: each[0].order == "auto"):
            if any(getattr(layer, axis) != word for axis, word in only.items()):
                continue
            known = self._known(layer, kernels)
            if isinstance(known, int):
                place = known
            else:
                table = self._joined(known) or tuple(sorted(self._table(layer, kernels, known)))
                place = contents.setdefault(table, len(contents))
                if known.whole:
                    self._places.update(dict.fromkeys(known.keys, place))
            found.layers.append((states.layer_code(layer), place))
            found.states += len(states.calls_of(kernels))
        if not only:
            self._transports()
        found.tables = list(contents)
        found.coefficients, found.ledgers = list(self._coefficients), list(self._ledgers)
        return found

    def _transports(self) -> None:
        """What kernels are taken to return and to call is what the real transports of the grid do, rank by rank."""
        for experts, kernel, features in itertools.product(("modular", "monolithic"), KERNELS, FEATURES):
            layer = LayerState(self._grid, experts, "router", order="auto", reduce="layer", **features)
            if states.refusal(layer, kernel) is None:
                state = (layer, CallState("fp16", kernel, "two_batches_first"))
                self._found.apart += 1
                self._tell(state, self._apart(state))

    def _tell(self, state: states.State, told: str) -> None:
        """Of what is wrong with a state, if anything is."""
        if told:
            self._found.wrongs += 1
            if len(self._found.wrong) < TOLD:
                self._found.wrong.append(Wrong(states.told(state), told))

    def _known(self, layer: LayerState, kernels: tuple[str, ...]) -> int | _Known:
        """The place of the table of a layer in which the runner sees the same, if one was run; or what is known of it.

        A layer that has to give something else is another one, whatever the runner sees.
        """
        built = self._built(layer, kernels[0])
        law_ids = _law_ids(layer._replace(order="", bias="", pad=""), kernels)
        seen = (kernels, law_ids, layer if built is None else built.seen)
        if seen in self._places:
            return self._places[seen]
        planned: list[object] = []
        if built is not None:
            with contextlib.suppress(Exception, AskedForRank):
                planned = [(kernels, law_ids, key) for key in built.planned(kernels)]
        keys: list[object] = [seen, tuple(planned)]
        known = _Known(keys if planned else keys[:1], planned)
        return self._places.get(known.keys[-1], known)

    def _joined(self, known: _Known) -> Table | None:
        """The table of a layer that does with each kernel what another one was seen to do with it."""
        rows = [self._rows.get(key) for key in known.planned]
        if not rows or None in rows:
            return None
        known.whole = True
        return tuple(sorted(itertools.chain.from_iterable(filter(None, rows))))

    def _table(self, layer: LayerState, kernels: tuple[str, ...], known: _Known) -> list[Row]:
        """All calls run. Remembers them if all were right, and by plans if nothing was decided outside of these."""
        stacked.decided()
        wrongs, unlike = self._found.wrongs, self._unlike
        table = list(self._run(layer, kernels))
        known.whole = self._found.wrongs == wrongs
        if stacked.decided():
            known.keys, known.planned = known.keys[:1], []
        if known.whole and self._unlike == unlike:
            of = {kernel: [row for row in table if states.call_at(row[0]).kernel == kernel] for kernel in kernels}
            self._rows.update(zip(known.planned, of.values(), strict=False))
        return table

    def _built(self, layer: LayerState, kernel: str) -> StackedLayer | None:
        """None where a layer cannot be built, which its first call will tell."""
        try:
            return StackedLayer(layer, kernel)
        except (Exception, AskedForRank):
            return None

    def _run(self, layer: LayerState, kernels: tuple[str, ...]) -> Iterator[Row]:
        """All calls of a layer; those with a history start from one call that several of them share.

        A runner that sees after a swap what it sees in a layer built with that kernel, and whose call there read nothing
        of calls before it, does the same: such a state is found alike and not run, but for a part of the space that is
        run as a control. What a swap leaves is looked at once for calls of both dtypes that leave the same.
        """
        fresh = {kernel: _Start.of(self._built(layer, kernel)) for kernel in kernels}
        alike: dict[tuple[str, str, object], bool] = {}
        for dtype in DTYPES:
            first: dict[str, tuple[Row, Row]] = {}
            after: dict[str, _Start] = {}
            forgetful = set()
            for kernel in kernels:
                start, wrongs = fresh[kernel], self._found.wrongs
                two = self._judged(layer, CallState(dtype, kernel, "two_batches_first"), start)
                forgets = start.built is not None and not stacked.read_history(start.built)
                first[kernel] = self._judged(layer, CallState(dtype, kernel, "first"), start), two
                forgets = forgets and start.built is not None and not stacked.read_history(start.built)
                if forgets and self._found.wrongs == wrongs:
                    forgetful.add(kernel)
                after[kernel] = _Start.of(start.built)
                yield from first[kernel]
            control = (layer.pad, layer.share, layer.bias, layer.order, dtype) == ("0", "1", "no", "1", "fp32")
            for earlier, kernel in itertools.permutations(kernels, 2):
                calls, start = _swaps(dtype, kernel, earlier), after[earlier]
                swap = earlier, kernel, start.seen
                if swap not in alike:
                    alike[swap] = kernel in forgetful and self._alike(start, kernel, fresh[kernel])
                same = kernel in forgetful and alike[swap]
                self._unlike += not same
                if same and not control:
                    self._found.alike += 2
                    for code, row in zip(calls.values(), first[kernel], strict=True):
                        yield code, *row[1:]
                else:
                    for call in calls:
                        yield self._judged(layer, call, start)

    @staticmethod
    def _alike(start: _Start, kernel: str, fresh: _Start) -> bool:
        """Whether a swap leaves what a new layer has, and asked for nothing that a call had left behind."""
        built = start.swapped(kernel)
        return built.seen == fresh.seen and not stacked.read_history(built)

    def _judged(self, layer: LayerState, call: CallState, start: _Start) -> Row:
        state = (layer, call)
        lawful = (law.coefficients(state), law.ledger(state), call.dtype)
        place = (
            id(lawful[0]),
            id(lawful[1]),
            call.dtype,
        )  # the law keeps them, and to hash them takes as long as a call
        wanted_nH, wanted, coefficients, ledger = self._lawful.get(place) or self._expected(place, *lawful)
        tokens = self._tokens[call.dtype]
        self._found.runs += 1
        try:
            built = start.restored() if before(call.history) is None else start.swapped(call.kernel)
            given_nH, seen = stacked.call(built, tokens[: batches_of(call.history)])
            right = seen == wanted and all(map(torch.equal, given_nH, wanted_nH))
            told = "" if right else self._told(state, given_nH, seen)
        except AskedForRank:
            self._found.apart += 1
            told = self._apart(state)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        self._tell(state, told)
        return states.call_code(call), coefficients, ledger

    def _expected(
        self, place: tuple[int, int, str], coefficients: Coefficients, ledger: Ledger, dtype: str
    ) -> tuple[tuple[Tensor, ...], Ledger, int, int]:
        wanted_nH = tuple(self._world.output(coefficients, x_nH) for x_nH in self._tokens[dtype])
        places = (
            self._coefficients.setdefault(coefficients, len(self._coefficients)),
            self._ledgers.setdefault(ledger, len(self._ledgers)),
        )
        self._lawful[place] = (wanted_nH, ledger, *places)
        return self._lawful[place]

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


@functools.lru_cache(maxsize=4096)
def _law_ids(layer: LayerState, kernels: tuple[str, ...]) -> tuple[int, ...]:
    """What the law demands of a layer, by identity: the law keeps what it has said. It does not read what is empty."""
    first = [(layer, CallState(dtype, kernels[0], "first")) for dtype in DTYPES]
    ledgers = [law.ledger((layer, CallState("fp32", kernel, "first"))) for kernel in kernels]
    return *(id(law.coefficients(state)) for state in first), *map(id, ledgers)


@functools.cache
def _swaps(dtype: str, kernel: str, earlier: str) -> dict[CallState, int]:
    """The calls after a swap, whole and as micro-batches, and their codes."""
    calls = (CallState(dtype, kernel, f"{batches}after_{earlier}") for batches in ("", "two_batches_"))
    return {call: states.call_code(call) for call in calls}


def difference(right: tuple[Coefficients, Ledger], batches: list[Coefficients], ledgers: list[Ledger]) -> str:
    """What differs from what is right, in words; nothing if nothing does. batches: coefficients of each micro-batch."""
    wanted, ledger = right
    told: list[str] = []
    for number, given in enumerate(batches):
        for rank, (row, due) in enumerate(zip(given, wanted, strict=True)):
            where = f"rank {rank}" + (f", micro-batch {number}" if number else "")
            told += [f"{where}: {text}" for text in _columns(row, due, len(given))]
    told += difference_of_ledgers(ledgers, ledger)
    return "; ".join(told[:6]) + (f"; and {len(told) - 6} more" if len(told) > 6 else "")


def difference_of_ledgers(ledgers: list[Ledger], right: Ledger) -> list[str]:
    """Of the first rank whose ledger is another one."""
    told = (
        f"rank {rank}: ledger {_calls(seen)}, expected {_calls(right)}"
        for rank, seen in enumerate(ledgers)
        if seen != right
    )
    return list(itertools.islice(told, 1))


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
            yield f"{kind} {_numbers(row[columns])}, expected {_numbers(right[columns])}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _calls(ledger: Ledger) -> str:
    return " ".join(f"{op}({group})" for op, group in ledger) or "empty"
