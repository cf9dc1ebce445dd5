"""What a layer that no law explains does when it is asked again: does it repeat itself, and does a row need its neighbours?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.compare import RUN_LIMIT
from harness.errors import CouldNotRun
from harness.execution import Run, run_system
from harness.outputs import whole_output
from harness.problem import Problem, ways
from harness.systems import Layer, System
from harness.weights import Tokens
from reference.spec import MoESpec, RouterPrecision

# How much further off than a right row's limit a difference has to be, for two runs to tell it from roundings.
_CLEARLY = 4.0


class _Watched:
    """A system whose layers' weights are kept, to be looked at after the call."""

    def __init__(self, system: System) -> None:
        self.name, self.foreign, self._system = system.name, system.foreign, system
        self.given: list[Mapping[str, Tensor]] = []

    def supports(self, case: Case) -> str | None:
        return self._system.supports(case)

    def precision(self, spec: MoESpec) -> RouterPrecision:
        return self._system.precision(spec)

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        self.given.append(weights)
        return self._system.build(case, weights, comm)


def second_look(case: Case, system: System, given: Problem, run: Run, wrong_M: Tensor) -> str | None:
    """The first of these that holds, in one sentence: it writes into its weights, it does not repeat itself, a row that is
    wrong among others is right alone. None if it is wrong in the same way each time, or cannot be asked again.

    wrong_M: bool, the tokens that some rank returned wrongly.
    """
    try:
        return _again(case, system, given, run, wrong_M) or _alone(case, system, given, run, wrong_M)
    except CouldNotRun:
        return None


def _again(case: Case, system: System, given: Problem, run: Run, wrong_M: Tensor) -> str | None:
    watched = _Watched(system)
    again = run_system(case, watched, given)
    if again.broken is not None:
        return f"asked again, it fails: {again.broken[1]}"
    if system.foreign:  # our own layers get the weights themselves, and those are not copied for each rank
        written = {
            name for mine in watched.given for name, tensor in mine.items() if not tensor.equal(given.weights[name])
        }
        if written:
            return f"it writes into the weights that it was given: {', '.join(sorted(written))}"
    limit_M = _CLEARLY * _limit_M(case, system, given)
    for rank, (first, second) in enumerate(zip(run.ranks, again.ranks, strict=True)):
        first_MH = whole_output(first, given)
        off_M = (whole_output(second, given) - first_MH).norm(dim=-1)
        if bool((~(off_M <= limit_M) & wrong_M).any()):
            row = int((off_M / limit_M * wrong_M).nan_to_num(torch.inf).argmax())
            size = float(off_M[row] / first_MH[row].norm())
            return (
                "it does not repeat itself: the same call on a new layer gives other rows "
                f"(token {row} on rank {rank} differs by {size:.3g} of its length)"
            )
    return None


def _alone(case: Case, system: System, given: Problem, run: Run, wrong_M: Tensor) -> str | None:
    if case.tokens < 2:
        return None
    law_MH = given.stages.output_MH
    error_M = torch.stack([(whole_output(out, given) - law_MH).norm(dim=-1) for out in run.ranks]).amax(0)
    row = int((error_M * wrong_M).nan_to_num(torch.inf).argmax())
    tp, homes = case.grid.tp, [case.rows[dp * case.grid.tp] for dp in range(case.grid.dp)]
    home = next(dp for dp, rows in enumerate(homes) if rows.start <= row < rows.stop)
    split = None if case.grid.dp == 1 else tuple(int(dp == home) for dp in range(case.grid.dp))
    vision = given.tokens.is_vision
    one = Tokens(given.tokens.hidden_states[row : row + 1], None if vision is None else vision[row : row + 1])
    asked = run_system(replace(case, tokens=1, split=split), system, replace(given, tokens=one, _errors={}))
    if asked.broken is not None:
        return None
    limit = _limit_M(case, system, given)[row]
    if error_M[row] <= _CLEARLY * limit:
        return None
    alone = [out.output.double()[0] / out.unit for out in asked.ranks[home * tp : (home + 1) * tp]]
    if not all(bool((y_H - law_MH[row]).norm() <= limit) for y_H in alone):
        return None
    return f"a row depends on what else its call holds: token {row} alone comes out right"


def _limit_M(case: Case, system: System, given: Problem) -> Tensor:
    return RUN_LIMIT * given.naive_error(ways(given.spec, case.grid), system.precision(given.spec))
