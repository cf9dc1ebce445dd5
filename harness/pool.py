"""Supervised worker processes: every case ends in exactly one outcome, whatever a layer does to its process.

The parent never imports torch. A worker takes one batch after the other and reports each case as it ends, which also
starts the clock of the next. One that dies or hangs is killed with all its children and replaced; the case it was in
gets the blame.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO, Any, Literal

from harness.errors import HarnessError

PREPARE_LIMIT_S = 120.0  # for a worker to start, import torch and import the system
DEATHS_A_BATCH = 2
TAIL = 2000  # characters of a dead worker's output that its outcome keeps
_TICK_S = 0.25  # how soon a death is seen if a child of the worker holds its pipe open

Kind = Literal["finding", "died", "hung", "not_run", "raised"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Cases, as text, that one worker runs in order.

    prepare: "module:function", called in the worker with the system's name; returns what is called with each case.
    shares: what its cases compute in common with other batches, a model's name: one worker should have them all.
    """

    system: str
    cases: tuple[str, ...]
    prepare: str = "harness.pool:checker"
    shares: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case ended. payload: the Finding, or text: how the worker died or hung, why it did not run, a traceback."""

    system: str
    case: str
    kind: Kind
    payload: Any


def checker(system_name: str) -> Callable[[str], object]:
    """The system resolved and imported, and the check of one case text against it."""
    import torch

    from harness.case import parse
    from harness.check import check
    from harness.errors import CouldNotRun
    from harness.systems import resolve

    torch.set_num_threads(1)
    system = resolve(system_name)
    with contextlib.suppress(CouldNotRun):  # each case will say so
        getattr(system, "load", lambda: None)()
    return lambda text: check(parse(text), system)


def run_all(batches: Sequence[Batch], jobs: int, limit_s: float, on_result: Callable[[Outcome], object]) -> None:
    """Run every case of every batch on `jobs` workers and hand each outcome to on_result as it comes.

    limit_s: seconds for one case. After two deaths or hangs within a batch, the rest of it is not run. What layers
    print goes to stderr. jobs=0 runs in this process, for a debugger: no limit, no protection.
    Raises HarnessError if outcomes and cases differ in number, which would be a defect of ours.
    """
    delivered = 0

    def deliver(outcome: Outcome) -> None:
        nonlocal delivered
        delivered += 1
        on_result(outcome)

    if jobs == 0:
        _run_here(batches, deliver)
    else:
        _supervise(batches, jobs, limit_s, deliver)
    expected = sum(len(batch.cases) for batch in batches)
    if delivered != expected:
        raise HarnessError(f"{expected} cases were asked for and {delivered} outcomes came back; expected one for each")


# ---- the parent


@dataclass(slots=True, eq=False)
class _Task:
    """A batch on its way: the place of the case that is next or running, and how often a worker was lost in it."""

    batch: Batch
    place: int = 0
    deaths: int = 0

    def outcome(self, kind: Kind, payload: object) -> Outcome:
        """Of the case at hand; goes on to the next."""
        case = self.batch.cases[self.place]
        self.place += 1
        return Outcome(self.batch.system, case, kind, payload)

    @property
    def done(self) -> bool:
        return self.place == len(self.batch.cases)


@dataclass(slots=True, eq=False)
class _Worker:
    """A process with its pipe, its output, and a file for the stacks of its threads at its end.

    deadline: when the case at hand counts as hung.    tail: the end of its output.    silent: its pipe is closed.
    """

    process: subprocess.Popen[bytes]
    pipe: Connection
    stacks: IO[bytes]
    task: _Task
    preparing: bool = True
    deadline: float = 0.0
    tail: bytearray = field(default_factory=bytearray)
    silent: bool = False

    @classmethod
    def start(cls, task: _Task) -> _Worker:
        ours, theirs = Pipe()
        stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed in kill
        with theirs:
            fds = (theirs.fileno(), stacks.fileno())
            process = subprocess.Popen(
                [sys.executable, "-c", _START, repr(sys.path), *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                pass_fds=fds,
                start_new_session=True,  # a group of its own, to be killed with its children; Ctrl-C is for the parent
            )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        worker = cls(process, ours, stacks, task)
        worker.give(task)
        return worker

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def give(self, task: _Task) -> None:
        self.task, self.preparing, self.deadline = task, True, time.monotonic() + PREPARE_LIMIT_S
        with contextlib.suppress(OSError):  # it is dead already: `loss` will say so
            self.pipe.send((task.batch, task.place))

    def read_output(self) -> None:
        """Passes on what the worker printed, and keeps the end of it."""
        with contextlib.suppress(BlockingIOError):
            while printed := os.read(self.output.fileno(), 65536):
                sys.stderr.write(printed.decode(errors="replace"))
                self.tail += printed
                del self.tail[: -4 * TAIL]

    def read_news(self, limit_s: float, deliver: Callable[[Outcome], None]) -> None:
        """None: prepared, the first case starts. (place, kind, payload): a case has ended, the next one starts."""
        try:
            while not self.task.done and self.pipe.poll():
                news = pickle.loads(self.pipe.recv_bytes())
                self.preparing = False
                if news is not None:
                    place, kind, payload = news
                    if place != self.task.place:
                        raise HarnessError(f"a worker reports case {place} of its batch, expected {self.task.place}")
                    deliver(self.task.outcome(kind, payload))
                self.deadline = time.monotonic() + limit_s
        except (EOFError, OSError):
            self.silent = True

    def loss(self, dead: bool, limit_s: float) -> tuple[Kind, str] | None:
        """How the worker was lost, if it was. dead: it was before its news were read, so that no more can come."""
        doing = " while the system was imported" if self.preparing else ""
        if dead:
            how = "closed its pipe to the harness" if self.silent else ""
            with contextlib.suppress(subprocess.TimeoutExpired):
                how = _exit_text(self.process.wait(timeout=1.0))  # a pipe may close a little before its process ends
            self.read_output()
            return "died", how + doing + self._last_words()
        if time.monotonic() < self.deadline:
            return None
        seconds = PREPARE_LIMIT_S if self.preparing else limit_s
        os.kill(self.process.pid, signal.SIGUSR1)  # faulthandler writes the stacks
        time.sleep(_TICK_S)
        self.read_output()
        return "hung", f"no result after {seconds:g} s{doing}{self._last_words()}"

    def _last_words(self) -> str:
        self.stacks.seek(0)
        where = innermost_line(self.stacks.read().decode(errors="replace"))
        printed = self.tail.decode(errors="replace")[-TAIL:].strip()
        return (f", at {where}" if where else "") + (f"\nIts output ended:\n{printed}" if printed else "")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.read_output()
        self.pipe.close()
        self.output.close()
        self.stacks.close()


_START = """
import ast, sys
sys.path[:] = ast.literal_eval(sys.argv[1])
from harness.pool import work
work(int(sys.argv[2]), int(sys.argv[3]))
"""


def _supervise(batches: Sequence[Batch], jobs: int, limit_s: float, deliver: Callable[[Outcome], None]) -> None:
    waiting = deque(_Task(batch) for batch in batches if batch.cases)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker.start(_take(waiting, "", workers)))
            _sleep_until_news(workers)
            for worker in list(workers):
                dead = worker.silent or worker.process.poll() is not None
                worker.read_output()
                worker.read_news(limit_s, deliver)
                loss = None if worker.task.done else worker.loss(dead, limit_s)
                if loss is not None:
                    _blame(worker.task, *loss, deliver)
                    if not worker.task.done:
                        waiting.appendleft(worker.task)
                if loss is None and not worker.task.done:
                    continue
                if loss is None and waiting and worker.process.poll() is None:
                    worker.give(_take(waiting, worker.task.batch.shares, workers))
                else:
                    workers.remove(worker)
                    worker.kill()
    finally:
        for worker in workers:
            worker.kill()


def _take(waiting: deque[_Task], last: str, workers: Sequence[_Worker]) -> _Task:
    """The first task that shares what the worker did last, else the first that shares nothing with what others do."""
    busy = {worker.task.batch.shares for worker in workers} - {""}
    tasks = [task.batch.shares for task in waiting]
    place = min(range(len(tasks)), key=lambda n: (not tasks[n] or tasks[n] != last, tasks[n] in busy))
    waiting.rotate(-place)
    task = waiting.popleft()
    waiting.rotate(place)
    return task


def _sleep_until_news(workers: Sequence[_Worker]) -> None:
    until_deadline = min(worker.deadline for worker in workers) - time.monotonic()
    sources: list[Any] = [source for worker in workers for source in (worker.pipe, worker.output)]
    wait(sources, max(0.0, min(_TICK_S, until_deadline)))


def _blame(task: _Task, kind: Kind, how: str, deliver: Callable[[Outcome], None]) -> None:
    """The case at hand lost its worker; after DEATHS_A_BATCH of them the batch is given up."""
    lost = task.batch.cases[task.place]
    deliver(task.outcome(kind, how))
    task.deaths += 1
    while task.deaths >= DEATHS_A_BATCH and not task.done:
        reason = (
            f"{task.deaths} cases before it killed or hung their process, the last one {lost}: {how.splitlines()[0]}"
        )
        deliver(task.outcome("not_run", reason))


def _exit_text(code: int) -> str:
    """'killed by SIGSEGV', 'exited with code 3'."""
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


_OURS = ("/harness/comm/", "/harness/pool.py", "/threading.py", "/multiprocessing/")


def innermost_line(stacks: str) -> str | None:
    """'file.py:12 in forward' of the thread that fell or hangs, in faulthandler's text; threads that wait are ours."""
    threads = re.split(r"^(?=Current thread|Thread )", stacks, flags=re.MULTILINE)
    for thread in sorted(threads, key=lambda text: not text.startswith("Current")):
        top = re.search(r'File "(.+)", line (\d+) in (.+)', thread)
        if top and not any(ours in top[1] for ours in _OURS):
            return f"{top[1]}:{top[2]} in {top[3]}"
    return None


