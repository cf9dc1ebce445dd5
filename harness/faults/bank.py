"""All faults, and where each is planted: on every model that has what it breaks, on the grids of its stage or its own."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator, Sequence

from harness import models as pages
from harness.case import Case, Grid, parse
from harness.errors import HarnessError, UsageError, unknown
from harness.faults.fault import Fault
from harness.systems.runner import RunnerSystem

STAGES = ("scale", "reduce", "order", "routing", "shared", "expert", "shape")

# What follows the model in a case, by the first letter of the family. Single ranks are among them: there a fault of the
# reduction has to be shown to change nothing.
GRIDS: dict[str, tuple[str, ...]] = {
    "A": ("tp1", "tp2", "tp4.ep4.bf16", "tp4.ep4.sp4", "tp2.ep4.dp2+kernel=deepep_ht"),
    "B": ("tp1", "tp2", "tp4.fp16", "tp4.ep2.bf16", "tp4.ep4", "tp2.ep4.dp2.tokens33"),
    "C": ("tp1", "tp2", "tp4.ep4", "tp4.bf16", "tp2.ep4.dp2"),
    "D": ("tp1.tokens33", "tp2.bf16.tokens33", "tp2.ep4.dp2.tokens33+kernel=deepep_ht"),
    "E": ("tp1", "tp2", "tp4.ep4.bf16", "tp2.ep4.dp2"),
    "F": ("tp1.tokens33", "tp2.tokens33", "tp4.ep4.tokens33", "tp2.ep4.dp2.tokens33"),
    "G": ("tp1.tokens33", "tp2.ep2.tokens33", "tp4.ep4.sp4.tokens33", "tp2.ep4.dp2.tokens33+kernel=deepep_ht"),
}
# A model takes that many of the grids, in turn, where a diagnosis has many rules to try; all models together take all.
IN_TURN = {"D": 1, "E": 2, "F": 1, "G": 1, "P": 1}


@functools.cache
def bank() -> tuple[Fault, ...]:
    """Every fault, by stage. HarnessError if two share a name."""
    faults: list[Fault] = []
    for stage in STAGES:
        name = f"harness.faults.{stage}"
        if importlib.util.find_spec(name) is not None:
            faults += importlib.import_module(name).FAULTS
    names = [fault.name for fault in faults]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise HarnessError(f"two faults are called {', '.join(sorted(twice))}: give one of them another name")
    return tuple(faults)


@functools.cache
def by_name() -> dict[str, Fault]:
    return {fault.name: fault for fault in bank()}


def chosen(names: Sequence[str]) -> tuple[Fault, ...]:
    """The faults of those names or families, all if there are none. UsageError for a name nobody has."""
    families = dict.fromkeys(fault.family for fault in bank())
    for name in names:
        if name not in families and name not in by_name():
            raise unknown("fault", name, (*families, *by_name()), "moe-harness faults --list")
    return tuple(fault for fault in bank() if not names or fault.name in names or fault.family in names)


def placements(fault: Fault, models: Sequence[str], grids: Sequence[Grid] | None = None) -> list[Case]:
    """The cases in which a fault is planted: its own, and each model on each grid that has what the fault breaks.

    grids: instead of those of the bank, each with every set of options that the fault asks for.
    """
    texts = fault.grids or GRIDS.get(fault.family[:1], GRIDS["F"])
    if grids is not None:
        options = dict.fromkeys(text.partition("+")[2] for text in texts)
        texts = tuple(f"{grid}{f'+{option}' if option else ''}" for grid in grids for option in options)
    own = parse(fault.case)
    wanted = [own] if grids is None and own.model in models else []
    cases = dict.fromkeys(wanted)
    system = RunnerSystem()
    for turn, model in enumerate(pages.names()):
        if model in models:
            able = [case for case in _cases(model, texts) if fault.applies(case) and system.supports(case) is None]
            most = len(able) if grids is not None else IN_TURN.get(fault.family[:1], len(able))
            cases |= dict.fromkeys([*able[turn % (len(able) or 1) :], *able][:most])
    return list(cases)


def _cases(model: str, texts: Sequence[str]) -> Iterator[Case]:
    """Those that can exist: not every grid divides every width."""
    for text in texts:
        try:
            yield parse(f"{model}@{text}")
        except UsageError:
            continue
