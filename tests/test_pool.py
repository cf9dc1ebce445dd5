"""Supervised workers: whatever a layer does to its process, every case ends in exactly one outcome."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import pool
from harness.errors import HarnessError
from harness.finding import Finding
from harness.pool import Batch, Outcome, innermost_line, run_all

# A case is a Python statement; its outcome is what it leaves in `said`. No torch, so that a worker starts at once.
STUB = """
import contextlib, os, signal, subprocess, sys, threading, time

def prepare(system):
    if system != "plain":
        exec(system)
    def run(case):
        names = {"said": None}
        exec(compile(case, "layer.py", "exec"), globals() | names, names)
        return names["said"]
    return run
"""


@pytest.fixture(autouse=True)
def _stub(tmp_path, monkeypatch):
    (tmp_path / "pool_stub.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)


def run(*batches, jobs=1, limit_s=20.0, system="plain") -> list[Outcome]:
    outcomes: list[Outcome] = []
    run_all([Batch(system, tuple(cases), "pool_stub:prepare") for cases in batches], jobs, limit_s, outcomes.append)
    return outcomes


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether the process is dead, or dead but for its parent's notice, before the time is over."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


# ---- every case, once


@pytest.mark.parametrize("jobs", [0, 1, 2, 5])
def test_every_case_of_every_batch_has_one_outcome(jobs):
    batches = [[f"said = {b, c}" for c in range(size)] for b, size in enumerate([3, 0, 1, 7, 2])]
    outcomes = run(*batches, jobs=jobs)
    assert sorted(outcome.payload for outcome in outcomes) == [
        (b, c) for b, cs in enumerate(batches) for c in range(len(cs))
    ]
    assert {(outcome.system, outcome.kind) for outcome in outcomes} == {("plain", "finding")}
    assert all(outcome.case == f"said = {outcome.payload}" for outcome in outcomes)


def test_nothing_to_run_is_no_error():
    assert run(jobs=2) == []
    assert run([], [], jobs=2) == []


def test_a_lost_outcome_is_an_error_not_a_pass(monkeypatch):
    monkeypatch.setattr(pool, "_supervise", lambda batches, jobs, limit_s, deliver: None)
    with pytest.raises(HarnessError, match="2 cases were asked for and 0 outcomes came back"):
        run(["said = 1", "said = 2"])


def test_batches_go_to_whichever_worker_is_free():
    slow = ["time.sleep(0.6); said = os.getpid()"]
    quick = ["said = os.getpid()"]
    outcomes = run(slow, *[quick] * 6, jobs=2)
    assert len({outcome.payload for outcome in outcomes}) == 2
    assert outcomes[-1].case == slow[0]  # all quick batches went round the slow one
    assert len({outcome.payload for outcome in outcomes[:-1]}) == 1


def test_batches_that_share_what_they_compute_go_to_one_worker():
    outcomes: list[Outcome] = []
    of = [("a", "first of a"), ("a", "second of a"), ("b", "first of b"), ("b", "second of b")]
    batches = [
        Batch("plain", (f"time.sleep(0.3); said = {told!r}, os.getpid()",), "pool_stub:prepare", shares)
        for shares, told in of
    ]
    run_all(batches, 2, 20.0, outcomes.append)
    pids = dict(outcome.payload for outcome in outcomes)
    assert pids["first of a"] == pids["second of a"]
    assert pids["first of a"] != pids["first of b"], (
        "nobody takes a batch that shares with a busy worker while others wait"
    )


def test_a_worker_is_started_once_for_many_batches():
    assert len({outcome.payload for outcome in run(*[["said = os.getpid()"]] * 20, jobs=1)}) == 1


def test_supervising_costs_less_than_a_tenth_of_a_millisecond_a_case():
    batches = [["said = 1"] * 1000] * 2
    run(["said = 1"])
    started = time.perf_counter()
    run(*batches, jobs=1)
    long = time.perf_counter() - started
    assert long < 2000 * 1e-4 + 1.0  # and a generous start


def test_the_parent_never_imports_torch(tmp_path):
    code = (
        "import sys; from harness.pool import Batch, run_all; got = []\n"
        "run_all([Batch('plain', ('said = 1',), 'pool_stub:prepare')], 1, 9.0, got.append)\n"
        "assert got[0].payload == 1, got; assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_workers_compute_on_one_thread():
    assert run(["said = os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS']"])[0].payload == ("1", "1")


def test_the_default_checks_a_case_against_a_system(tmp_path):
    (tmp_path / "layer.py").write_text("import sys\ndef build(spec, weights, comm):\n    sys.exit(5)\n")
    target = f"{tmp_path}/layer.py:build"
    outcomes: list[Outcome] = []
    run_all([Batch(target, ("mixtral", "mixtral@tp2"))], 1, 60.0, outcomes.append)
    assert [outcome.kind for outcome in outcomes] == ["finding"] * 2
    assert [type(outcome.payload) for outcome in outcomes] == [Finding] * 2
    assert all("SystemExit: 5" in outcome.payload.diagnosis for outcome in outcomes)


# ---- deaths

DEATHS = {
    "os._exit(3)": "exited with code 3",
    "os.abort()": "killed by SIGABRT, at layer.py:1 in <module>",
    "os.kill(os.getpid(), signal.SIGKILL)": "killed by SIGKILL (out of memory?)",
    "import ctypes; ctypes.string_at(0)": "killed by SIGSEGV, at ",
    "raise KeyboardInterrupt": "killed by SIGINT",
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_death_is_told_and_the_other_cases_go_on(death):
    outcomes = run(["said = 1", death, "said = 2"], ["said = 3"])
    assert [(o.case, o.kind) for o in outcomes] == [
        ("said = 1", "finding"), (death, "died"), ("said = 2", "finding"), ("said = 3", "finding"),
    ]  # fmt: skip
    assert outcomes[1].payload.startswith(DEATHS[death])
    assert [o.payload for o in outcomes if o.kind == "finding"] == [1, 2, 3]


def test_what_a_worker_printed_last_is_told_with_its_death(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    outcome, *_ = run(["print('x' * 9000); print('to stdout'); print('to stderr', file=sys.stderr); os._exit(1)"])
    assert outcome.payload.startswith("exited with code 1\nIts output ended:\nxxx")
    assert outcome.payload.endswith("x\nto stdout\nto stderr")
    assert len(outcome.payload) < pool.TAIL + 100


def test_an_exit_and_a_raise_inside_a_case_need_no_new_worker():
    pid, *ends, same = run(["said = os.getpid()", "sys.exit(3)", "1 / 0", "said = lambda: 0", "said = os.getpid()"])
    assert pid.payload == same.payload
    assert [end.kind for end in ends] == ["raised"] * 3
    assert [end.payload.splitlines()[-1].partition(":")[0] for end in ends[:2]] == ["SystemExit", "ZeroDivisionError"]
    assert "pickle" in ends[2].payload


def test_after_two_losses_the_rest_of_the_batch_is_not_run():
    outcomes = run(["os._exit(1)", "said = 1", "os._exit(2)", "said = 2", "said = 3"], ["said = 4"])
    assert [o.kind for o in outcomes] == ["died", "finding", "died", "not_run", "not_run", "finding"]
    assert outcomes[3].payload == (
        "2 cases before it killed or hung their process, the last one os._exit(2): exited with code 2"
    )


def test_a_worker_that_dies_between_batches_takes_no_case_with_it():
    outcomes = []

    def slowly(outcome):
        outcomes.append(outcome)
        time.sleep(0.5 if len(outcomes) == 1 else 0.0)

    dies_later = Batch("plain", ("threading.Timer(0.1, os._exit, [9]).start(); said = 1",), "pool_stub:prepare")
    run_all([dies_later, Batch("plain", ("said = 2",), "pool_stub:prepare")], 1, 9.0, slowly)
    assert [(o.kind, o.payload) for o in outcomes] == [("finding", 1), ("finding", 2)]


def test_a_death_while_the_system_is_imported_says_so():
    outcomes = run(["said = 1", "said = 2", "said = 3"], system="os._exit(4)")
    assert [o.kind for o in outcomes] == ["died", "died", "not_run"]
    assert outcomes[0].payload == "exited with code 4 while the system was imported"


def test_a_raise_while_the_system_is_imported_is_told_for_each_case():
    outcomes = run(["said = 1", "said = 2"], system="1 / 0")
    assert [o.kind for o in outcomes] == ["raised", "raised"]
    assert all(o.payload.splitlines()[-1] == "ZeroDivisionError: division by zero" for o in outcomes)


# ---- hangs

HANGS = {
    "while True: pass": "layer.py:1 in <module>",
    "\n\ntime.sleep(99)": "layer.py:3 in <module>",
    "threading.Thread(target=exec, args=['while True: pass']).start(); threading.Event().wait()": "<string>:1 in <module>",
    "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT}); time.sleep(99)": "layer.py:1 in <module>",
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_case_past_its_limit_hung_at_its_line(hang):
    started = time.monotonic()
    before, hung, after = run(["said = os.getpid()", hang, "said = os.getpid()"], limit_s=1.0)
    assert time.monotonic() - started < 8
    assert (hung.kind, hung.payload) == ("hung", f"no result after 1 s, at {HANGS[hang]}")
    assert (before.kind, after.kind) == ("finding", "finding")
    assert before.payload != after.payload
    assert gone(before.payload)


def test_the_clock_starts_anew_with_each_case_and_not_while_importing():
    outcomes = run(["time.sleep(0.3); said = 1"] * 4, limit_s=0.8, system="time.sleep(1.2)")
    assert [o.kind for o in outcomes] == ["finding"] * 4


def test_an_import_past_its_own_limit_hung(monkeypatch):
    monkeypatch.setattr(pool, "PREPARE_LIMIT_S", 0.5)
    outcomes = run(["said = 1"], system="time.sleep(99)")
    assert outcomes[0].kind == "hung"
    assert outcomes[0].payload.startswith(
        "no result after 0.5 s while the system was imported, at <string>:1 in <module>"
    )


def test_children_of_a_lost_worker_are_killed_with_it(tmp_path):
    note = tmp_path / "pid"
    child = f"child = subprocess.Popen(['sleep', '99']); open({str(note)!r}, 'w').write(str(child.pid)); "
    for end in ("os._exit(1)", "time.sleep(99)"):
        outcome, *_ = run([child + end], limit_s=1.0)
        assert outcome.kind in ("died", "hung")
        assert gone(int(note.read_text()))


def test_a_fork_that_holds_the_pipe_does_not_hide_a_death(tmp_path):
    note = tmp_path / "pid"
    fork = f"open({str(note)!r}, 'w').write(str(os.fork() or os.getpid())); "
    outcome, after = run([fork + "time.sleep(99) if os.getpid() != os.getsid(0) else os._exit(7)", "said = 1"])
    assert (outcome.kind, outcome.payload) == ("died", "exited with code 7")
    assert after.payload == 1


# ---- output and the end of the parent


@pytest.mark.parametrize("jobs", [0, 1])
def test_prints_of_a_layer_go_to_stderr_and_never_to_stdout(jobs, capfd):
    printing = "print('from python'); said = 1" + ("; os.write(1, b'from below\\n')" if jobs else "")
    assert [o.payload for o in run([printing], jobs=jobs, system="print('from its import')")] == [1]
    out, err = capfd.readouterr()
    assert out == ""
    assert "from its import" in err
    assert "from python" in err
    assert jobs == 0 or "from below" in err


def test_a_layer_that_prints_without_end_blocks_nobody(capfd):
    outcomes = run(["print('x' * 2_000_000); said = 1", "said = 2"])
    assert [o.payload for o in outcomes] == [1, 2]
    assert capfd.readouterr().err.count("x") >= 2_000_000


def test_a_worker_reads_nothing_from_the_terminal():
    code = (
        "from harness.pool import Batch, run_all\n"
        "batch = Batch('plain', ('said = sys.stdin.read()',), 'pool_stub:prepare')\n"
        "run_all([batch], 1, 9.0, lambda outcome: print(repr(outcome.payload)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], input="typed", capture_output=True, text=True, env=environment)
    assert done.stdout == "''\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_parent_kills_all_workers(error):
    pids = []

    def fail(outcome):
        pids.append(outcome.payload)
        if len(pids) == 2:
            raise error

    batch = Batch("plain", ("said = os.getpid()", "time.sleep(99)"), "pool_stub:prepare")
    with pytest.raises(error):
        run_all([batch, batch], 2, 60.0, fail)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # reaped, too


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=str)
def test_workers_end_with_their_parent_even_in_an_endless_loop(ending, tmp_path):
    script = (
        "from harness.pool import Batch, run_all\n"
        "batch = Batch('plain', ('said = os.getpid()', 'while True: pass'), 'pool_stub:prepare')\n"
        "run_all([batch, batch], 2, 99.0, lambda outcome: print(outcome.payload, flush=True))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(ending)
        assert parent.wait(timeout=5) != 0
    assert all(gone(pid) for pid in pids)


def test_the_line_of_a_hang_is_that_of_the_rank_that_does_not_wait():
    stacks = (
        'Thread 0x1 (most recent call first):\n  File "/x/harness/comm/simulated.py", line 1 in switch\n  File "/me.py", line 2 in f\n\n'
        'Thread 0x2 (most recent call first):\n  File "/me/layer.py", line 14 in forward\n  File "/x/harness/execution.py", line 3 in f\n\n'
        'Current thread 0x3 (most recent call first):\n  File "/usr/lib/threading.py", line 5 in wait\n'
    )
    assert innermost_line(stacks) == "/me/layer.py:14 in forward"
    assert innermost_line("") is None
