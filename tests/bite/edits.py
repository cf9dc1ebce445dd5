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
    """old stands once in the file, a path below harness/runner, and is replaced by new.

    words: what some cause in the report has to contain; where they are "", any cause will do.
    arguments: what check is asked beside --system runner, by default nothing: the whole of its main job.
    """

    name: str
    file: str
    old: str
    new: str
    words: str
    arguments: tuple[str, ...] = ()


def _on(*grids: str) -> tuple[str, ...]:
    """Cases of a model with shared experts and s, and of one without, on those grids."""
    return tuple(f"{model}@{grid}" for grid in grids for model in ("deepseek_v3", "mixtral"))


def _with(option: str) -> tuple[str, ...]:
    return tuple(f"{case}+{option}" for case in _on("tp2.ep2.tokens33", "tp2.ep4.dp2.tokens20_13"))


def _through(*kernels: str) -> tuple[str, ...]:
    return tuple(case for kernel in kernels for case in _with(f"kernel={kernel}"))


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
        "shared left partial", "moe_runner.py",
        "        return self.comm.tp.all_reduce(shared_MH)\n", "        return shared_MH\n", "left partial",
    ),
    Edit(
        "shared planned to stay partial", "plan.py",
        "return Reduced.EARLY  # the final all-reduce is off", "return Reduced.NOT_NEEDED  # the final all-reduce is off",
        "S NOT_NEEDED: one of them would be reduced twice or never",
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
        "gate, up = wide_h.chunk(2, -1)", "up, gate = wide_h.chunk(2, -1)", "gate and up are exchanged",
    ),
    Edit(
        "second bias on every rank", "experts.py",
        "b2 if b2 is None or rank == 0 else torch.zeros_like(b2)", "b2", "added on every rank (x tp)",
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
        "unit not declared", "../systems/runner.py",
        "return self._layer.output_unit", "return 1.0", "its unit 1/s is not declared",
    ),
    # ---- experts and tokens on grids
    Edit(
        "reduced over ep in place of tp", "moe_runner.py",
        "states = self.comm.tp.all_reduce(states)", "states = self.comm.ep.all_reduce(states)", "a sum over moe.tp is missing", _on("tp2.ep4.dp2", "tp4.ep2"),
    ),
    Edit(
        "whole experts taken for nothing to reduce", "plan.py",
        "if layer.moe_tp == 1 and layer.moe_ep == 1:", "if layer.moe_tp == 1:", "nothing is reduced", _on("tp2.ep2", "tp2.ep4.dp2"),
    ),
    Edit(
        "own rows reduced too", "plan.py",
        "    if layer.sequence_parallel:\n        return Reduced.BY_ROWS\n", "", "a sum over sequence-parallel ranks, whose tokens are different", _on("tp2.ep2.sp2.tokens8", "tp2.ep4.dp2.sp2"),
    ),
    Edit(
        "naive sums scattered in shares of the next rank", "prepare_finalize/naive.py",
        "reduce_scatter(out_NP, 0, home)", "reduce_scatter(out_NP, 0, [*home[1:], *home[:1]])", "forward returned fp32[2, 64], expected fp32[5, 64]", _on("tp2.ep4.dp2.tokens5_2"),
    ),
    Edit(
        "naive sums one row off", "prepare_finalize/naive.py",
        "reduce_scatter(out_NP, 0, home)", "reduce_scatter(out_NP.roll(1, 0), 0, home)", "rows of R stand at the wrong tokens: each token gets the row of the one before it", _on("tp2.ep4.dp2.tokens5_2", "dp2"),
    ),
    Edit(
        "naive sums scattered in equal shares", "prepare_finalize/naive.py",
        "reduce_scatter(out_NP, 0, home)", "reduce_scatter(out_NP)", "no 2 equal shares; pad it", _on("tp2.ep4.dp2.tokens5_2"),
    ),
    Edit(
        "naive dispatch over tp", "modular_kernel.py",
        "group = comm.ep if parallel.sequence_parallel else comm.dp", "group = comm.tp", "R is summed over tp alone", _on("tp2.ep4.dp2.tokens4_4"),
    ),
    Edit(
        "naive dispatch over dp alone in sequence parallelism", "modular_kernel.py",
        "group = comm.ep if parallel.sequence_parallel else comm.dp", "group = comm.dp", "R is summed over dp alone", _on("tp2.ep4.dp2.sp2"),
    ),
    Edit(
        "expert map one off on ranks above 0", "placement.py",
        "torch.where(_owner_map(owners) == ep_rank, _local_map(owners), -1)",
        "torch.where(_owner_map(owners) == ep_rank, _local_map(owners) + (ep_rank > 0), -1)", "local expert ids are off by +1 on every ep rank but the first", _on("tp2.ep2", "tp2.ep4.dp2"),
    ),
    Edit(
        "moe_tp rank taken for ep rank", "parallel.py",
        "ep_rank=comm.ep.rank,", "ep_rank=comm.rank % comm.ep.size,", "ranks hold each other's weights", _on("tp4.ep2"),
    ),
    Edit(
        "ep rank taken for moe_tp rank", "parallel.py",
        "moe_tp_rank=comm.rank % moe_tp_size,", "moe_tp_rank=comm.rank // comm.ep.size,", "ranks hold each other's weights", _on("tp4.ep2", "ep2.dp4"),
    ),
    Edit(
        "all ranks hold the experts of rank 0", "layer.py",
        "placement.experts_of(parallel.ep_rank)", "placement.experts_of(0)", "every ep rank holds the experts of the first one", _on("tp2.ep2", "tp2.ep4.dp2"),
    ),
    Edit(
        "second bias on every rank of a cut expert", "experts.py",
        "b2 if b2 is None or rank == 0 else torch.zeros_like(b2)", "b2", "the second expert bias is added on every rank", ("gpt_oss@tp8.ep2", "gpt_oss@tp2.dp2"),
    ),
    Edit(
        "shared experts cut although rows are apart", "parallel.py",
        "return 1 if self.sequence_parallel else self.tp_size", "return self.tp_size", "the share of S of rank 1 is missing", _on("tp2.ep2.sp2", "tp2.ep4.dp2.sp2"),
    ),
    Edit(
        "rows of the next rank in sequence parallelism", "block.py",
        "return rows[comm.tp.rank", "return rows.roll(-share, 0)[comm.tp.rank", "those of another tp rank, so gather and scatter do not mirror each other", _on("tp2.ep2.sp2.tokens8", "tp2.ep4.dp2.sp2"),
    ),
    Edit(
        "gathered rows not cut to M", "block.py",
        "return comm.tp.all_gather(y_mH)[: x_MH.shape[0]]", "return comm.tp.all_gather(y_mH)", "forward returned", _on("tp2.ep2.sp2"),
    ),
    # ---- all-to-all
    Edit(
        "combine adds to the wrong rows", "prepare_finalize/all_to_all.py",
        "return _add_rows(sent, row_D, rows)", "return _add_rows(sent, row_D.sort().values, rows)", "the combine adds results to the wrong tokens", _through("deepep_ht", "nvlink_two_sided"),
    ),
    Edit(
        "every expert of a row computed on each rank it visits", "prepare_finalize/all_to_all.py",
        "return self._local_E[ids_DK].where(self._owner_E[ids_DK] == ranks, -1)", "return self._local_E[ids_DK]", "",
        _through("deepep_ht", "nvlink_one_sided"),
    ),
    Edit(
        "combine weighs twice", "prepare_finalize/all_to_all.py",
        "wide(sent) * weights_J[:, None]", "wide(sent) * weights_J[:, None] ** 2", "applied twice (squared)", _through("deepep_ll"),
    ),
    Edit(
        "combine weighs never", "prepare_finalize/all_to_all.py",
        "wide(sent) * weights_J[:, None]", "wide(sent)", "the router weights are not used", _through("deepep_ll"),
    ),
    Edit(
        "combine weighs in another order", "prepare_finalize/all_to_all.py",
        "home = (from_each, row_J, x_MP.shape[0], weights_MK[row_J, k_J])",
        "home = (from_each, row_J, x_MP.shape[0], weights_MK[weights_MK >= 0])", "", _through("deepep_ll"),
    ),
    Edit(
        "a window read one row behind", "prepare_finalize/all_to_all.py",
        "return _add_rows(sent[at_D], row_D, rows)", "return _add_rows(sent.roll(1, 0)[at_D], row_D, rows)",
        "the combine adds results to the wrong tokens", _through("nvlink_one_sided"),
    ),
    Edit(
        "gathered weights of other rows", "prepare_finalize/all_to_all.py",
        "return Prepared(x_NP, weights_AK[coming_A],", "return Prepared(x_NP, weights_AK[: len(x_NP)],", "", _through("nvlink_two_sided"),
    ),
    Edit(
        "a kernel asked once whether it reduces", "moe_runner.py",
        "return self.kernel.output_is_reduced", 'return self.__dict__.setdefault("_asked", self.kernel.output_is_reduced)',
        "what the kernel had reduced is reduced again (R x tp)", ("deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht.swap=partial",),
    ),
    Edit(
        "a reducing kernel reduces twice", "prepare_finalize/passthrough.py",
        "out_MP = self._inner.receive(self._inner.send(out, prepared, how), prepared)\n",
        "out_MP = self._inner.receive(self._inner.send(out, prepared, how), prepared)\n"
        "        out_MP = out_MP if self._tp is None else self._tp.all_reduce(out_MP)\n",
        "what the kernel had reduced is reduced again (R x tp)", ("deepseek_v3@tp3.ep3+kernel=reduced", "deepseek_v3@tp3.dp2+kernel=reduced"),
    ),
    # ---- experts of other kinds, placement, batches
    Edit(
        "a replica's neighbour", "placement.py",
        "table_ER[safe_MK, turn_M1 % count_E[safe_MK]], -1)",
        "(table_ER[safe_MK, turn_M1 % count_E[safe_MK]] + 1) % len(self.held), -1)", "", _with("placement=replicas"),
    ),
    Edit(
        "an expert without a twin lost", "placement.py",
        "table_ER[safe_MK, turn_M1 % count_E[safe_MK]], -1)", "table_ER[safe_MK, -1], -1)", "experts 2 to 15 never count", _with("placement=replicas"),
    ),
    Edit(
        "experts moved, table not", "layer.py",
        "        self.runner.placement = placement\n", "", "", _with("placement=moved"),
    ),
    Edit(
        "table moved, experts not", "layer.py",
        "        self.runner.kernel = self.make_kernel(self._settings.kernel, placement)\n", "", "", _with("placement=moved"),
    ),
    Edit(
        "slots added without their weights", "weight_and_reduce.py",
        "(wide(y_NKP) * weights_NK[:, :, None]).to(dtype)", "y_NKP", "the router weights are not used", _with("experts=slots"),
    ),
    Edit(
        "batch rows of another slot's weight", "weight_and_reduce.py",
        "weights_NK[batch.n_J, batch.k_J]", "weights_NK.flip(1)[batch.n_J, batch.k_J]", "paired wrongly", _with("experts=batched"),
    ),
    Edit(
        "scale twice, in a kernel that routes", "experts.py",
        "weights_NK = weights_NK * scale", "weights_NK = weights_NK * scale**2", "applied twice (s^2)", ("deepseek_v3@tp2.ep4.dp2+experts=monolithic.scale=router",),
    ),
    Edit(
        "shared output of the other micro-batch", "moe_runner.py",
        "plan.shared_order, moment, shared_input_MH, micro_batch)", "plan.shared_order, moment, shared_input_MH, 1 - micro_batch)", "rows of S stand at the wrong tokens",
        ("deepseek_v3@tp2.ep2.tokens8+kernel=deepep_ht.batches=2",),
    ),
    Edit(
        "shared slots weigh 1 where s is applied later", "layer.py",
        "1 / spec.scale if later else 1.0", "1.0", "multiplies the shared experts too: s*(R + S)", ("deepseek_v3@tp2+shared=fused.scale=output",),
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
        command = [sys.executable, "-m", "harness", "check", *edit.arguments, "--system", "runner"]
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
