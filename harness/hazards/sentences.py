"""Causes as sentences: one hazard for all calls that one circumstance makes wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.hazards.explain import (
    Cause,
    Circumstance,
    Scene,
    copied_from,
    diagnosed,
    has_weights_of_the_first,
    left_over,
)
from harness.hazards.found import Hazard
from harness.hazards.script import FIRST, SECOND

BLOCKS = (128, 64, 32, 16, 8, 4, 2)


def hazard(scene: Scene, causes: Sequence[Cause]) -> Hazard:
    """causes: of one circumstance, in the order of the calls. The first is told."""
    cause = causes[0]
    step = scene.played.steps[cause.step]
    ranks = tuple(scene.wrong.ranks(cause.step))
    what, earlier = misses(scene, cause.step), cause.earlier
    others = f" ({len(causes) - 1} other calls too)" if len(causes) > 1 else ""
    match cause.circumstance:
        case Circumstance.MEMORY:
            told = f"{step} is wrong, {what}; not in ordinary memory: it reads what nobody wrote"
            return Hazard(step.experiment, told + others, ranks, "G2")
        case Circumstance.NEIGHBOURS:
            told = f"{step} is wrong, {what}; right beside ordinary rows"
            return Hazard(step.experiment, told + others, ranks, "G5")
        case Circumstance.COUNT:
            family, reads = _reading(scene, cause.step)
            empty = 0 in step.sizes and scene.played.outcomes[cause.step][ranks[0]].output is None
            told = f"{pattern(scene, [each.step for each in causes])}{reads}"
            return Hazard("M sweep", told, ranks, "G7" if empty else family)
        case Circumstance.ARRANGEMENT:
            family, reads = _reading(scene, cause.step)
            told = f"{step}, {ARRANGED[step.experiment]}, is wrong, {what}; {earlier} is right"
            return Hazard(step.experiment, told + others + reads, ranks, family)
        case Circumstance.OTHER_LAYER:
            told = f"{step} is wrong, {what}"
            if earlier is not None:
                told += f", after {earlier}; right without it: layers share what is not theirs"
            elif step.layer == SECOND and has_weights_of_the_first(scene, cause.step):
                told += ": it computes with the weights of the first layer"
            return Hazard("two layers", told + _copied(scene, cause.step) + others, ranks)
        case Circumstance.PROCESS:
            told = f"{step} is wrong, {what}, on a new layer too; {earlier} was right: something outlives the layer"
            return Hazard(step.experiment, told + _copied(scene, cause.step) + others, ranks)
        case Circumstance.BEFORE:
            family, reads = _reading(scene, cause.step)
            after = "the calls before it" if earlier is None else str(earlier)
            copied, left = _copied(scene, cause.step), "" if earlier is None else left_over(scene, cause.step, earlier)
            told = f"{step} is wrong, {what}, after {after}; right on a new layer{copied}"
            if left and not copied:
                told, family = f"{told}: it computes with {left} of that call", "H2"
            if earlier is not None and earlier.junk is not None:
                family = "G5"
            elif 0 in step.sizes and scene.played.outcomes[cause.step][ranks[0]].output is None:
                family = "G7"
            elif family is not None and family.startswith("B"):
                family = "B9"
            return Hazard(step.experiment, told + others + reads, ranks, family)


ARRANGED = {
    "order of rows": "in reverse order",
    "a row twice": "each of them twice",
    "a row alone": "a row of a larger call",
}


def _reading(scene: Scene, number: int) -> tuple[str | None, str]:
    """The family that the diagnosis gives a call, and its sentence to be added; empty if it knows none."""
    cause = diagnosed(scene, number)
    if cause is None or cause.family is None:
        return None, ""
    rank = scene.wrong.ranks(number)[0]
    some = len(scene.wrong.places(number, rank)) < scene.played.steps[number].sizes[rank // scene.case.grid.tp]
    return "G9" if cause.family == "A6" and some else cause.family, f"; it reads: {cause.sentence}"


def _copied(scene: Scene, number: int) -> str:
    earlier = copied_from(scene, number)
    return "" if earlier is None else f", and returns what {earlier} had returned"


def misses(scene: Scene, number: int) -> str:
    """'all 7 rows', 'row 16 of 17 on rank 1', 'it returned fp32[7, 64], expected fp32[0, 64]': of the first wrong rank."""
    ranks, step = scene.wrong.ranks(number), scene.played.steps[number]
    rank, tp = ranks[0], scene.case.grid.tp
    where = "" if len(ranks) == scene.case.grid.ranks else f" on rank {rank}"
    misshapen = scene.played.outcomes[number][rank].misshapen
    if misshapen is not None:
        return f"it {misshapen}{where}"
    places, m, junk = scene.wrong.places(number, rank).tolist(), step.sizes[rank // tp], step.junk_at(rank // tp)
    judged = m if junk is None else m - int(junk.sum())
    if len(places) == judged:
        return f"all {judged} {'other ' if judged < m else ''}rows{where}" if judged > 1 else f"its row{where}"
    told = f"row{'s' if len(places) > 1 else ''} {', '.join(map(str, places[:6]))}"
    return f"{told}{f' and {len(places) - 6} others' if len(places) > 6 else ''} of {m}{where}"


def pattern(scene: Scene, numbers: Sequence[int]) -> str:
    """'wrong at M = 17, 33, right at 16, 32: ...', and which rows if one rule fits all calls."""
    steps, done = scene.played.steps, range(len(scene.played.outcomes))
    plain = [n for n in done if steps[n].layer == FIRST and steps[n].junk is None]
    bad = _ordered({steps[n].sizes for n in numbers})
    good = _ordered({steps[n].sizes for n in plain if n not in scene.wrong} - set(bad))
    near = [g for g in good if any(abs(sum(g) - sum(b)) <= 1 for b in bad)] or good
    told = f"wrong at M = {_sizes(bad)}, right at {_sizes(near) if near else 'none'}"
    rule = _rule(scene, plain)
    first = scene.played.steps[numbers[0]]
    return f"{told}: {rule}" if rule else f"{told}; {misses(scene, numbers[0])} at M = {_sizes([first.sizes])}"


def _ordered(sizes: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted(sizes, key=lambda each: (sum(each), each))


def _sizes(sizes: Sequence[tuple[int, ...]], most: int = 8) -> str:
    told = ", ".join("+".join(map(str, each)) for each in sizes[:most])
    return told + (f" and {len(sizes) - most} others" if len(sizes) > most else "")


def _rule(scene: Scene, plain: Sequence[int]) -> str:
    """The one rule that says which rows are wrong in all plain calls, if there is one."""
    tp, ranks = scene.case.grid.tp, {rank for _, rank in scene.wrong.wrong}
    calls = [
        (scene.played.steps[number].sizes[rank // tp], scene.wrong.places(number, rank).tolist())
        for number in plain
        for rank in ranks
    ]
    begin = min((wrong[0] for _, wrong in calls if wrong), default=0)
    if not any(wrong for _, wrong in calls):
        return ""

    def fits(expected: Callable[[int], int]) -> bool:
        """Whether the rows from expected(m) on go wrong, no others, and not just some of them: near ties are not judged."""
        return all(
            bool(wrong) == (expected(m) < m)
            and min(wrong, default=m) >= expected(m)
            and 2 * len(wrong) >= m - expected(m)
            for m, wrong in calls
        )

    for block in BLOCKS:
        if fits(lambda m, block=block: m - m % block):  # type: ignore[misc]
            return f"the last m mod {block} rows of m"
    return f"the rows beyond the first {begin}" if begin and fits(lambda m: min(begin, m)) else ""
