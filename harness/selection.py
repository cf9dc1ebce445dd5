"""Which cases a request means: the main job, a part of it, or cases named one by one. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness import models
from harness.case import OPTIONS, Case, Grid, check_affordable
from harness.errors import UsageError

SYSTEMS = ("runner", "legacy", "transformers")
TP_SIZES = (1, 2, 3, 4, 8)
DTYPES = ("fp32", "bf16", "fp16")
TOKENS = (0, 1, 7, 33)
WIDE_TP_SIZES = (1, 2)


@dataclass(frozen=True, slots=True)
class Batch:
    """Cases of one system, run one after the other in one worker; they share what the oracle computed."""

    system: str
    cases: tuple[Case, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What was typed; None where nothing was, which means all of it.

    Sizes and options are tuples of what to combine. Each combination is a case.
    """

    systems: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    tp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None
    dp: tuple[int, ...] | None = None
    sp: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    tokens: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def is_main_job(self) -> bool:
        return self == replace(Request(), systems=self.systems)


def main_job(systems: Sequence[str]) -> list[Batch]:
    """The default: every model at twin size, the wide twins, each model's real s, and the placements beside the page's."""
    batches = []
    for model, system in itertools.product(models.names(), systems):
        cases = _product(model, Request(), system)
        page = models.load(model)
        if system != "transformers":
            cases += _placements(page, system)
        if page.wide is not None:
            sizes = WIDE_TP_SIZES if system != "transformers" else (1,)
            cases += [Case(model=model, size="wide", grid=Grid(tp=tp), tokens=m) for tp in sizes for m in TOKENS]
        batches.append(Batch(system, tuple(cases)))
    return _joined(batches)


def _joined(batches: Sequence[Batch]) -> list[Batch]:
    """The batches in the order of their run. UsageError for a case that is too large.

    All cases of transformers in one batch, and that one first: importing it takes a worker as long as the rest of it.
    """
    for case in {case for batch in batches for case in batch.cases if case.size == "real"}:
        check_affordable(case)
    heavy = [case for batch in batches if batch.system == "transformers" for case in batch.cases]
    others = [batch for batch in batches if batch.system != "transformers"]
    return [Batch("transformers", tuple(heavy)), *others] if heavy else others


def _placements(page: models.Model, system: str) -> list[Case]:
    """What one cell of the table hides: the real s, the other scalers, a kernel that reduces, the shared experts' order."""
    cases = []
    for tp in TP_SIZES:
        plain = Case(model=page.model_type, grid=Grid(tp=tp))
        has_scale = page.twin.routing.routed_scaling_factor is not None
        if has_scale and page.real.routing.routed_scaling_factor not in (None, page.twin.routing.routed_scaling_factor):
            cases.append(replace(plain, s="real"))
        cases.append(replace(plain, kernel="reduced"))
        if system == "legacy":
            cases += [replace(plain, backend="transformers")] if page.wrapped else []
            continue
        cases += [replace(plain, scale=who) for who in ("router", "kernel", "output") if has_scale]
        cases += [replace(plain, dtype="fp16", scale="output")] if has_scale else []
        cases += [replace(plain, order=order, pad="8") for order in ("2", "3") if page.twin.shared is not None]
        cases.append(replace(plain, pad="8"))
    return list(dict.fromkeys(cases))


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
    tp_sizes = request.tp or ((1,) if system == "transformers" else _fitting(model, named.get("size", ("twin",))))
    grids = [
        Grid(tp=tp, ep=ep, dp=dp, sp=sp)
        for tp, ep, dp, sp in itertools.product(tp_sizes, request.ep or (1,), request.dp or (1,), request.sp or (1,))
    ]
    if system == "transformers" and request.tp is not None:
        grids = [grid for grid in grids if grid.tp == 1]
    choices = [named.get(name, values[:1]) for name, (values, _) in OPTIONS.items()]
    cases = [
        Case(model=model, grid=grid, dtype=dtype, tokens=tokens, seed=seed, **dict(zip(OPTIONS, chosen, strict=True)))
        for dtype, tokens, seed, grid, chosen in itertools.product(
            request.dtypes or DTYPES, request.tokens if request.tokens is not None else TOKENS, request.seeds or (0,), grids,
            itertools.product(*choices),
        )
    ]  # fmt: skip
    return list(dict.fromkeys(cases))


def _fitting(model: str, sizes: Sequence[str]) -> tuple[int, ...]:
    """The default TP sizes that divide the layer, where none was asked for."""
    page = models.load(model)
    specs = [spec for size in sizes if (spec := {"twin": page.twin, "wide": page.wide, "real": page.real}.get(size))]
    widths = [width for spec in specs for width in spec.tp_widths().values()]
    return tuple(tp for tp in TP_SIZES if all(width % tp == 0 for width in widths))
