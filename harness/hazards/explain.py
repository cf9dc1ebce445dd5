"""Why a call is wrong: it is made again with one circumstance less, until it is right.

What remains is the cause: poisoned memory, the calls before it, another layer, its neighbours, or the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from harness.algebra import Evidence
from harness.case import Case
from harness.compare import RUN_LIMIT, compare, near_ties
from harness.diagnose import Diagnosis, diagnose
from harness.hazards.judge import Verdicts, judge
from harness.hazards.play import Played, Pools, play, same
from harness.hazards.script import SECOND, Step
from harness.layout import Layout, linear_owners
from harness.problem import Problem, ways
from harness.systems import System
from harness.weights import Tokens
from reference.moe import Choice, forward


class Circumstance(Enum):
    """What has to be taken away for a wrong call to be right."""

    MEMORY = "poisoned memory"
    BEFORE = "the calls before it on the same layer"
    OTHER_LAYER = "the other layer"
    NEIGHBOURS = "junk in other rows"
    PROCESS = "what was called before in the process, on whatever layer"
    ARRANGEMENT = "the order of the rows"
    COUNT = "the number of tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Cause:
    """Of the wrong call `step`.    earlier: the one call that suffices before it; None if there is none, or no single one."""

    step: int
    circumstance: Circumstance
    earlier: Step | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A script that was played and judged, and what is needed to play parts of it again."""

    case: Case
    system: System
    pools: Pools
    played: Played
    wrong: Verdicts

    def goes_wrong(self, *steps: Step) -> bool:
        """Whether the last of these calls, on new layers, has wrong rows, raises, or leaves ranks waiting."""
        again = play(self.case, self.system, self.pools, steps)
        if again.failure is not None:
            return again.failure.step == len(steps) - 1
        return len(steps) - 1 in judge(self.case, self.system, self.pools, again)


def cause_of(scene: Scene, number: int, suspects: Iterable[Step] | None = None) -> Cause:
    """Which circumstance makes step `number` wrong. suspects: the earlier calls that are tried, by default one of each kind."""
    steps, step = scene.played.steps, scene.played.steps[number]
    plain = replace(step, poison=False)
    if step.poison and scene.goes_wrong(step) and not scene.goes_wrong(plain):
        return Cause(number, Circumstance.MEMORY)
    own = next((each for each in steps[:number] if each.layer == step.layer), step)
    if not scene.goes_wrong(plain):
        for earlier in dict.fromkeys((own, *(suspects if suspects is not None else _suspects(steps, number)))):
            if earlier is step:
                continue
            if earlier.layer == step.layer and scene.goes_wrong(earlier, step):
                return Cause(number, Circumstance.BEFORE, earlier)
            if earlier.layer != step.layer and scene.goes_wrong(
                *dict.fromkeys((own, earlier, step))
            ):  # built in this order
                return Cause(number, Circumstance.OTHER_LAYER, earlier)
        return Cause(number, Circumstance.BEFORE)
    if step.junk is not None and not scene.goes_wrong(replace(plain, junk=None)):
        return Cause(number, Circumstance.NEIGHBOURS)
    if step.layer == SECOND:
        alike = Step(step.experiment, step.rows)
        return Cause(number, Circumstance.COUNT if scene.goes_wrong(alike) else Circumstance.OTHER_LAYER)
    right = [n for n in range(len(scene.played.outcomes)) if n not in scene.wrong and steps[n].sizes == step.sizes]
    if right and step.experiment in ("order of rows", "a row twice", "a row alone"):
        return Cause(number, Circumstance.ARRANGEMENT, steps[right[0]])
    before = next((n for n in right if n < number and _judged_there(scene, n, number)), None)
    if before is not None and step.junk is None:
        return Cause(number, Circumstance.PROCESS, steps[before])
    return Cause(number, Circumstance.COUNT)


