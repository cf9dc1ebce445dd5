"""The nightly profile: what it draws is legal, reproducible and all of it; what it accuses fails the run."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from harness import models
from harness.case import OPTIONS, Case, parse
from harness.errors import UsageError
from harness.execution import run_system
from harness.finding import Finding, Verdict
from harness.nightly import __main__ as again
from harness.nightly import blocks, nightly
from harness.nightly.draw import Drawn, draw
from harness.nightly.numbers import Numbers
from harness.nightly.numbers import blocks as cut
from harness.nightly.report import UNDECIDED_SHARE, Report
from harness.nightly.tally import Tally
from harness.nightly.varied import VariedRunner
from harness.nightly.ways import ILLEGAL, STEPS, Way, parse_way
from harness.pool import Outcome
from harness.problem import problem
from harness.runner.moe_runner import MoERunner

NAMES = tuple(models.names())
# a case in which the ways of a step show, and what else has to be so for that
SHOWN = {
    "layer": ("mixtral@tp2.bf16.tokens33", "plain"),
    "gate": ("mixtral@bf16.tokens33", "plain"),
    "weights": ("mixtral@bf16.tokens33", "plain"),
    "product": ("mixtral@bf16.tokens33", "plain"),
    "product=pieces": ("mixtral@tokens33", "plain"),
    "bias": ("gpt_oss@bf16.tokens33", "plain"),
    "activation": ("mixtral@bf16.tokens33", "plain"),
    "weigh": ("mixtral@bf16.tokens33", "plain"),
    "sum": ("olmoe@bf16.tokens33", "plain"),
    "slots": ("olmoe@bf16.tokens33", "sum=dtype"),
    "rows": ("olmoe@tokens7", "plain"),
    "combine": ("olmoe@tp4.ep4.bf16.tokens33+kernel=deepep_ht", "plain"),
    "combine=reversed": ("olmoe@tp4.ep4.tokens33+kernel=deepep_ht", "plain"),
    "scale=w2": ("deepseek_v3@bf16.tokens33", "plain"),
    "scale": ("step3p5@bf16.tokens33+scale=output", "plain"),
    "shared": ("deepseek_v3@tp4.bf16.tokens33", "plain"),
    "sigmoid": ("qwen2_moe@bf16.tokens33", "plain"),
    "ranks": ("olmoe@tp8.bf16.tokens33", "plain"),
}


def output(case: Case, way: Way) -> torch.Tensor:
    run = run_system(case, VariedRunner(way), problem(case))
    assert run.broken is None, (str(case), str(way), run.broken)
    return torch.cat([rank.output for rank in run.ranks])


def summary(printed: str) -> dict[str, object]:
    told: dict[str, object] = json.loads(printed.splitlines()[-1])["summary"]
    return {name: value for name, value in told.items() if name not in ("seconds", "workers")}


def test_three_hundred_right_layers_are_judged_in_seconds_and_none_is_accused(capsys: pytest.CaptureFixture[str]):
    started = time.process_time()
    code = nightly(300, seed=3, models=None, jobs=0, as_json=False)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "300 right layers of 26 models" in printed
    assert time.process_time() - started < 10


def test_workers_find_what_one_process_finds(capsys: pytest.CaptureFixture[str]):
    found = []
    for jobs in (0, 2):
        assert nightly(130, seed=4, models=["mixtral", "deepseek_v3"], jobs=jobs, as_json=True) == 0
        found.append(summary(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["cases"] == 130


def test_a_case_is_the_same_whenever_it_is_drawn_and_its_text_is_all_of_it():
    forward = [draw(7, number, NAMES) for number in range(200)]
    assert [draw(7, number, NAMES) for number in reversed(range(200))] == forward[::-1]
    assert [Drawn.parse(str(drawn)) for drawn in forward] == forward
    assert len({str(drawn) for drawn in forward}) > 190
    assert sum(draw(8, number, NAMES) == drawn for number, drawn in enumerate(forward)) < 5


def test_every_model_option_and_way_is_drawn():
    drawn = [draw(0, number, NAMES) for number in range(0, 24_000, 6)]
    met = Counter((name, getattr(each.case, name)) for each in drawn for name in ("model", "dtype", *OPTIONS))
    met += Counter(item for each in drawn for item in each.way.steps().items())
    options = {(name, value) for name, (values, _) in OPTIONS.items() for value in values}
    options -= {("size", "real"), ("backend", "transformers")}  # too large, and not the runner's
    options -= {("calls", "every")}  # "many" is a part of it, and it takes seconds
    expected = options | {(step, value) for step, (values, _) in STEPS.items() for value in values}
    assert expected - met.keys() == set()
    assert {("model", name) for name in NAMES} <= met.keys()
    assert {each.case.tokens for each in drawn} >= {0, 1}
    assert any(each.case.split and 0 in each.case.split and each.case.tokens > 1 for each in drawn)
    assert {each.case.grid.tp for each in drawn} == {1, 2, 3, 4, 8}
    assert any(each.case.grid.sp > 1 for each in drawn)
    assert all(value not in values for each in drawn for step, value in each.way.steps().items()
               for values in [ILLEGAL.get(step, {})])  # fmt: skip


@pytest.mark.parametrize(("step", "value"), [(s, v) for s, (vs, _) in STEPS.items() for v in vs[1:]])
def test_no_way_is_an_empty_name_for_the_runner_s_own(step: str, value: str):
    text, base = SHOWN.get(f"{step}={value}", SHOWN[step])
    case, steps = parse(text), parse_way(base).steps()
    plain, other = output(case, Way(**steps)), output(case, Way(**(steps | {step: value})))
    assert not torch.equal(plain, other)
    torch.testing.assert_close(other, plain, rtol=0.1, atol=0.1)


def test_one_layer_in_three_hundred_is_called_many_times_and_the_others_are_drawn_as_if_it_were_not():
    drawn = [draw(0, number, NAMES) for number in range(4_000)]
    often = [number for number, each in enumerate(drawn) if each.case.calls == "many"]
    assert 5 <= len(often) <= 25
    assert all(drawn[number].case.size != "labels" for number in often)
    assert Drawn.parse(str(drawn[often[0]])) == drawn[often[0]]


@pytest.mark.parametrize("text", ["mixtral@tp2", "deepseek_v3@tp2.ep4.dp2.bf16+kernel=deepep_ht", "jamba@fp16"])
def test_a_layer_that_forgets_nothing_is_accused_once_it_is_called_often(monkeypatch, text: str):
    right = MoERunner.forward

    def forward(self, hidden_states_MH, router_logits_ME, num_tokens=None):
        y_MH = right(self, hidden_states_MH, router_logits_ME, num_tokens)
        self.before_MH, before_MH = y_MH, getattr(self, "before_MH", None)
        return y_MH if before_MH is None or before_MH.shape != y_MH.shape else y_MH + before_MH

    monkeypatch.setattr(MoERunner, "forward", forward)
    case = parse(text)
    assert blocks.judge(Drawn(case, Way())).verdict is Verdict.OK
    finding = blocks.judge(Drawn(replace(case, calls="many"), Way()))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.stage == "calls"


@pytest.mark.parametrize("text", ["mixtral@tp4.bf16", "deepseek_v3@tp4.ep2", "jamba@dp4.fp16"])
def test_a_rank_counted_twice_is_accused(text: str):
    finding = blocks.judge(Drawn(parse(text), Way(ranks="twice")))
    assert finding.verdict is Verdict.MISMATCH


def test_a_fault_among_right_layers_fails_the_run_and_is_told_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    faulty = Drawn.parse("mixtral@tp4.bf16 ranks=twice.activation=wide")
    monkeypatch.setattr(blocks, "draw", lambda seed, n, names: faulty if n == 70 else draw(seed, n, names))
    assert nightly(80, seed=0, models=["mixtral"], jobs=0, as_json=False) == 1
    printed = capsys.readouterr().out
    assert "mismatch: case 70: " in printed
    assert "python -m harness.nightly 'mixtral@tp4.bf16 activation=wide.ranks=twice'" in printed
    assert nightly(80, seed=0, models=["mixtral"], jobs=0, as_json=True) == 1
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["number"], first["layer"], first["verdict"]) == (70, str(faulty), "mismatch")
    assert last["summary"]["accused"] == 1
    assert last["summary"]["exit_code"] == 1
    assert again.main([str(faulty)]) == 1
    assert "mismatch" in capsys.readouterr().out
    assert again.main(["mixtral@tp4.bf16 activation=wide"]) == 0


def test_a_layer_that_raises_is_lost_coverage_and_not_a_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(drawn: Drawn) -> Finding:
        raise KeyError("w13")

    monkeypatch.setattr(blocks, "judge", broken)
    assert nightly(2, seed=0, models=None, jobs=0, as_json=False) == 3
    assert "a defect of the harness" in capsys.readouterr().out


def test_a_lost_worker_and_too_many_undecided_cases_are_told_and_fail():
    report = Report(0, 1, 1)
    report.take(Outcome("runner", str(Numbers(0, 64, 128, ("mixtral",))), "died", "killed by SIGSEGV"))
    assert report.exit_code == 3
    assert "not run: cases 64 to 127 (died: killed by SIGSEGV)" in report.text()
    for undecided, code in ((0, 0), (1, 0), (2, 3)):
        tally, cases = Tally(), round(1 / UNDECIDED_SHARE)
        for number in range(cases):
            verdict = Verdict.UNDECIDED if number < undecided else Verdict.OK
            finding = Finding(case="mixtral", model="mixtral", system="runner", verdict=verdict)
            tally.add(number, "mixtral plain", "fp32", finding)
        assert Report(0, 1, 1, tally=tally).exit_code == code


def test_closest_calls_leave_out_rows_that_took_another_legal_route():
    tally = Tally()
    for number, figures in enumerate([{"row_error_over_naive": 1.5}, {"row_error_over_naive": 1.5},
                                      {"row_error_over_naive": 900.0, "rows_on_another_legal_route": 1}]):  # fmt: skip
        finding = Finding(case="m", model="m", system="runner", verdict=Verdict.OK, figures=dict(figures))
        tally.add(number, f"case {number}", "bf16", finding)
    assert (tally.ratio["bf16"].figure, tally.ratio["bf16"].text) == (1.5, "case 0")
    assert tally.rerouted["bf16"] == 1


def test_blocks_hold_every_number_once():
    numbers = [n for each in cut(0, 200, NAMES) for n in range(each.first, each.stop)]
    assert numbers == list(range(200))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ranks=spiral", "ranks= one of in_order, reversed"),
        ("rank=ring", "STEP=VALUE with layer, gate"),
        ("ranks=ring.ranks=tree", "given twice"),
        ("ring", "STEP=VALUE"),
    ],
)
def test_a_way_that_nobody_knows_is_refused_with_those_that_are_known(text: str, told: str):
    with pytest.raises(UsageError, match=told):
        parse_way(text)


@pytest.mark.parametrize(("count", "seed", "told"), [(0, 0, "no layer would be judged"), (1, -1, "expected 0 to")])
def test_requests_that_could_judge_nothing_are_refused(count: int, seed: int, told: str):
    with pytest.raises(UsageError, match=told):
        nightly(count, seed=seed, models=None, jobs=0, as_json=False)