# ---- the worker


def work(pipe_fd: int, stacks_fd: int) -> None:
    """Runs batches until the parent closes the pipe or dies; then this process and its children end at once."""
    for fd in (pipe_fd, stacks_fd):
        os.set_inheritable(fd, False)
    faulthandler.enable(stacks_fd)
    faulthandler.register(signal.SIGUSR1, stacks_fd)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)  # what was printed before a death is not lost
    pipe: Connection = Connection(pipe_fd)
    requests: queue.SimpleQueue[tuple[Batch, int]] = queue.SimpleQueue()

    def receive() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                requests.put(pipe.recv())
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=receive, daemon=True, name="pool-requests").start()
    while True:
        batch, place = requests.get()
        run, refusal = _prepared(batch)
        pipe.send(None)
        for number in range(place, len(batch.cases)):
            pipe.send_bytes(_pickled(number, *_ran(run, refusal, batch.cases[number])))


def _prepared(batch: Batch) -> tuple[Callable[[str], object] | None, str]:
    """What runs a case; or None and the traceback."""
    try:
        module, _, name = batch.prepare.partition(":")
        return getattr(importlib.import_module(module), name)(batch.system), ""
    except (Exception, SystemExit):
        return None, traceback.format_exc()


def _ran(run: Callable[[str], object] | None, refusal: str, case: str) -> tuple[Kind, object]:
    if run is None:
        return "raised", refusal
    try:
        return "finding", run(case)
    except (Exception, SystemExit):
        return "raised", traceback.format_exc()


def _pickled(number: int, kind: Kind, payload: object) -> bytes:
    try:
        return pickle.dumps((number, kind, payload))
    except Exception:
        return pickle.dumps((number, "raised", traceback.format_exc()))


def _run_here(batches: Sequence[Batch], deliver: Callable[[Outcome], None]) -> None:
    for batch in batches:
        with contextlib.redirect_stdout(sys.stderr):
            run, refusal = _prepared(batch)
        for case in batch.cases:
            with contextlib.redirect_stdout(sys.stderr):
                kind, payload = _ran(run, refusal, case)
            deliver(Outcome(batch.system, case, kind, payload))