def _judged_there(scene: Scene, right: int, wrong: int) -> bool:
    """Whether a call that was right has a row that is judged, no near tie, in a place where another call is wrong."""
    tie_M = near_ties(scene.pools.first, scene.system.precision(scene.case.spec))
    rank = scene.wrong.ranks(wrong)[0]
    places = scene.wrong.places(wrong, rank)
    rows = scene.played.steps[right].rows[rank // scene.case.grid.tp][places]
    return not len(rows) or not bool(tie_M[rows].all())


def _suspects(steps: Sequence[Step], number: int) -> Iterable[Step]:
    """Earlier calls that may have left something: the first, the one just before, then one of each kind."""
    before = steps[:number]
    seen: set[tuple[str, str]] = set()
    for each in (*before[:1], *before[-1:], *before):
        if (each.experiment, each.layer) not in seen:
            seen.add((each.experiment, each.layer))
            yield each


def copied_from(scene: Scene, number: int) -> Step | None:
    """The earlier call whose output, to the bit, a wrong call returned in its wrong rows."""
    outcomes, rank = scene.played.outcomes, scene.wrong.ranks(number)[0]
    places, output = scene.wrong.wrong[number, rank], outcomes[number][rank].output
    if output is None or not len(places):
        return None
    for earlier in range(number):
        theirs = outcomes[earlier][rank].output
        if theirs is not None and len(theirs) > int(places[-1]) and same(output[places], theirs[places]):
            return scene.played.steps[earlier]
    return None


def left_over(scene: Scene, number: int, earlier: Step) -> str:
    """Which part of an earlier call of the same size explains a wrong one: its routes, R or S; '' if none does."""
    step, case, outcomes = scene.played.steps[number], scene.case, scene.played.outcomes[number]
    if earlier.sizes != step.sizes or {step.layer, earlier.layer} & {SECOND} or step.junk is not None:
        return ""
    if case.spec.vision is not None or any(outcome.output is None for outcome in outcomes):
        return ""
    spec, first, precision = case.spec, scene.pools.first, scene.system.precision(case.spec)
    now, then = _problem(first, step.rows), _problem(first, earlier.rows)
    outputs, held_RM, wrong_RM = _whole(scene, number, now)
    limit_M = sum(RUN_LIMIT * each.naive_error(ways(spec, case.grid), precision) for each in (now, then))
    routes = Choice(then.stages.topk_ids_MK, then.stages.topk_weights_MK, then.stages.margin_M)
    share, routed_MH = spec.output.share, then.stages.routed_MH - now.stages.routed_MH
    with torch.inference_mode():
        candidates = {
            "the routes": forward(spec, first.exact, now.tokens.hidden_states, choice=routes).output_MH,
            "S": now.stages.output_MH + share * (then.stages.shared_MH - now.stages.shared_MH),
            "R": now.stages.output_MH + share * spec.scale * routed_MH,
        }
    for name, output_MH in candidates.items():
        miss_RM = (torch.stack(outputs) - output_MH).norm(dim=-1) > limit_M
        if not bool((miss_RM & held_RM & wrong_RM).any()):
            return name
    return ""


def has_weights_of_the_first(scene: Scene, number: int) -> bool:
    """Whether a call on the second layer returned what the first one's weights make of its tokens."""
    second, first, outcomes = scene.pools.second, scene.pools.first, scene.played.outcomes[number]
    swapped = _problem(replace_weights(second, first), scene.played.steps[number].rows)
    if any(outcome.output is None for outcome in outcomes):
        return False
    outputs, _, _ = _whole(scene, number, swapped)
    return not compare(swapped, outputs, ways(first.spec, scene.case.grid), scene.system.precision(first.spec)).wrong


def replace_weights(tokens_of: Problem, weights_of: Problem) -> Problem:
    """The tokens of one problem on the weights of another; its stages are not those of either."""
    return Problem(
        weights_of.spec, weights_of.dtype, weights_of.weights, weights_of.exact, tokens_of.tokens, tokens_of.stages
    )  # fmt: skip


def diagnosed(scene: Scene, number: int) -> Diagnosis | None:
    """What the diagnosis of a check says to that call, taken by itself; None where it cannot be asked."""
    case, step, outcomes = scene.case, scene.played.steps[number], scene.played.outcomes[number]
    if step.junk is not None or any(outcome.output is None for outcome in outcomes):
        return None
    if len({outcome.unit for outcome in outcomes}) > 1 or step.layer == SECOND:
        return None
    given = _problem(scene.pools.first, step.rows)
    outputs, held_RM, wrong_RM = _whole(scene, number, given)
    layout = Layout(case.grid, linear_owners(case.spec.routing.num_experts, case.grid.ep))
    precision = scene.system.precision(case.spec)
    with torch.inference_mode():
        return diagnose(Evidence(given, outputs, held_RM, layout, precision, wrong_RM, {}))


def _problem(given: Problem, rows: Sequence[Tensor]) -> Problem:
    """The same layer on these rows of its tokens, those of all data-parallel ranks one after the other."""
    row_M, is_vision = torch.cat(list(rows)), given.tokens.is_vision
    tokens = Tokens(given.tokens.hidden_states[row_M], None if is_vision is None else is_vision[row_M])
    with torch.inference_mode():
        stages = forward(given.spec, given.exact, tokens.hidden_states, is_vision_M=tokens.is_vision)
    return Problem(given.spec, given.dtype, given.weights, given.exact, tokens, stages)


def _whole(scene: Scene, number: int, given: Problem) -> tuple[list[Tensor], Tensor, Tensor]:
    """For each rank its output between the law's own rows, [M, H] float64; which rows it holds, and which are wrong."""
    tp, sizes, outcomes = scene.case.grid.tp, scene.played.steps[number].sizes, scene.played.outcomes[number]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    held_RM, wrong_RM = torch.zeros(2, len(outcomes), starts[-1], dtype=torch.bool)
    outputs = []
    for rank, outcome in enumerate(outcomes):
        assert outcome.output is not None  # who asks has looked
        rows = slice(starts[rank // tp], starts[rank // tp + 1])
        whole_MH = given.stages.output_MH.clone()
        whole_MH[rows] = outcome.output.double() / outcome.unit
        held_RM[rank, rows] = True
        wrong_RM[rank, rows.start + scene.wrong.places(number, rank)] = True
        outputs.append(whole_MH)
    return outputs, held_RM, wrong_RM
