"""Layers that are right in their first call and wrong later, or beside other rows: each is found, and no right layer is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from harness import models
from harness.case import parse
from harness.check import check
from harness.errors import CouldNotRun, UsageError
from harness.finding import Verdict
from harness.hazards import HazardReport, hazards
from harness.hazards.judge import judge
from harness.hazards.play import Pools, play
from harness.hazards.script import POOL, script
from harness.problem import problem
from harness.systems import resolve
from harness.systems.runner import RunnerSystem
from tests.bite import state_faults, state_faults_of_the_runner

RUNNER = resolve("runner")
FILE = Path(state_faults.__file__)
GRIDS = ("tp1", "tp4.ep4", "tp2.ep4.dp2+kernel=deepep_ht", "tp4.ep4.sp4", "tp2+placement=moved", "tp2.ep2+swap=reduced")


def told(report: HazardReport) -> str:
    return "; ".join(map(str, report.broken)) or "nothing"


@pytest.mark.parametrize("model", models.names())
def test_no_right_layer_has_a_hazard(model: str):
    for number, grid in enumerate(GRIDS):
        dtype = ("fp32", "bf16", "fp16")[(number + len(model)) % 3]
        head, plus, tail = grid.partition("+")
        try:
            case = parse(f"{model}@{head}.{dtype}{plus}{tail}")
        except UsageError:
            continue  # the grid does not divide the model's widths
        report = hazards(case, RUNNER)
        assert not report.broken, f"{case}: {told(report)}"
    for name in ("legacy", "transformers"):
        report = hazards(parse(f"{model}@bf16"), resolve(name))
        assert not report.broken, f"{name}: {told(report)}"


@pytest.mark.parametrize("name", state_faults.FAULTS)
def test_a_layer_with_a_memory_is_found_and_named_by_its_circumstance(name: str):
    fault = state_faults.FAULTS[name]
    report = hazards(parse(fault.case), resolve(f"{FILE}:{name}"))
    meant = [each for each in report.broken if each.name in fault.named]
    assert meant, f"{fault.says}: {told(report)}"
    for words in fault.words:
        assert any(re.search(words, each.sentence) for each in meant), f"{words!r} is not in: {told(report)}"
    assert fault.family in {each.family for each in meant} | {None}, told(report)
    for case in fault.lawful.split():
        assert not hazards(parse(case), resolve(f"{FILE}:{name}")).broken


@pytest.mark.parametrize("name", state_faults.HARMLESS)
def test_a_right_layer_of_an_outsider_has_no_hazard(name: str):
    report = hazards(parse(state_faults.HARMLESS[name].case), resolve(f"{FILE}:{name}"))
    assert not report.broken, told(report)


@pytest.mark.parametrize("name", state_faults_of_the_runner.FAULTS)
def test_a_runner_with_a_memory_is_found(name: str):
    fault = state_faults_of_the_runner.FAULTS[name]
    report = hazards(parse(fault.case), fault.system(name))
    meant = [each for each in report.broken if each.name == fault.named]
    assert meant, f"{fault.says}: {told(report)}"
    for words in fault.words:
        assert any(re.search(words, each.sentence) for each in meant), f"{words!r} is not in: {told(report)}"
    assert fault.family in {each.family for each in meant} | {None}, told(report)


@pytest.mark.parametrize(
    "name", ["decided_once", "routes_by_count", "returns_its_buffer", "one_wrong_at_17", "weights_by_shape"]
)
def test_one_call_on_a_new_layer_shows_none_of_these(name: str):
    case = parse(state_faults.FAULTS[name].case)
    assert check(case, resolve(f"{FILE}:{name}")).verdict is Verdict.OK


@pytest.mark.parametrize("text", ["mixtral@tp2", "mixtral@dp4", "mixtral@tp4.ep4.sp4"])
def test_a_full_sweep_leaves_out_no_number_of_tokens(text: str):
    case = parse(text)
    swept = {sum(step.sizes) for step in script(case, full=True) if step.experiment == "M sweep"}
    assert swept == set(range(POOL + 1))
    assert not hazards(case, RUNNER, full=True).broken
    for step in script(case, full=False):
        assert len(step.sizes) == case.grid.dp
        assert all(len(rows) == size for rows, size in zip(step.rows, step.sizes, strict=True))


def test_calls_over_dp_leave_ranks_empty_and_split_unevenly():
    sizes = {step.sizes for step in script(parse("mixtral@dp4"), full=False)}
    assert any(0 in each and sum(each) > 0 for each in sizes), "a rank without tokens beside one that has some"
    assert any(max(each) > 2 * min(each) > 0 for each in sizes)
    assert any(sum(each) < 4 for each in sizes)


def test_a_layer_that_is_wrong_in_every_call_is_not_accused_of_a_memory():
    class Doubled(RunnerSystem):
        def build(self, case, weights, comm):
            layer = super().build(case, weights, comm)
            return lambda x_MH, **inputs: 2 * layer(x_MH, **inputs)

    report = hazards(parse("mixtral@tp2"), Doubled())
    assert not report.broken
    assert not report.tried
    assert all("wrong in every call" in why for why in report.skipped.values())


def test_weights_that_are_written_are_told_even_where_every_call_is_wrong():
    case = parse("gpt_oss@bf16")  # adding 1 and taking it away leaves other weights there
    (found,) = hazards(case, resolve(f"{FILE}:folds_into_the_given")).broken
    assert found.name == "weights unchanged"


def test_a_layer_may_refuse_what_is_no_number():
    class Wary(RunnerSystem):
        def build(self, case, weights, comm):
            layer = super().build(case, weights, comm)

            def forward(x_MH, **inputs):
                if not bool(x_MH.isfinite().all()):
                    raise ValueError("hidden states are not finite")
                return layer(x_MH, **inputs)

            return forward

    report = hazards(parse("mixtral@tp2"), Wary())
    assert not report.broken, told(report)
    assert set(report.skipped) == {"infinite neighbours", "NaN neighbours"}
    assert "not finite" in report.skipped["NaN neighbours"]


def test_a_layer_that_raises_at_one_number_of_tokens_is_told_once_with_it():
    class Raising(RunnerSystem):
        def build(self, case, weights, comm):
            layer = super().build(case, weights, comm)

            def forward(x_MH, **inputs):
                if len(x_MH) == 31:
                    raise RuntimeError("no kernel for this shape")
                return layer(x_MH, **inputs)

            return forward

    (found,) = hazards(parse("mixtral"), Raising()).broken
    assert found.name == "M sweep"
    assert "31 tokens" in found.sentence
    assert "no kernel for this shape" in found.sentence


def test_what_cannot_be_built_could_not_run_and_what_is_not_offered_is_skipped():
    class Broken(RunnerSystem):
        def build(self, case, weights, comm):
            raise RuntimeError("no such device")

    with pytest.raises(CouldNotRun, match="no such device"):
        hazards(parse("mixtral"), Broken())
    report = hazards(parse("mixtral@tp2"), resolve("transformers"))
    assert not report.tried
    assert set(report.skipped.values()) == {"transformers runs on one rank"}


def test_equal_calls_that_differ_by_rounding_are_a_note_and_no_hazard():
    class Restless(RunnerSystem):
        def build(self, case, weights, comm):
            layer, calls = super().build(case, weights, comm), []

            def forward(x_MH, **inputs):
                calls.append(len(x_MH))
                return layer(x_MH, **inputs) * (1 + 2**-22 * (len(calls) % 2))

            return forward

    report = hazards(parse("mixtral"), Restless())
    assert not report.broken, told(report)
    assert report.notes == ("two equal calls differ by rounding on rank 0",)


def test_who_writes_into_its_weights_spoils_them_for_nobody_else():
    case = parse(state_faults.FAULTS["folds_into_the_given"].case)
    before = {name: tensor.clone() for name, tensor in problem(case).weights.items()}
    assert hazards(case, resolve(f"{FILE}:folds_into_the_given")).broken
    after = problem(case).weights
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["unwritten_slots", "wants_a_token", "returns_at_once"])
def test_memory_is_poisoned_during_the_calls_that_say_so_and_never_after(name: str):
    hazards(parse(state_faults.FAULTS[name].case), resolve(f"{FILE}:{name}"))
    assert not torch.are_deterministic_algorithms_enabled()
    seen = []

    class Looking(RunnerSystem):
        def build(self, case, weights, comm):
            layer = super().build(case, weights, comm)

            def forward(x_MH, **inputs):
                seen.append(bool(torch.empty(64).isnan().all()))
                return layer(x_MH, **inputs)

            return forward

    case = parse("mixtral")
    hazards(case, Looking())
    wanted = [step.poison for step in script(case, full=False)]
    assert [poisoned for poisoned, asked in zip(seen, wanted, strict=True) if asked] == [True, True]


def test_a_row_that_occurs_twice_is_judged_twice():
    case = parse("mixtral")
    pools = Pools(problem(parse("mixtral@tokens130")), problem(parse("mixtral@tokens7.seed1")))
    steps = [step for step in script(case, full=False) if step.experiment == "a row twice"]
    played = play(case, RUNNER, pools, steps)
    assert not judge(case, RUNNER, pools, played).wrong
    outcome = played.outcomes[0][0]
    outcome.output = outcome.output.clone()
    outcome.output[17] = 0  # the second of row 21
    outcome.output[3] = torch.nan
    wrong = judge(case, RUNNER, pools, played)
    assert wrong.places(0, 0).tolist() == [3, 17]


@pytest.mark.parametrize(
    "options",
    [
        "junk=3",
        "batches=2",
        "placement=replicas",
        "experts=monolithic",
        "shared=fused",
        "reduce=caller",
        "order=2.pad=8",
    ],
)
def test_options_of_the_runner_bring_no_hazard(options: str):
    for grid in ("tp2", "tp4.fp16") if options == "shared=fused" else ("tp2.ep2", "tp4.ep4.fp16"):
        report = hazards(parse(f"deepseek_v3@{grid}+{options}"), RUNNER)
        assert report.tried
        assert not report.broken, told(report)
