"""Speed of the harness on this machine, each figure beside its limit. Nothing here is a test: machines differ.

Checks a second are whole fp32 checks at twin size on one core: oracle, both naive runs, all ranks, comparison. In a matrix
the oracle is computed once for the grids of a model and M, the naive runs for each way in which grids cut the layer; a second
figure computes all of it anew for every check, a third has eight ranks in every check.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.case import Case

MIB = 2**20
_COMMAND = (sys.executable, "-m", "harness")


@dataclass(frozen=True, slots=True)
class Measured:
    """limit: what the project asks of itself, None where it asks nothing.    at_least: the limit is a lower one."""

    name: str
    value: float
    unit: str
    limit: float | None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def bench(*, as_json: bool) -> int:
    """Measure and print every figure; the exit code is 0 whatever they are."""
    for figure in _figures():
        if as_json:
            print(json.dumps(asdict(figure) | {"met": figure.met}), flush=True)
            continue
        limit = (
            ""
            if figure.limit is None
            else f"   {'at least' if figure.at_least else 'at most'} {figure.limit:g} {figure.unit}"
        )
        verdict = {True: "", False: "   MISSED", None: ""}[figure.met]
        print(f"{figure.name:<48}{figure.value:>10.4g} {figure.unit}{limit}{verdict}", flush=True)
    return 0


def _figures() -> Iterator[Measured]:
    yield Measured("--help", _seconds("--help"), "s", 0.2)
    yield Measured("models", _seconds("models"), "s", 0.2)
    yield from _checks()
    yield from _collectives()
    seconds, memory, cases = _watched("check", "--json")
    yield Measured("main job, wall time with imports", seconds, "s", 20.0)
    yield Measured("main job, cases", cases, "cases", None)
    yield Measured("main job, peak memory of all processes", memory / MIB, "MiB", 1024.0)
    with tempfile.TemporaryDirectory() as folder:
        yield from _whole("certify, the whole space", 60.0, "certify", "--output", f"{folder}/certificate.json.gz")
    yield from _whole("faults with the kill matrix", 180.0, "faults", "--json")


def _seconds(*arguments: str) -> float:
    """Median of five runs of a whole command."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([*_COMMAND, *arguments], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - started)
    return sorted(times)[2]


# Eight ranks, as the main job has them: dispatched naively, by all-to-all and by rows of their own.
EIGHT_RANKS = (
    "tp8.ep4", "tp4.ep8.dp2", "tp4.ep8.dp2+kernel=deepep_ht", "tp4.ep8.dp2+kernel=deepep_ll",
    "tp4.ep8.dp2+kernel=nvlink_one_sided", "tp4.ep8.dp2.sp4", "tp4.ep8.dp2.sp4+kernel=deepep_ht",
)  # fmt: skip


def _checks() -> Iterator[Measured]:
    import torch

    from harness import models
    from harness.case import Case, Grid, parse
    from harness.main_job import TOKENS, TP_SIZES

    torch.set_num_threads(1)
    names = models.names()
    on_tp = [Case(model=name, tokens=m, grid=Grid(tp=tp)) for name in names for m in TOKENS for tp in TP_SIZES]
    on_eight = [parse(f"{name}@tokens{m}.{grid}") for name in names for m in TOKENS for grid in EIGHT_RANKS]
    _rate(on_tp, cold=False)  # warms up torch and the interpreter
    yield Measured("checks a second, fp32, one core, as in a matrix", _rate(on_tp, cold=False), "/s", 600.0, True)
    yield Measured("the same, oracle anew for every check", _rate(on_tp, cold=True), "/s", 600.0, True)
    yield Measured("checks a second, fp32, one core, 8 ranks", _rate(on_eight, cold=False), "/s", 250.0, True)
    yield Measured("labelled layers a second, fp32, one core, tp 4", _probes(names), "/s", 1500.0, True)


def _rate(cases: Sequence[Case], *, cold: bool) -> float:
    """Weights and tokens are made beforehand; cold forgets the oracle before each check, else it is kept."""
    from harness import problem
    from harness.check import check
    from harness.finding import Verdict
    from harness.systems import resolve

    runner, spent = resolve("runner"), 0.0
    problem.forget_oracle()
    for case in cases:
        problem.make_inputs(case)
        if cold:
            problem.forget_oracle()
        started = time.perf_counter()
        finding = check(case, runner)
        spent += time.perf_counter() - started
        assert finding.verdict is Verdict.OK, finding
    return len(cases) / spent


def _probes(names: Sequence[str]) -> float:
    """Labelled layers built, run and read; their oracle is made before, as it serves all systems and dtypes."""
    from harness.case import Case, Grid
    from harness.probe import labelled_case, run_probe
    from harness.systems import resolve

    runner, rounds = resolve("runner"), 8
    cases = [labelled_case(Case(model=name, grid=Grid(tp=4))) for name in names]
    for case in cases:
        assert run_probe(case, runner).verdict != "wrong", case
    started = time.perf_counter()
    for _ in range(rounds):
        for case in cases:
            run_probe(case, runner)
    return rounds * len(cases) / (time.perf_counter() - started)


def _collectives() -> Iterator[Measured]:
    import torch

    from harness.case import Grid
    from harness.comm import Communicator
    from harness.comm.simulated import run_ranks

    tensor, repeats = torch.ones(7, 64), 200

    def body(comm: Communicator) -> None:
        for _ in range(repeats):
            comm.all_reduce(tensor)

    for threads, name in ((False, "greenlets"), (True, "threads")):
        for tp in (2, 4, 8):
            run_ranks(Grid(tp=tp), body, threads=threads)
            started = time.perf_counter()
            run_ranks(Grid(tp=tp), body, threads=threads)
            spent = time.perf_counter() - started
            yield Measured(f"all_reduce of 7 x 64, tp {tp}, {name}", spent / repeats * 1e6, "us", None)


def _whole(name: str, limit_s: float, *arguments: str) -> Iterator[Measured]:
    """Wall time and peak memory of a verb that takes minutes."""
    seconds, memory, _ = _watched(*arguments)
    yield Measured(f"{name}, wall time", seconds, "s", limit_s)
    yield Measured(f"{name}, peak memory", memory / MIB, "MiB", 2048.0)


def _watched(*arguments: str) -> tuple[float, int, int]:
    """Seconds, peak bytes and printed lines of a command. Memory is the proportional share of all its processes together."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as findings:
        process = subprocess.Popen([*_COMMAND, *arguments], stdout=findings)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_bytes(process.pid))
            time.sleep(0.05)
        spent = time.perf_counter() - started
        findings.seek(0)
        return spent, peak, findings.read().count(b"\n")


def _tree_bytes(root: int) -> int:
    """Proportional set size of a process and its descendants; 0 where /proc does not tell it."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total
