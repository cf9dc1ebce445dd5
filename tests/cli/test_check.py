"""`moe-harness check` as it is typed: the table, the JSON lines and the exit code of each outcome."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Command

KEYS = {"case", "model", "system", "verdict", "stage", "family", "diagnosis", "figures", "repro"}

LAYERS = '''
import os
import torch
from torch.nn.functional import silu


def good(spec, weights, comm):
    """Mixtral: each rank computes its share of the intermediate width."""
    width = spec.experts.intermediate_size // comm.tp.size
    mine = slice(comm.tp.rank * width, (comm.tp.rank + 1) * width)

    def forward(hidden_states):
        x = hidden_states.float()
        top, ids = torch.softmax(x @ weights["router_weight"].float().T, -1).topk(spec.routing.top_k)
        top = top / top.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e in range(spec.routing.num_experts):
            gate, up = weights["w13"][e].float().chunk(2)
            part = silu(x @ gate[mine].T) * (x @ up[mine].T) @ weights["w2"][e].float()[:, mine].T
            y += part * (top * (ids == e)).sum(-1, keepdim=True)
        return comm.all_reduce(y).to(hidden_states.dtype)

    return forward


def chatty(spec, weights, comm):
    print("a layer may print")
    return good(spec, weights, comm)


def wrong(spec, weights, comm):
    forward = good(spec, weights, comm)
    return lambda hidden_states: comm.all_reduce(forward(hidden_states))


def dying(spec, weights, comm):
    return lambda hidden_states: os._exit(7)


def unbuildable(spec, weights, comm):
    raise ValueError("no such kernel")
'''


@pytest.fixture
def layers(tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_text(LAYERS)
    (tmp_path / "broken.py").write_text("import no_such_package\n\ndef build(spec, weights, comm): ...\n")


def findings(stdout: str) -> Iterator[dict]:
    """Each line of stdout has to be the JSON of one finding."""
    for line in stdout.splitlines():
        finding = json.loads(line)
        assert finding.keys() >= KEYS
        yield finding


@pytest.mark.usefixtures("layers")
def test_json_has_one_finding_a_line_and_its_repro_command_shows_it_again(command: Command):
    systems = "layers.py:chatty,layers.py:wrong,layers.py:dying"
    done = command("check", "mixtral@tp2", "mixtral@tp2.bf16.tokens0", "--system", systems, "--json", "--jobs", "1")
    found = {(each["system"], each["case"]): each for each in findings(done.stdout)}
    assert {key: each["verdict"] for key, each in found.items()} == {
        ("layers.py:chatty", "mixtral@tp2"): "ok",
        ("layers.py:chatty", "mixtral@tp2.bf16.tokens0"): "ok",
        ("layers.py:wrong", "mixtral@tp2"): "mismatch",
        ("layers.py:wrong", "mixtral@tp2.bf16.tokens0"): "mismatch",  # the probe brings tokens of its own
        ("layers.py:dying", "mixtral@tp2"): "mismatch",
        ("layers.py:dying", "mixtral@tp2.bf16.tokens0"): "mismatch",
    }
    assert len(done.stdout.splitlines()) == 6
    assert done.returncode == 1
    assert "a layer may print" in done.stderr
    wrong = found["layers.py:wrong", "mixtral@tp2"]
    assert (wrong["model"], wrong["stage"]) == ("mixtral", "output")
    assert "tp*R instead of R (tp=2)" in wrong["diagnosis"]
    assert wrong["figures"]["row_error_over_naive"] > wrong["figures"]["limit"]

    program, *arguments = shlex.split(wrong["repro"])
    assert program == "moe-harness"
    again = command(*arguments, "--json", "--jobs", "0")
    assert list(findings(again.stdout)) == [wrong]
    assert again.returncode == 1


@pytest.mark.usefixtures("layers")
def test_the_table_counts_each_verdict_and_a_mismatch_beats_what_could_not_run(command: Command):
    systems = ("--system", "layers.py:good", "--system", "layers.py:wrong,layers.py:unbuildable")
    done = command("check", "mixtral", "mixtral@tp2.fp16", *systems, "--jobs", "1")
    assert done.returncode == 1
    assert done.stderr == ""
    header, sizes, row, legend, *lines = done.stdout.splitlines()
    assert header.split() == ["layers.py:good", "layers.py:unbuildable", "layers.py:wrong"]
    assert sizes.split() == ["model", "listed", *["tp1", "tp2"] * 3]
    assert row.split() == ["mixtral", "PR", "#35949", "1", "1", "0", "1?", "0", "1?", "1", "0", "1✗"]
    assert legend == "cells: cases that agree with the oracle, ✗ mismatch, ? could-not-run; - not applicable"
    assert lines[0].startswith("mismatch layers.py:wrong mixtral@tp2.fp16: at output: ")
    assert lines[1].split() == shlex.split("again: moe-harness check \"'mixtral@tp2.fp16'\" --system layers.py:wrong")
    assert lines[2].startswith("could-not-run layers.py:unbuildable mixtral")
    assert "ValueError: no such kernel" in lines[2]
    assert "layers.py:" in lines[2]
    assert lines[-1].startswith("6 cases, 6 findings: 3 ok, 1 mismatch, 2 could-not-run")


@pytest.mark.usefixtures("layers")
def test_layers_that_cannot_be_imported_or_built_are_lost_coverage(command: Command):
    systems = "broken.py:build,layers.py:unbuildable"
    done = command("check", "mixtral", "--system", systems, "--json", "--jobs", "1")
    imported, built = findings(done.stdout)
    assert {each["verdict"] for each in (imported, built)} == {"could-not-run"}
    assert "ModuleNotFoundError: No module named 'no_such_package'" in imported["diagnosis"]
    assert "broken.py:1" in imported["diagnosis"]
    assert "ValueError: no such kernel" in built["diagnosis"]
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 3


def test_known_faults_and_layers_that_a_system_lacks_leave_the_exit_code_at_zero(command: Command):
    systems = ("--system", "runner,legacy,transformers", "--json", "--jobs", "1")
    done = command("check", "dots1@tp2", "mixtral@tp2", *systems)
    found = list(findings(done.stdout))
    verdicts = {(each["system"], each["case"]): each["verdict"] for each in found}
    assert verdicts == {
        ("runner", "dots1@tp2"): "ok",
        ("runner", "mixtral@tp2"): "ok",
        ("legacy", "dots1@tp2"): "known",
        ("legacy", "mixtral@tp2"): "ok",
        ("transformers", "dots1@tp2"): "not-applicable",
        ("transformers", "mixtral@tp2"): "not-applicable",
    }
    assert all(each["diagnosis"] for each in found if each["verdict"] != "ok")
    assert done.returncode == 0


@pytest.mark.usefixtures("layers")
def test_a_grid_with_unequal_shares_is_a_case_like_any_other_and_its_repro_shows_it_again(command: Command):
    systems = ("--system", "runner,transformers,layers.py:good,layers.py:wrong", "--json", "--jobs", "1")
    grid, empty = "mixtral@tp2.ep4.dp2.bf16.tokens3_0", "mixtral@tp2.ep2.sp2.tokens0"
    done = command("check", "mixtral@sp1.tokens3_0.dp2.bf16.ep4.tp2", empty, *systems)
    found = {(each["system"], each["case"]): each for each in findings(done.stdout)}
    assert {key: each["verdict"] for key, each in found.items()} == {
        ("runner", grid): "ok",
        ("runner", empty): "ok",
        ("transformers", grid): "not-applicable",
        ("transformers", empty): "not-applicable",
        ("layers.py:good", grid): "ok",  # it reduces over tp and knows no other group
        ("layers.py:good", empty): "ok",
        ("layers.py:wrong", grid): "mismatch",
        ("layers.py:wrong", empty): "mismatch",  # the probe brings tokens of its own
    }
    assert done.returncode == 1
    wrong = found["layers.py:wrong", grid]
    assert "tp*R" in wrong["diagnosis"]
    program, *arguments = shlex.split(wrong["repro"])
    assert program == "moe-harness"
    assert list(findings(command(*arguments, "--json", "--jobs", "0").stdout)) == [wrong]


@pytest.mark.usefixtures("layers")
def test_one_cause_is_one_line_whatever_dtype_and_grid_show_it(command: Command):
    done = command("check", "--system", "layers.py:wrong", "--model", "mixtral", "--tp", "2,4", "--jobs", "2")
    mismatches = [line for line in done.stdout.splitlines() if line.startswith("mismatch")]
    assert len(mismatches) == 1, mismatches
    assert "(one of 26 cases)" in mismatches[0]
    assert "y = tp*R instead of R (tp=4)" in mismatches[0], "tp=2 leaves room for a factor of 2"


def test_a_part_of_the_main_job_is_selected_by_options_and_shown_as_a_table(command: Command):
    selected = ("--model", "dots1,olmoe", "--tp", "1,2", "--dtype", "fp32,bf16", "--tokens", "0,7")
    done = command("check", *selected, "--system", "legacy,transformers", "--jobs", "2")
    header, sizes, olmoe, dots1, *lines = done.stdout.splitlines()
    assert header.split() == ["legacy", "transformers"]
    assert sizes.split() == ["model", "listed", "tp1", "tp2", "tp1"]
    assert dots1.split() == ["dots1", "rewritten", "2", "2k", "2", "2k", "4"]
    assert olmoe.split() == ["olmoe", "PR", "#35949", "4", "4", "4"]
    assert any(line.startswith("known legacy dots1") and "(one of 4 cases)" in line for line in lines)
    assert lines[-1].startswith("24 cases, 24 findings: 20 ok, 0 mismatch, 4 known; ")
    assert done.returncode == 0
