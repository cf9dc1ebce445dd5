"""One grid: all its states, each one held against the law.

Layers with the same experts share one run of all ranks: each is built once for every kernel, and its calls start from
what it remembered then. A state after a swap is found alike, and not run, where on every rank the runner sees what it
sees in a layer built with that kernel, whose call was right and read nothing of calls before it. If anything there is
not as it should be (a raise, another number, a kernel that was changed by a call), every state concerned is run by
itself from its beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.case import parse_grid
from harness.certify.dispatch import axes, world
from harness.certify.dispatch.axes import Call, Layer, State
from harness.certify.dispatch.ranks import DispatchLayer, Kernels, alone, calls
from harness.certify.law import Ledger
from harness.certify.stacked import Kept, read_history, seen, watch
from harness.certify.walk import TOLD, Row, Table, Walked, Wrong, difference_of_ledgers
from harness.comm import Communicator
from harness.comm.simulated import run_ranks

Serving = Mapping[Layer, tuple[str, ...]]  # each layer and the kernels that may serve it


def walk(grid: str, **only: str) -> Walked:
    """only: layers with these words alone, by axis; all layers of the grid without."""
    found = Walked()
    serving = {
        layer: kernels
        for layer, kernels in axes.layers_of(grid)
        if all(getattr(layer, axis) == word for axis, word in only.items())
    }
    coefficients: dict[object, int] = {}
    ledgers: dict[Ledger, int] = {}
    tables: dict[Table, int] = {}
    with torch.inference_mode():
        for _, group in itertools.groupby(serving, key=lambda layer: (layer.experts, layer.beside)):
            told = _Group({layer: serving[layer] for layer in group}, found).run()
            for layer, rows in told:
                table: list[Row] = []
                for call in rows:
                    value = coefficients.setdefault(world.coefficients((layer, call)), len(coefficients))
                    ledger = ledgers.setdefault(world.ledger((layer, call)), len(ledgers))
                    table.append((axes.code_of(call), value, ledger))
                found.layers.append((axes.code_of(layer), tables.setdefault(tuple(sorted(table)), len(tables))))
                found.states += len(table)
    found.tables, found.coefficients, found.ledgers = list(tables), list(coefficients), list(ledgers)  # type: ignore[arg-type]
    return found


@dataclass(slots=True)
class _Shown:
    """What one rank did. outputs: of each state that was run, with the collectives of its call, as first and last number.

    forgetful: those that read nothing of calls before.    fresh, after: what the runner saw when it was built, and in
    each state after a swap, before the call.
    """

    outputs: dict[State, tuple[Tensor, int, int]] = field(default_factory=dict)
    forgetful: set[State] = field(default_factory=set)
    fresh: dict[tuple[Layer, str], object] = field(default_factory=dict)
    after: dict[tuple[Layer, str, str], object] = field(default_factory=dict)
    unchanged: bool = True


class _Group:
    """Layers of one grid with the same experts and the same beside them: they have the same weights."""

    def __init__(self, serving: Serving, found: Walked) -> None:
        self._serving, self._found = serving, found
        self._grid = next(iter(serving)).grid

    def run(self) -> Iterator[tuple[Layer, list[Call]]]:
        """Every layer and its calls, in order; what is wrong with them is told to the walk."""
        ranks = run_ranks(parse_grid(self._grid), self._body)
        trusted = ranks.failure is None and all(rank.unchanged for rank in ranks.results)
        right = self._right(ranks.results, ranks.ledger) if trusted else set()
        for layer, kernels in self._serving.items():
            rows = list(axes.calls_of(layer, kernels))
            for call in rows:
                state, first = (layer, call), (layer, call._replace(history=_without_swap(call.history)))
                if state in right:
                    continue
                if trusted and first in right and self._alike(ranks.results, state, first):
                    self._found.alike += 1
                    continue
                self._found.apart += 1
                self._tell(state, trusted and state in ranks.results[0].outputs)
            yield layer, rows

    def _body(self, comm: Communicator) -> _Shown:
        shown, kept = _Shown(), Kernels()
        for layer, kernels in self._serving.items():
            if layer.placement == "moved":
                continue  # comes with the linear one that it is moved from
            later = layer._replace(placement="moved")
            for kernel in kernels:
                built = DispatchLayer(layer, kernel, comm, kept)
                watch(built.runner)
                shown.fresh[layer, kernel] = seen(built.runner)
                self._calls(shown, built, layer, kernel, comm)
                called = Kept(built)
                movable = layer.placement == "linear" and kernel in self._serving.get(later, ())
                for other in kernels:
                    if other != kernel:
                        called.restore()
                        built.swap_kernel(other)  # type: ignore[arg-type]  # a word of CALL_AXES
                        shown.after[layer, other, kernel] = seen(built.runner)
                        if movable:
                            built.place(axes.moved(layer.grid))
                            shown.after[later, other, kernel] = seen(built.runner)
                if movable:
                    called.restore()
                    built.place(axes.moved(layer.grid))
                    shown.fresh[later, kernel] = seen(built.runner)
                    self._calls(shown, built, later, kernel, comm)
        shown.unchanged = kept.unchanged
        return shown

    def _calls(self, shown: _Shown, built: DispatchLayer, layer: Layer, kernel: str, comm: Communicator) -> None:
        """All calls without a swap, each from what the layer remembers now; the plain one comes last."""
        start = Kept(built)
        for history in ("two_batches_first", "first"):
            for rows in axes.rows_of(layer, history)[::-1]:
                start.restore()
                state, before = (layer, Call(kernel, history, rows)), calls(comm)
                shown.outputs[state] = built.call(history, rows), before, calls(comm)
                if not read_history(built):
                    shown.forgetful.add(state)

    def _right(self, ranks: Iterable[_Shown], entries: Iterable[Any]) -> set[State]:
        """The states that gave on every rank what the law demands."""
        right: set[State] | None = None
        for rank, (shown, ledger) in enumerate(zip(ranks, entries, strict=True)):
            made = [(entry.op, entry.group) for entry in ledger]
            mine = {
                state
                for state, (y_mH, start, stop) in shown.outputs.items()
                if torch.equal(y_mH, world.outputs(self._grid, state[0].beside)[rank])
                and tuple(made[start:stop]) == world.ledger(state)
            }
            self._found.runs += len(shown.outputs) if rank == 0 else 0
            right = mine if right is None else right & mine
        return right or set()

    @staticmethod
    def _alike(ranks: Iterable[_Shown], state: State, first: State) -> bool:
        """Whether a state after a swap is on every rank one that was run."""
        (layer, call), earlier = state, state[1].history.rpartition("after_")[2]
        return all(
            first in shown.forgetful
            and (layer, call.kernel, earlier) in shown.after
            and shown.after[layer, call.kernel, earlier] == shown.fresh[layer, call.kernel]
            for shown in ranks
        )

    def _tell(self, state: State, was_wrong: bool) -> None:
        """Run by itself; what is wrong with it, if anything is. was_wrong: in the run of all."""
        told = differs(state, (world.coefficients(state), world.ledger(state)))
        if was_wrong and not told:
            told = "right by itself, wrong behind calls of other layers: something outlives a layer"
        if told:
            self._found.wrongs += 1
            if len(self._found.wrong) < TOLD:
                self._found.wrong.append(Wrong(axes.told(state), told))


def _without_swap(history: str) -> str:
    return "two_batches_first" if history.startswith("two_batches_") else "first"


def differs(state: State, right: tuple[world.Rows, Ledger]) -> str:
    """What differs between a state that is run now by itself and what is right, in words; nothing if nothing does."""
    try:
        with torch.inference_mode():
            rows, ledgers = alone(state)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    told = []
    for rank, (given, wanted) in enumerate(zip(rows, right[0], strict=True)):
        for place, (row, due) in enumerate(zip(given, wanted, strict=True)):
            where = f"rank {rank}, row {place}"
            told += [f"{where}: {text}" for text in _columns(state[0].grid, row, due)]
    told += difference_of_ledgers(ledgers, right[1])
    return "; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else "")


def _columns(grid: str, row: tuple[float, ...], due: tuple[float, ...]) -> Iterator[str]:
    """'expert 3 10, expected 5' for each source that is wrong; of an expert that is cut, each piece."""
    pieces, count = parse_grid(grid).moe_tp, axes.experts_of(grid)
    for column, (given, wanted) in enumerate(zip(row, due, strict=True)):
        if given != wanted:
            expert, piece = divmod(column - 1, pieces)
            cut = f" piece {piece}" if pieces > 1 else ""
            name = "token" if column == 0 else f"expert {expert}{cut}" if expert < count else "shared experts"
            yield f"{name} {given:g}, expected {wanted:g}"
