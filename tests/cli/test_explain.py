"""`moe-harness explain CASE`: one case in full, with the exit code that check gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Command

WRONG = """
from harness.systems.runner import RunnerSystem
from harness.case import Case, Grid

def build(spec, weights, comm):
    layer = RunnerSystem().build(Case(model="deepseek_v3", grid=Grid(tp=comm.tp.size)), weights, comm)
    return lambda hidden_states: 2.4375 * layer(hidden_states)

def unbuildable(spec, weights, comm):
    raise ValueError("no such kernel")
"""


@pytest.fixture
def explained(command: Command, tmp_path: Path, request: pytest.FixtureRequest):
    (tmp_path / "layers.py").write_text(WRONG)
    return command("explain", *request.param)


@pytest.mark.parametrize("explained", [["deepseek_v3@tp2"]], indirect=True)
def test_a_right_layer_is_explained_from_its_plan_to_its_collectives(explained):
    lines = explained.stdout.splitlines()
    assert (explained.returncode, explained.stderr) == (0, "")
    assert lines[0] == "deepseek_v3@tp2 on runner: ok"
    for start in (
        "layer: hidden 64",
        "grid: tp=2",
        "plan of this call:",
        "oracle, token by token",
        "errors: ",
        "attribution",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert "  ranks 0, 1: y = s*R + S" in lines
    assert sum("all_reduce fp32[7, 64]" in line for line in lines) == 1


@pytest.mark.parametrize("explained", [["deepseek_v3@tp2", "--system", "layers.py:build"]], indirect=True)
def test_a_wrong_layer_is_explained_with_its_coefficients_and_exit_code_one(explained):
    assert explained.returncode == 1
    assert explained.stdout.startswith("deepseek_v3@tp2 on layers.py:build: mismatch\n")
    assert "y = s^2*R + s*S" in explained.stdout


@pytest.mark.parametrize("explained", [["mixtral", "--system", "layers.py:unbuildable"]], indirect=True)
def test_a_layer_that_cannot_be_built_is_told_with_its_line_and_exit_code_three(explained):
    assert explained.returncode == 3
    assert explained.stdout == ""
    assert "ValueError: no such kernel" in explained.stderr
    assert "Traceback" not in explained.stderr
