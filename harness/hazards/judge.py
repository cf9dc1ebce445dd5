"""Which rows of which call are wrong: the row rule of `compare`, over all calls of a script at once.

Junk rows are not judged, nor are rows whose choice of experts is a near tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case
from harness.compare import RUN_LIMIT, compare, near_ties
from harness.hazards.play import Played, Pools
from harness.hazards.script import SECOND
from harness.problem import Problem, ways
from harness.systems import System


@dataclass(frozen=True, slots=True, eq=False)
class Verdicts:
    """wrong: (step, rank) -> the places in the call, sorted, of its wrong rows; those that have none are left out."""

    wrong: Mapping[tuple[int, int], Tensor]

    def __contains__(self, step: int) -> bool:
        return any(number == step for number, _ in self.wrong)

    @property
    def steps(self) -> list[int]:
        return sorted({step for step, _ in self.wrong})

    def ranks(self, step: int) -> list[int]:
        return sorted(rank for number, rank in self.wrong if number == step)

    def places(self, step: int, rank: int) -> Tensor:
        """Sorted; empty if the rank has no wrong row there."""
        return self.wrong.get((step, rank), torch.empty(0, dtype=torch.long))


def judge(case: Case, system: System, pools: Pools, played: Played) -> Verdicts:
    """The wrong rows of every call; all rows of one that returned no tensor of the right shape."""
    wrong: dict[tuple[int, int], Tensor] = {}
    for second in (False, True):
        wrong |= _judge(case, system, pools.second if second else pools.first, played, second)
    return Verdicts(wrong)


def _judge(case: Case, system: System, given: Problem, played: Played, second: bool) -> dict[tuple[int, int], Tensor]:
    wrong: dict[tuple[int, int], Tensor] = {}
    keys: list[tuple[int, int]] = []
    places, rows, found = [], [], []
    for number, outcomes in enumerate(played.outcomes):
        step = played.steps[number]
        if (step.layer == SECOND) is not second:
            continue
        for rank, outcome in enumerate(outcomes):
            dp_rank = rank // case.grid.tp
            place_m = torch.arange(len(step.rows[dp_rank]))
            if outcome.output is None:
                wrong[number, rank] = place_m
                continue
            junk_m = step.junk_at(dp_rank)
            place_m = place_m if junk_m is None else place_m[~junk_m]
            keys.append((number, rank))
            places.append(place_m)
            rows.append(step.rows[dp_rank][place_m])
            found.append(outcome.output[place_m].double() / outcome.unit)
    if not keys:
        return wrong
    found_NH, row_N, place_N = torch.cat(found), torch.cat(rows), torch.cat(places)
    bad_N = _wrong(case, system, given, found_NH, row_N)
    if bool(bad_N.any()):
        key_N = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(list(map(len, places))))
        for number in key_N[bad_N].unique().tolist():
            wrong[keys[number]] = place_N[bad_N & (key_N == number)]
    return wrong


def _wrong(case: Case, system: System, given: Problem, found_NH: Tensor, row_N: Tensor) -> Tensor:
    """Bool [N]: which outputs are wrong for these rows of the pool."""
    way, precision = ways(given.spec, case.grid), system.precision(given.spec)
    law_MH, limit_M = given.stages.output_MH, RUN_LIMIT * given.naive_error(way, precision)
    with torch.inference_mode():
        beyond_N = ~((found_NH - law_MH[row_N]).norm(dim=-1) <= limit_M[row_N])  # the negation also catches NaN
        if not bool(beyond_N.any()):
            return beyond_N
        beyond_N &= ~near_ties(given, precision)[row_N]
        left_N, bad_N = beyond_N.nonzero()[:, 0], torch.zeros_like(beyond_N)
        if not len(left_N):
            return bad_N
        # `compare` wants a place for each row, so outputs of one row go to one copy each of the law's
        order = row_N[left_N].argsort(stable=True)
        left_N = left_N[order]
        copy_N = _occurrence(row_N[left_N])
        for copies in copy_N.unique().split(64):
            chosen = left_N[torch.isin(copy_N, copies)]
            copy = copy_N[torch.isin(copy_N, copies)] - int(copies[0])
            outputs = law_MH.repeat(len(copies), 1, 1)
            outputs[copy, row_N[chosen]] = found_NH[chosen]
            bad_N[chosen] = compare(given, list(outputs), way, precision).wrong_RM[copy, row_N[chosen]]
    return bad_N


def _occurrence(sorted_N: Tensor) -> Tensor:
    """How many equal numbers stand before each: [4, 4, 7, 9, 9, 9] -> [0, 1, 0, 0, 1, 2]."""
    _, counts = sorted_N.unique_consecutive(return_counts=True)
    start_N = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.arange(len(sorted_N)) - start_N
