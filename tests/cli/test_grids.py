"""Grids as they are typed and shown: --grid, splits of tokens, the table's columns, JSON, and explain for many ranks."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from conftest import Command
from harness.campaign import Report
from harness.finding import Finding, Verdict
from harness.report import table

LAYERS = """
from harness.case import Case, Grid
from harness.systems.runner import RunnerSystem

def sound(spec, weights, comm):
    grid = Grid(tp=comm.tp.size, dp=comm.dp.size, ep=comm.ep.size)
    return RunnerSystem().build(Case(model="mixtral", grid=grid), weights, comm)

def wrong_over_dp(spec, weights, comm):
    layer = sound(spec, weights, comm)
    return lambda hidden_states: (2 if comm.dp.size > 1 else 1) * layer(hidden_states)

def out_of_step(spec, weights, comm):
    def forward(hidden_states):
        comm.tp.all_reduce(hidden_states)
        return comm.dp.all_gather(hidden_states) if comm.rank == 3 else comm.tp.all_reduce(hidden_states)
    return forward
"""
ONE = ("--model", "mixtral", "--dtype", "fp32", "--jobs", "1")


@pytest.fixture
def layers(tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_text(LAYERS)


def test_named_grids_have_a_column_each(command: Command):
    done = command("check", *ONE, "--system", "runner", "--grid", "tp2.ep4.dp2,tp4.ep2,tp2,dp2", "--tokens", "7,3_4")
    _, columns, row, *_ = done.stdout.splitlines()
    assert columns.split() == ["model", "listed", "tp2", "dp2", "tp2.ep4.dp2", "tp4.ep2"]
    assert row.split()[-4:] == ["1", "2", "2", "1"]  # shares for two ranks fit two of the grids
    assert done.returncode == 0


GRIDS = "tp2,tp3,tp2.ep2,tp4.ep2,tp4.ep4,dp2,tp2.dp2,tp2.ep4.dp2,ep3.dp3"


@pytest.mark.usefixtures("layers")
def test_many_grids_share_columns_by_what_they_have_beside_tp_and_a_mismatch_stays_in_sight(command: Command):
    systems = "layers.py:sound,layers.py:wrong_over_dp"
    done = command("check", *ONE, "--system", systems, "--grid", GRIDS, "--tokens", "5")
    header, columns, row, legend, *_ = done.stdout.splitlines()
    assert header.split() == ["layers.py:sound", "layers.py:wrong_over_dp"]
    assert columns.split() == ["model", "listed", "tp2", "tp3", "+ep", "+dp", "tp", "+ep", "+dp"]
    assert row.split()[3:] == ["2", "2", "6", "8", "4", "6", "0", "8✗"]  # one call, and many
    assert legend.endswith("+ep, +dp, +sp: grids by what they have beside tp")
    assert done.returncode == 1


def test_no_cell_is_cut_short_on_a_narrow_terminal():
    """A cell that ends in dots may hide a mismatch: lines get longer than the terminal instead."""
    found = tuple(
        Finding(case=f"mixtral@{grid}", model="mixtral", system=system, verdict=Verdict.MISMATCH)
        for grid in GRIDS.split(",")
        for system in ("runner", "legacy", "transformers")
    )
    console = Console(width=40, record=True, file=StringIO(), force_terminal=True)
    table.show(Report(found, 0.0), console)
    row = next(line for line in console.export_text().splitlines() if line.startswith("mixtral"))
    assert sum(map(int, re.findall(r"([0-9]+)✗", row))) == len(found)


def test_json_tells_the_grid_in_numbers(command: Command):
    done = command("check", "mixtral@tp2.ep4.dp2", "mixtral", "--system", "runner", "--json", "--jobs", "0")
    grids = {line["case"]: line["grid"] for line in map(json.loads, done.stdout.splitlines())}
    assert grids == {
        "mixtral@tp2.ep4.dp2": {"tp": 2, "ep": 4, "dp": 2, "sp": 1},
        "mixtral": {"tp": 1, "ep": 1, "dp": 1, "sp": 1},
    }


REFUSED = {
    "check --grid tp2 --ep 2": ("--grid names whole grids and --ep combines sizes", "as in --grid tp2.ep4.dp2"),
    "check --grid tp2.x": ("grid 'tp2.x': cannot read 'x'", "as in tp2.ep4.dp2.sp1"),
    "check --grid tp2.tp4": ("grid 'tp2.tp4': tp is given twice",),
    "check --grid tp2.ep3": ("grid 'tp2.ep3': ep=3: expected a divisor of tp*dp=2", "Type one of ep 1, 2"),
    "check --grid ,": ("',' names nothing",),
    "check mixtral --grid tp2": ("name cases or select them",),
    "check --model mixtral --tokens 3_x": ("--tokens 3_x: expected whole numbers", "3_0_4, one for each data-parallel rank"),
    "check --model mixtral --dp 3 --tokens 3_4": ("tokens3_4: expected one number for each of the dp=3", "Type tokens7_7_7"),
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_a_wrong_grid_or_split_is_answered_with_what_to_type(line: str, command: Command):
    done = command(*line.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    for part in REFUSED[line]:
        assert part in done.stderr


def test_a_case_of_eight_ranks_is_explained_group_by_group(command: Command):
    lines = command("explain", "deepseek_v3@tp4.ep8.dp2.tokens3_5+kernel=deepep_ht").stdout.splitlines()
    for line in (
        "grid: tp=4, ep=8, dp=2, sp=1, moe.tp=1; 8 ranks; dtype fp32",
        "  tp groups: [0 to 3] [4 to 7]",
        "  dp groups: [0, 4] [1, 5] [2, 6] [3, 7]",
        "  tokens: ranks 0 to 3: 0 to 2; ranks 4 to 7: 3 to 7",
        "  announced by its kernel: all_to_all_single over ep (4 times)",
        "  rank 7: 14, 15",
        "  ranks 0 to 7: y = s*R + S",
        "collectives in order (the same on all ranks):",
        "  4: all_reduce fp32[M, 64] over tp [0 to 3] [4 to 7]; M = 3 on ranks 0 to 3; 5 on ranks 4 to 7",
    ):
        assert line in lines


def test_a_grid_between_both_ends_shows_who_cuts_an_expert_and_who_holds_which(command: Command):
    lines = command("explain", "mixtral@tp4.ep2+placement=moved").stdout.splitlines()
    assert "  each expert is cut over the ranks of one of [0, 1] [2, 3]" in lines
    assert "  ep groups: [0, 2] [1, 3]" in lines
    placement = lines[lines.index("placement of the experts:") + 1 :][:2]
    held = [line.partition(": ")[2].split(", ") for line in placement]
    assert [line.partition(":")[0] for line in placement] == ["  ranks 0, 1", "  ranks 2, 3"]
    assert len(held[0]) == len(held[1]) == 5  # eight experts and two of them once more
    assert set(held[0] + held[1]) == set("01234567")


def test_rows_of_its_own_are_told_for_each_rank(command: Command):
    lines = command("explain", "mixtral@tp2.ep4.dp2.sp2.tokens3_0").stdout.splitlines()
    assert "  tokens: ranks 0, 1: 0 to 2, of which each takes 2 rows; ranks 2, 3: none" in lines
    assert "  ranks 2, 3: no tokens of its own" in lines


@pytest.mark.usefixtures("layers")
def test_ranks_out_of_step_are_told_apart_with_what_they_called_until_then(command: Command):
    done = command("explain", "mixtral@tp2.dp2", "--system", "layers.py:out_of_step")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[1].startswith("  collective ")
    start = next(number for number, line in enumerate(lines) if line.startswith("collectives until then in order"))
    assert any(line.startswith("  0: all_reduce") or line.startswith("    0: all_reduce") for line in lines[start:])
