"""Which cases a request means: the main job, a part of it, or cases named one by one. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness import models
from harness.case import OPTIONS, Case, Grid, check_affordable
from harness.errors import UsageError
from harness.main_job import DTYPES, TOKENS, TP_SIZES, cases_of

SYSTEMS = ("runner", "legacy", "transformers")

# M, or a number for each data-parallel rank
Rows = int | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Cases of one system, run one after the other in one worker; they share what the oracle computed."""

    system: str
    cases: tuple[Case, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What was typed; None where nothing was, which means all of it.

    Sizes and options are tuples of what to combine. Each combination is a case.    grids: instead of tp, ep, dp and sp.
    """

    systems: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    grids: tuple[Grid, ...] | None = None
    tp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None
    dp: tuple[int, ...] | None = None
    sp: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    tokens: tuple[Rows, ...] | None = None
    seeds: tuple[int, ...] | None = None
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def is_main_job(self) -> bool:
        return self == replace(Request(), systems=self.systems)


def main_job(systems: Sequence[str]) -> list[Batch]:
    """What runs when nothing is asked for (`harness.main_job`)."""
    pairs = itertools.product(models.names(), systems)
    return _joined([Batch(system, tuple(cases_of(model, system))) for model, system in pairs])


def _joined(batches: Sequence[Batch]) -> list[Batch]:
    """The batches in the order of their run. UsageError for a case that is too large.

    All cases of transformers in one batch, and that one first: importing it takes a worker as long as the rest of it.
    """
    for case in {case for batch in batches for case in batch.cases if case.size == "real"}:
        check_affordable(case)
    heavy = [case for batch in batches if batch.system == "transformers" for case in batch.cases]
    others = [batch for batch in batches if batch.system != "transformers"]
    return [Batch("transformers", tuple(heavy)), *others] if heavy else others


def select(request: Request) -> list[Batch]:
    """The batches of a request. UsageError if a combination cannot exist, or if none is left."""
    systems = tuple(dict.fromkeys(request.systems or SYSTEMS))
    if request.is_main_job:
        return main_job(systems)
    batches = []
    for model, system in itertools.product(dict.fromkeys(request.models or _models_for(request)), systems):
        cases = _product(model, request, system)
        if cases:
            batches.append(Batch(system, tuple(cases)))
    if not batches:
        raise UsageError("the request selects no case: transformers runs at tp=1 only. Add --tp 1, or another --system")
    return _joined(batches)


def of_cases(cases: Sequence[Case], systems: Sequence[str] | None) -> list[Batch]:
    """The same cases for each system."""
    return _joined([Batch(system, tuple(dict.fromkeys(cases))) for system in dict.fromkeys(systems or SYSTEMS)])


def _models_for(request: Request) -> tuple[str, ...]:
    options = dict(request.options)
    every = models.names()
    if options.get("size") == ("wide",):
        every = tuple(name for name in every if models.load(name).wide is not None)
    if options.get("s") == ("real",):
        every = tuple(name for name in every if models.load(name).real.routing.routed_scaling_factor is not None)
    return every


def _product(model: str, request: Request, system: str) -> list[Case]:
    named = dict(request.options)
    options: dict[str, Any] = {name: named.get(name, values[:1]) for name, (values, _) in OPTIONS.items()}
    cases = [
        Case(model=model, grid=grid, dtype=dtype, seed=seed, **_tokens(rows), **dict(zip(options, chosen, strict=True)))
        for dtype, (rows, grid), seed, chosen in itertools.product(
            request.dtypes or DTYPES, _rows_on_grids(model, request), request.seeds or (0,),
            itertools.product(*options.values()),
        )
        if system != "transformers" or grid.ranks == 1
    ]  # fmt: skip
    if system not in SYSTEMS and "calls" not in named and "size" not in named:  # an outsider's: many calls on each grid
        cases += [replace(case, calls="many") for case in {case.grid: case for case in reversed(cases)}.values()]
    return list(dict.fromkeys(cases))


def _tokens(rows: Rows) -> dict[str, Any]:
    return {"tokens": rows} if isinstance(rows, int) else {"tokens": sum(rows), "split": rows}


def _rows_on_grids(model: str, request: Request) -> list[tuple[Rows, Grid]]:
    """Each grid with the tokens that fit it; one that none fits stays, and so do tokens that fit none, to be refused."""
    tokens = request.tokens if request.tokens is not None else TOKENS
    grids = request.grids or _grids(model, request)
    fitting = [(rows, grid) for rows in tokens for grid in grids if isinstance(rows, int) or len(rows) == grid.dp]
    for rows, grid in itertools.product(tokens, grids):
        if all(rows != other for other, _ in fitting) or all(grid != other for _, other in fitting):
            fitting.append((rows, grid))
    return fitting


def _grids(model: str, request: Request) -> list[Grid]:
    """The grids that the sizes make: of several combinations those that can exist. UsageError if none can.

    Sizes that were left open: every tp that fits, ep and dp of 1; but those that sequence parallelism needs, if it was asked for.
    """
    grids, refused = list[Grid](), list[UsageError]()
    for sp, dp in itertools.product(request.sp or (1,), request.dp or (1,)):
        for tp in request.tp or ((sp,) if sp > 1 else _fitting(model, dict(request.options).get("size", ("twin",)))):
            for ep in request.ep or ((tp * dp,) if sp > 1 else (1,)):
                try:
                    grids.append(Grid(tp=tp, ep=ep, dp=dp, sp=sp))
                except UsageError as error:
                    refused.append(error)
    if refused and not grids:
        raise refused[0]
    return grids


def _fitting(model: str, sizes: Sequence[str]) -> tuple[int, ...]:
    """The default TP sizes that divide the layer, where none was asked for."""
    page = models.load(model)
    specs = [spec for size in sizes if (spec := {"twin": page.twin, "wide": page.wide, "real": page.real}.get(size))]
    widths = [width for spec in specs for width in spec.tp_widths().values()]
    return tuple(tp for tp in TP_SIZES if all(width % tp == 0 for width in widths))
