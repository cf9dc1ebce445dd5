"""Break the runner's own source, one line at a time, and see `check` name each cause: python -m tests.bite.edits [WORD]

Each edit is made in a copy of the tree, never here. The exit code is 0 if every edit made check exit 1 with its words.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Edit:
    """old stands once in the file and is replaced by new.    words: what some line of the report has to contain."""

    name: str
    file: str
    old: str
    new: str
    words: str


EDITS = (
    Edit(
        "scale twice, in the runner", "moe_runner.py",
        "routed_ML = routed_ML * self.facts.scale", "routed_ML = routed_ML * self.facts.scale**2", "applied twice (s^2)",
    ),
    Edit(
        "scale twice, in the router", "router.py",
        "else weights_MK * scale", "else weights_MK * scale * scale", "applied twice (s^2)",
    ),
    Edit(
        "scale never", "moe_runner.py",
        'if "runner" in plan.scaled_by:', 'if "nobody" in plan.scaled_by:', "never applied",
    ),
    Edit(
        "scale on shared", "moe_runner.py",
        "        return shared_MH, routed_ML\n",
        "        return None if shared_MH is None else shared_MH * self.facts.scale, routed_ML\n", "s*(R + S)",
    ),
    Edit(
        "no all-reduce", "moe_runner.py",
        "states = self.comm.tp.all_reduce(states)", "states = states.clone()", "nothing is reduced",
    ),
    Edit(
        "all-reduce twice", "moe_runner.py",
        "states = self.comm.tp.all_reduce(states)", "states = self.comm.tp.all_reduce(self.comm.tp.all_reduce(states))",
        "reduced twice (R, S x tp)",
    ),
    Edit(
        "shared reduced twice", "moe_runner.py",
        "if shared_MH is None or plan.shared_reduced is not Reduced.EARLY:", "if shared_MH is None:", "(S x tp)",
    ),
    Edit(
        "shared left partial", "plan.py",
        "return Reduced.EARLY  # the final all-reduce is off", "return Reduced.NOT_NEEDED  # the final all-reduce is off",
        "left partial",
    ),
    Edit(
        "early reduce dropped", "plan.py",
        "return Reduced.EARLY  # a bias", "return Reduced.FINAL  # a bias", "its bias is added tp times",
    ),
    Edit(
        "bias in the weights", "router.py",
        "        ids_MK = (scores_ME + self.bias_E).topk(self.routing.top_k, -1).indices\n",
        "        ids_MK = (scores_ME := scores_ME + self.bias_E).topk(self.routing.top_k, -1).indices\n",
        "the correction bias is in the weights",
    ),
    Edit(
        "groups filled with 0", "router.py",
        'float("-inf")).flatten(1)', "0.0).flatten(1)", "get 0 instead of -inf",
    ),
    Edit(
        "gate and up exchanged", "experts.py",
        "gate, up = wide.chunk(2, -1)", "up, gate = wide.chunk(2, -1)", "gate and up are exchanged",
    ),
    Edit(
        "second bias on every rank", "experts.py",
        'weights["b2"] if rank == 0 else torch.zeros_like(weights["b2"])', 'weights["b2"]', "added on every rank (x tp)",
    ),
    Edit(
        "mean over ranks", "moe_runner.py",
        "states = self.comm.tp.all_reduce(states)", "states = self.comm.tp.all_reduce(states) / self.comm.tp.size",
        "averaged instead of",
    ),
    Edit(
        "residual added", "moe_runner.py",
        "return result_MH if self.share == 1.0", "return result_MH + hidden_states_MH if self.share == 1.0", "adds its input x",
    ),
    Edit(
        "w2 of the next rank", "experts.py",
        "w2_EPi = w2[:, :,", "w2_EPi = w2.roll(-share, 2)[:, :,", "w2's share is that of the next rank from w13's",
    ),
    Edit(
        "unit not declared", "layer.py",
        "return self.plan.output_unit", "return 1.0", "its unit 1/s is not declared",
    ),
)  # fmt: skip


def run(edit: Edit) -> tuple[int, str, float]:
    """Exit code, report and seconds of `check --system runner` with the edit in place."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for package in ("harness", "reference"):
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        source = copy / "harness" / "runner" / edit.file
        text = source.read_text()
        assert text.count(edit.old) == 1, (
            f"{edit.name}: {edit.old!r} stands {text.count(edit.old)} times in {edit.file}"
        )
        source.write_text(text.replace(edit.old, edit.new))
        started = time.perf_counter()
        command = [sys.executable, "-m", "harness", "check", "--system", "runner"]
        env = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr, time.perf_counter() - started


def main() -> int:
    chosen = [edit for edit in EDITS if all(word in edit.name for word in sys.argv[1:])]
    missed = 0
    for edit in chosen:
        code, report, seconds = run(edit)
        causes = [line for line in report.splitlines() if line.startswith("mismatch")]
        named = [line for line in causes if edit.words in line]
        missed += not (code == 1 and named)
        summary = report.strip().splitlines()[-1]
        print(
            f"{edit.name}: exit {code}, {len(named)} of {len(causes)} causes named as expected, {seconds:.0f} s; {summary}"
        )
        print(f"    {(named or causes or [report[-300:]])[0]}")
        for other in [line for line in causes if line not in named][:3]:
            print(f"    also: {other}")
    print(f"{len(chosen)} edits, {len(chosen) - missed} found and named")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
