"""What the layer of a case has: where a fault can be planted, and where it has to show."""

from __future__ import annotations

from collections.abc import Callable

from harness.case import Case


def has_shared(case: Case) -> bool:
    """Shared experts as a module of their own."""
    return case.spec.shared is not None and case.shared == "separate"


def unreduced(case: Case) -> bool:
    """The kernel leaves the sum over tp to the runner, and the runner makes it."""
    return case.kernel == "partial" and case.grid.sp == 1 and case.reduce == "layer"


def scaler(case: Case) -> str | None:
    """Who multiplies by s: "router", "kernel" or "runner"; "unit" where the call returns R + S/s; None without s."""
    spec = case.spec
    if spec.scale == 1.0:
        return None
    if case.scaled_by == "kernel" or (case.scaled_by == "router" and case.experts == "monolithic"):
        return "kernel"
    able = spec.routing.n_group > 1 or spec.routing.correction_bias
    if case.scaled_by == "router" and able:
        return "router"
    return "unit" if case.scaled_by == "output" and case.dtype == "fp16" and has_shared(case) else "runner"


def chooses_with_bias(case: Case) -> bool:
    return case.spec.routing.correction_bias


def has_groups(case: Case) -> bool:
    return case.spec.routing.n_group > 1


def has_experts_elsewhere(case: Case) -> bool:
    return case.grid.ep > 1


def takes_rows(case: Case) -> bool:
    """No kernel of the case sorts its rows by expert."""
    return case.experts != "batched" and "deepep_ll" not in (case.kernel, case.swap)


def both(*conditions: Callable[[Case], bool]) -> Callable[[Case], bool]:
    """All of them."""
    return lambda case: all(condition(case) for condition in conditions)
