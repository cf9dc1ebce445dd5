"""State and hazards of any system: what one call on a new layer cannot show. `hazards(case, system)` makes many calls.

Stale decisions and buffers, layers that share state, unwritten memory, neighbours that leak, tensors of the caller that
are written, numbers of tokens that go wrong. `script` says which calls are made, `play` makes them, `judge` holds every
row to the law, and `explain` finds the circumstance without which a wrong call is right.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.case import Case
from harness.errors import ranks_text
from harness.hazards.explain import Cause, Circumstance, Scene, cause_of
from harness.hazards.found import Hazard, HazardReport
from harness.hazards.judge import Verdicts, judge
from harness.hazards.play import Failure, Played, Pools, play, same
from harness.hazards.script import EXPERIMENTS, FEW, POOL, SECOND, Step, script
from harness.hazards.sentences import hazard
from harness.problem import problem
from harness.systems import System

__all__ = ["Hazard", "HazardReport", "hazards"]

# looked at in every call
WRITES = ("input unchanged", "weights unchanged", "outputs kept")
# so many calls that raise are left out, one after the other, to see what the others do
MAX_FAILURES = 12


def hazards(case: Case, system: System, *, full: bool = False) -> HazardReport:
    """Make every call of the script on layers of a case: its tokens do not matter, nor does what any single call gets wrong.

    full: all numbers of tokens from 0 to 130 instead of 19 of them. Raises CouldNotRun if the layer cannot be built.
    """
    case, every = replace(case, calls="one"), (*EXPERIMENTS, *WRITES)
    reason = system.supports(case)
    if case.size == "labels":
        reason = "a labelled layer has the tokens of its labels, and one call shows all that they say"
    if reason is not None:
        return HazardReport(skipped=dict.fromkeys(every, reason))
    pools = Pools(
        problem(replace(case, tokens=POOL, split=None)),
        problem(replace(case, tokens=FEW, split=None, seed=(case.seed + 1) % 2**64)),
    )
    steps = script(case, full)
    played, raised, refused = _played(case, system, pools, steps)
    all_wrong = judge(case, system, pools, played)
    wrong = _sometimes_right(case, played, all_wrong)
    if 0 in all_wrong and 0 not in wrong:
        reason = "the rows of the first call are wrong in every call: a check of the case tells the cause"
        return HazardReport(tuple(_writes(played)), skipped=dict.fromkeys(every, reason))  # nothing was tried: no pass
    scene = Scene(case, system, pools, played, wrong)
    broken = [*raised, *_writes(played)]
    if wrong.wrong:
        random = _random(scene)
        broken += [random] if random else _causes(scene)
    made = dict.fromkeys(step.experiment for step in played.steps[: len(played.outcomes)])
    asked = dict.fromkeys([*(step.experiment for step in steps), *(each.name for each in broken)])
    skipped = {
        name: refused.get(name, "its calls raise, or come after those that do")
        for name in EXPERIMENTS
        if name not in made and name in asked
    }
    skipped = {name: why for name, why in skipped.items() if name not in {each.name for each in raised}}
    return HazardReport(tuple(broken), (*made, *WRITES), skipped, tuple(_notes(scene)))


def _played(case: Case, system: System, pools: Pools, steps: list[Step]) -> tuple[Played, list[Hazard], dict[str, str]]:
    """The script less the calls that raise; a hazard for each of them, or, of junk, why the experiment was not made."""
    raised: dict[str, Hazard] = {}
    refused: dict[str, str] = {}
    state = False  # what calls leave behind has made one raise: others that raise say no more
    for _ in range(MAX_FAILURES):
        played = play(case, system, pools, steps)
        if played.failure is None:
            break
        failed = steps[played.failure.step]
        if failed.junk is not None and played.failure.sentence.startswith("raises"):  # it may refuse what is no number
            refused[failed.experiment] = f"the layer {played.failure.sentence}"
        elif failed.experiment not in raised and not state:
            raised[failed.experiment], on_new = _raised(case, system, pools, failed, played.failure)
            state = not on_new
        else:  # the second of its kind: the others would raise as well
            steps = [each for each in steps if each.experiment != failed.experiment]
        steps = [each for each in steps if each is not failed]
    return played, list(raised.values()), refused


def _raised(case: Case, system: System, pools: Pools, step: Step, failure: Failure) -> tuple[Hazard, bool]:
    """The hazard, and whether the call raises on a new layer too."""
    alone = play(case, system, pools, [step]).failure if failure.step else failure
    told = f"{step} {failure.sentence}" + ("" if alone else "; not on a new layer")
    empty = alone is not None and 0 in step.sizes
    return Hazard(step.experiment, told, tuple(range(case.grid.ranks)), "G7" if empty else None), alone is not None


def _sometimes_right(case: Case, played: Played, wrong: Verdicts) -> Verdicts:
    """The wrong rows that the same rank returned rightly in another call: in the others no circumstance matters."""
    if not wrong.wrong:
        return wrong
    tp = case.grid.tp

    def key(step: Step, rank: int) -> tuple[bool, int]:
        return step.layer == SECOND, rank

    right: dict[tuple[bool, int], set[int]] = {}
    for number, outcomes in enumerate(played.outcomes):
        step = played.steps[number]
        for rank in range(len(outcomes)):
            rows, junk_m = step.rows[rank // tp], step.junk_at(rank // tp)
            right_m = torch.ones(len(rows), dtype=torch.bool) if junk_m is None else ~junk_m
            right_m[wrong.places(number, rank)] = False
            right.setdefault(key(step, rank), set()).update(rows[right_m].tolist())
    kept: dict[tuple[int, int], Tensor] = {}
    for (number, rank), places in wrong.wrong.items():
        step = played.steps[number]
        rows = step.rows[rank // tp][places]
        known = [row in right[key(step, rank)] for row in rows.tolist()]
        first_layer_right = step.layer == SECOND and bool(right.get((False, rank)))
        if not known or first_layer_right:
            kept[number, rank] = places
        elif any(known):
            kept[number, rank] = places[torch.tensor(known)]
    return Verdicts(kept)


def _writes(played: Played) -> list[Hazard]:
    """Tensors of the caller that changed."""
    found = []
    every = [(number, rank, each) for number, row in enumerate(played.outcomes) for rank, each in enumerate(row)]
    written = {rank: each for rank, each in enumerate(played.written) if each is not None}
    if written:
        first = next(iter(written.values()))
        names = ", ".join(first.names[:4]) + (f" and {len(first.names) - 4} others" if len(first.names) > 4 else "")
        told = f"the layer wrote into weights that it was given, {first.when}: {names}"
        found.append(Hazard("weights unchanged", told, tuple(written)))
    touched = [(number, rank) for number, rank, each in every if each.wrote_input]
    if touched:
        told = (
            f"{played.steps[touched[0][0]]} changed its hidden states, as do {len({n for n, _ in touched})} of "
            f"{len(played.outcomes)} calls; the caller still needs them for its residual"
        )
        found.append(Hazard("input unchanged", told, tuple(sorted({rank for _, rank in touched})), "C1"))
    lost = [(number, rank, each.overwritten_by) for number, rank, each in every if each.overwritten_by is not None]
    if lost:
        number, _, by = lost[0]
        how = "a later call" if by == len(played.steps) else str(played.steps[by])
        told = (
            f"what {played.steps[number]} had returned was overwritten by {how}; the outputs of "
            f"{len({n for n, _, _ in lost})} of {len(played.outcomes)} calls did not last"
        )
        found.append(Hazard("outputs kept", told, tuple(sorted({rank for _, rank, _ in lost}))))
    return found


def _random(scene: Scene) -> Hazard | None:
    """Whether the wrong rows are others each time: told as one hazard, for no circumstance explains them."""
    case, system, pools, played = scene.case, scene.system, scene.pools, scene.played
    one, two = (play(case, system, pools, played.steps) for _ in range(2))  # what outlives a layer is there in both
    if one.failure or two.failure:
        return None
    first, second = (judge(case, system, pools, each) for each in (one, two))
    differ = sorted(
        key for key in {*first.wrong, *second.wrong} if first.places(*key).tolist() != second.places(*key).tolist()
    )
    if not differ:
        return None
    number = differ[0][0]
    unwritten = [n for n in _not_finite(one) & _not_finite(two) if played.steps[n].poison]
    if unwritten and not any(played.steps[n].junk is None and not played.steps[n].poison for n in _not_finite(one)):
        rank = first.ranks(unwritten[0])[0]
        told = (
            f"{played.steps[unwritten[0]]} gives NaN, and ordinary calls give other rows each time, first "
            f"{played.steps[number]}: it reads what nobody wrote"
        )
        return Hazard("poisoned memory", told, (rank,), "G2")
    told = (
        f"the same calls on new layers give other rows each time, beyond rounding, in {len({n for n, _ in differ})} of "
        f"{len(played.outcomes)} calls, first in {played.steps[number]}"
    )
    return Hazard("equal calls", told, tuple(rank for n, rank in differ if n == number))


def _not_finite(played: Played) -> set[int]:
    """The calls with an output, on any rank, that is not finite."""
    return {
        number
        for number, row in enumerate(played.outcomes)
        if any(each.output is not None and not bool(each.output.isfinite().all()) for each in row)
    }


def _causes(scene: Scene) -> list[Hazard]:
    """One hazard for each circumstance that makes calls wrong."""
    causes: dict[tuple[Circumstance, str], list[Cause]] = {}
    for number in scene.wrong.steps:
        known = [each.earlier for group in causes.values() for each in group if each.earlier is not None]
        cause = cause_of(scene, number, known or None)
        apart = cause.circumstance in (Circumstance.NEIGHBOURS, Circumstance.ARRANGEMENT)
        kind = scene.played.steps[number].experiment if apart else ""
        causes.setdefault((cause.circumstance, kind), []).append(cause)
    process = causes.get((Circumstance.PROCESS, ""))
    if process is not None:  # no layer is new then, so what calls on new layers say means nothing
        others = [each for group in causes.values() for each in group if each.circumstance is not Circumstance.PROCESS]
        return [hazard(scene, [*process, *others])]
    return [hazard(scene, each) for each in causes.values()]


def _notes(scene: Scene) -> list[str]:
    """Where equal calls are right, but not equal to the bit."""
    outcomes, steps = scene.played.outcomes, scene.played.steps
    if len(outcomes) < 2 or steps[1].experiment != "equal calls" or 0 in scene.wrong or 1 in scene.wrong:
        return []
    pairs = zip(outcomes[0], outcomes[1], strict=True)
    ranks = [
        r
        for r, (a, b) in enumerate(pairs)
        if a.output is not None and b.output is not None and not same(a.output, b.output)
    ]
    return [f"two equal calls differ by rounding on {ranks_text(ranks)}"] if ranks else []
