"""The whole space of the runner's states: enumerated, exact, written down, and checked by code that shares nothing with it."""

from __future__ import annotations

import ast
import copy
import functools
import gzip
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import reference.certificate as judge
from harness.case import KERNELS, parse_grid
from harness.certify import certificate, certify, law, pieces, replay, stacked, states
from harness.certify.dispatch import axes
from harness.certify.ranks import on_ranks
from harness.certify.states import LayerState
from harness.certify.walk import Walked, difference, walk
from harness.certify.world import weights_of
from harness.comm.simulated import run_ranks
from harness.errors import UsageError
from harness.runner import moe_runner
from harness.runner.layer import FusedMoE
from harness.runner.moe_runner import MoERunner
from harness.runner.plan import Reduced, SharedExpertsOrder
from harness.runner.prepare_finalize.all_to_all import NVLinkTwoSidedPrepareAndFinalize
from harness.runner.router import ZeroExpertRouter
from harness.runner.shared_experts import SharedExperts

PLAIN = {"experts": "modular", "bias": "no", "pad": "0", "share": "1", "reduce": "layer"}


# ------------------------------------------------------------------------------------------------ what is legal


def test_a_layer_is_built_exactly_where_both_rules_call_it_legal():
    drawn, kept = random.Random(0), 0
    for _ in range(400):
        layer = LayerState(*(drawn.choice(values) for values in states.LAYER_AXES.values()))
        kernel = drawn.choice(KERNELS)
        legal = states.refusal(layer, kernel) is None
        assert judge.is_legal(judge.Layer(*layer), kernel) == legal, (layer, kernel)
        given = states.spec_of(layer), states.settings_of(layer, kernel), weights_of(layer)
        built = run_ranks(parse_grid(layer.grid), functools.partial(FusedMoE, *given))
        assert (built.failure is None) == legal, (layer, kernel, built.failure)
        assert legal or isinstance(built.failure, ValueError)
        kept += legal
    assert 20 < kept < 380


def test_every_grid_up_to_8_ranks_is_in_the_space_with_and_without_sequence_parallelism():
    assert states.LAYER_AXES["grid"] == tuple(judge.GRIDS)
    grids = [parse_grid(grid) for grid in judge.GRIDS]
    assert len(grids) == 41
    for ranks in (1, 2, 3, 4, 8):
        mine = {(grid.tp, grid.ep) for grid in grids if grid.ranks == ranks and grid.sp == 1}
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        assert mine == {(tp, ep) for tp in divisors for ep in divisors}
    assert sum(grid.sp > 1 for grid in grids) == 7


@pytest.mark.parametrize("grid", ["tp1", "tp4.ep2", "tp2.ep4.dp2.sp2"])
def test_the_law_of_the_harness_and_the_law_of_the_judge_agree_on_every_legal_state(grid: str):
    for layer, kernels in states.layers_of(grid):
        if layer.pad == "0":
            lawful = judge.Layer(*layer)
            for call in states.calls_of(kernels):
                state = (layer, call)
                assert [list(row) for row in law.coefficients(state)] == judge.coefficients(lawful, call.dtype)
                assert [list(each) for each in law.ledger(state)] == judge.ledger(lawful, call.kernel, call.history)


# ------------------------------------------------------------------------------------- one wrong state among all


def wrong_states(walked: Walked) -> list[dict[str, str]]:
    """The axes of each wrong state that is told of."""
    assert walked.wrongs == len(walked.wrong), "more than are told of"
    return [dict(word.split("=") for word in each.state.split()[1:]) for each in walked.wrong]


def test_a_right_runner_gives_the_law_in_every_state_of_a_grid():
    walked = walk("tp2")
    assert not walked.wrong
    assert walked.states == 72368
    assert 4000 < walked.runs < 8000
    assert walked.apart == 8, "the transports of this grid, rank by rank"


def test_a_plan_that_is_wrong_for_one_transform_in_sequence_parallelism_on_one_grid_is_found(monkeypatch):
    right = moe_runner.plan_output

    def plan_output(layer, call):
        plan = right(layer, call)
        if layer.sequence_parallel and layer.moe_ep == 4 and layer.transform == "ordered" and call.padded:
            return replace(plan, routed_reduced=Reduced.FINAL, shared_reduced=plan.shared_reduced and Reduced.FINAL)
        return plan

    monkeypatch.setattr(moe_runner, "plan_output", plan_output)
    here = PLAIN | {"pad": "8", "shared": "sharded", "scaling": "router", "zero": "yes", "order": "2"}
    assert {word["latent"] for word in wrong_states(walk("tp2.ep2.sp2", **here))} == set()
    walked = walk("tp2.ep4.dp2.sp2", **here | {"latent": "bias"})
    assert walked.wrongs == walked.states == 144
    assert "routed 7.5 7.5 7.5 7.5, expected 2.5 2.5 2.5 2.5" in walked.wrong[0].text
    assert not walk("tp2.ep4.dp2.sp2", **here | {"latent": "linear"}).wrong


def test_a_scale_applied_twice_only_after_a_swap_in_order_3_is_found(monkeypatch):
    right, swap = MoERunner._maybe_apply_routed_scale_to_output, FusedMoE.swap_kernel

    def swap_kernel(self, backend):
        swap(self, backend)
        self.runner.swapped = True

    def scale(self, shared, routed, plan):
        shared, routed = right(self, shared, routed, plan)
        late = plan.shared_order is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
        return shared, routed * self.facts.scale if late and getattr(self, "swapped", False) else routed

    monkeypatch.setattr(FusedMoE, "swap_kernel", swap_kernel)
    monkeypatch.setattr(MoERunner, "_maybe_apply_routed_scale_to_output", scale)
    where = PLAIN | {"shared": "sharded", "scaling": "router", "latent": "none", "zero": "no", "share": "0.5"}
    found = wrong_states(walk("tp2", **where))
    assert len(found) == 8  # two kernels, each after the other, whole and in two micro-batches, in both dtypes
    assert all(word["order"] == "3" and "after_" in word["history"] for word in found)


def test_a_second_micro_batch_that_reduces_as_the_kernel_before_the_swap_did_is_found_there_alone(monkeypatch):
    swap, right = FusedMoE.swap_kernel, MoERunner.reduce_and_trunc

    def swap_kernel(self, backend):
        self.runner.old_plan = self.runner.last_plan
        swap(self, backend)

    def reduce(self, rows, width, plan):
        self.turn = getattr(self, "turn", 0) + 1
        old = getattr(self, "old_plan", None)
        return right(self, rows, width, plan if old is None or self.turn < 3 else old)

    monkeypatch.setattr(FusedMoE, "swap_kernel", swap_kernel)
    monkeypatch.setattr(MoERunner, "reduce_and_trunc", reduce)
    where = PLAIN | {"shared": "none", "scaling": "absent", "latent": "none", "zero": "no", "order": "auto"}
    found = wrong_states(walk("tp2", **where))
    assert {(word["kernel"], word["history"]) for word in found} == {
        ("partial", "two_batches_after_reduced"), ("reduced", "two_batches_after_partial"),
    }  # fmt: skip
    assert {word["dtype"] for word in found} == {"fp32", "fp16"}


def test_shared_experts_reduced_twice_for_one_kernel_with_zero_experts_are_found(monkeypatch):
    right = MoERunner._maybe_reduce_shared_out

    def reduce(self, shared, plan):
        shared = right(self, shared, plan)
        two_sided = isinstance(self.kernel.prepare_finalize, NVLinkTwoSidedPrepareAndFinalize)
        if shared is not None and two_sided and isinstance(self.router, ZeroExpertRouter):
            return self.comm.tp.all_reduce(shared)
        return shared

    monkeypatch.setattr(MoERunner, "_maybe_reduce_shared_out", reduce)
    where = PLAIN | {"shared": "gated", "scaling": "absent", "latent": "linear", "order": "auto"}
    walked = walk("tp2.ep2", **where)
    found = wrong_states(walked)
    assert {(word["kernel"], word["zero"]) for word in found} == {("nvlink_two_sided", "yes")}
    assert "shared 2 2, expected 1 1" in walked.wrong[0].text
    assert "ledger" in walked.wrong[0].text


def test_code_that_asks_for_its_rank_is_run_rank_by_rank_and_found_on_that_rank(monkeypatch):
    right = MoERunner.reduce_and_trunc

    def reduce(self, states_, width, plan):
        total = right(self, states_, width, plan)
        return total * 2 if plan.cut_before_sum and self.comm.tp.rank == 1 else total

    monkeypatch.setattr(MoERunner, "reduce_and_trunc", reduce)
    where = PLAIN | {"shared": "sharded", "scaling": "output", "latent": "none", "zero": "no", "order": "1"}
    assert not walk("tp2", **where).wrong
    walked = walk("tp2", **where | {"pad": "8"})
    assert walked.wrongs == walked.states == walked.apart == 16
    assert "rank 1: routed" in walked.wrong[0].text
    assert "rank 0" not in walked.wrong[0].text


def test_a_flag_kept_from_the_first_call_is_found_after_swaps_alone(monkeypatch):
    right = MoERunner._fused_output_is_reduced.fget

    def kept(self):
        if "_kept" not in self.__dict__:
            self._kept = right(self)
        return self._kept

    monkeypatch.setattr(MoERunner, "_fused_output_is_reduced", property(kept))
    where = PLAIN | {"shared": "none", "scaling": "absent", "latent": "none", "zero": "no", "order": "auto"}
    found = wrong_states(walk("tp2", **where | {"share": "0.5"}))
    assert {(word["kernel"], word["history"]) for word in found} == {
        ("partial", "after_reduced"), ("reduced", "after_partial"),
        ("partial", "two_batches_after_reduced"), ("reduced", "two_batches_after_partial"),
    }  # fmt: skip


def test_a_forward_that_looks_at_the_plan_before_is_run_after_every_swap(monkeypatch):
    right = MoERunner.apply_routed_input_transform

    def transform(self, hidden):
        if self.last_plan is not None and len(self.last_plan.announced) == 1:
            hidden = hidden * 2
        return right(self, hidden)

    monkeypatch.setattr(MoERunner, "apply_routed_input_transform", transform)
    where = PLAIN | {"shared": "none", "scaling": "absent", "latent": "none", "zero": "no", "order": "auto"}
    found = wrong_states(walk("tp2", **where | {"pad": "8"}))
    assert {(word["kernel"], word["history"]) for word in found} == {
        ("partial", "after_reduced"), ("partial", "two_batches_after_reduced"),
        ("reduced", "two_batches_first"), ("reduced", "two_batches_after_partial"),
    }  # fmt: skip
    assert {word["dtype"] for word in found} == {"fp32", "fp16"}


def test_an_order_that_the_kernel_chooses_is_found_wrong_though_each_order_that_is_asked_for_is_right(monkeypatch):
    right = MoERunner.reduce_and_trunc

    def reduce(self, rows, width, plan):
        chosen = self.shared_order == "auto" and plan.shared_order is SharedExpertsOrder.MK_INTERNAL_OVERLAPPED
        return right(self, rows * 2 if chosen else rows, width, plan)

    monkeypatch.setattr(MoERunner, "reduce_and_trunc", reduce)
    where = PLAIN | {"shared": "sharded", "scaling": "absent", "latent": "none", "zero": "no"}
    walked = walk("tp2.ep2", **where)
    found = [each.state for each in walked.wrong]
    assert walked.wrongs == 2 * 2 * 12  # two kernels of six, both dtypes, all histories
    assert all("order=auto" in each and ("kernel=deepep_ht" in each or "kernel=deepep_ll" in each) for each in found)


def test_layers_that_have_to_give_something_else_are_never_taken_for_one_another(monkeypatch):
    """Here no runner sees s any more: all layers do the same, and those with s are wrong."""
    spec_of = states.spec_of
    monkeypatch.setattr(stacked, "spec_of", lambda layer: spec_of(layer._replace(scaling="absent")))
    where = PLAIN | {"shared": "none", "latent": "none", "zero": "no", "order": "auto"}
    assert not walk("tp1", **where | {"scaling": "absent"}).wrong
    found = wrong_states(walk("tp1", **where | {"scaling": "router"}))
    assert {word["scaling"] for word in found} == {"router"}
    walked = walk("tp1", **where)
    assert {each.state.split("scaling=")[1].split()[0] for each in walked.wrong} >= {"router", "plain"}
    assert walked.wrongs == 4 * 16


def test_an_order_that_is_asked_for_outside_the_plan_is_found_in_that_order(monkeypatch):
    right = MoERunner.reduce_and_trunc
    monkeypatch.setattr(
        MoERunner, "reduce_and_trunc",
        lambda self, rows, width, plan: right(self, rows if self.shared_order != "1" else rows * 2, width, plan),
    )  # fmt: skip
    where = PLAIN | {"shared": "sharded", "scaling": "absent", "latent": "none", "zero": "no", "experts": "monolithic"}
    found = wrong_states(walk("tp1", **where))
    assert len(found) == 16
    assert {word["order"] for word in found} == {"1"}


def test_micro_batches_that_take_each_others_shared_output_are_found(monkeypatch):
    right = SharedExperts.take

    def take(self, micro_batch=0):
        other = 1 - micro_batch
        return right(self, other if other in self._outputs else micro_batch)

    monkeypatch.setattr(SharedExperts, "take", take)
    where = PLAIN | {"shared": "sharded", "scaling": "router", "latent": "none", "zero": "no"}
    found = wrong_states(walk("tp1", **where))
    assert {word["history"] for word in found} == {
        "two_batches_first", "two_batches_after_partial", "two_batches_after_reduced",
    }  # fmt: skip
    assert {word["order"] for word in found} == {"auto", "1", "2"}


# ------------------------------------------------------------------------------------------------ rank by rank


def test_states_run_rank_by_rank_give_what_all_ranks_at_once_give():
    drawn = random.Random(1)
    for grid in ("tp3", "tp2.ep2.dp2", "tp4.ep4.sp4", "ep4.dp4", "tp2.ep4.dp2.sp2"):
        layers = drawn.sample(list(states.layers_of(grid)), 40)
        for layer, kernels in layers:
            state = (layer, drawn.choice(states.calls_of(kernels)))
            with torch.inference_mode():
                told = difference((law.coefficients(state), law.ledger(state)), *on_ranks(state))
            assert not told, (states.told(state), told)


# --------------------------------------------------------------------------------------------- the certificate


@pytest.fixture
def two_grids(monkeypatch) -> None:
    """The space cut down to two grids, for both sides; and few pieces."""
    grids = {grid: judge.GRIDS[grid] for grid in ("tp1", "dp2")}
    monkeypatch.setattr(judge, "GRIDS", grids)
    for each in (judge.LAYER_AXES, judge.ROUTED_AXES, states.LAYER_AXES, axes.LAYER_AXES):
        monkeypatch.setitem(each, "grid", tuple(grids))
    few = ("mixtral@tp2.fp32+size=labels", "mixtral@tp2.tokens0", "llama4@tp2.fp32+size=labels", "llama4@tp2.tokens0")
    monkeypatch.setattr(pieces, "cases", lambda: few)


@pytest.fixture(scope="module")
def once() -> dict[str, Any]:
    """What one run of certify wrote and printed, filled by the first test that needs it."""
    return {}


@pytest.fixture
def made(two_grids, once, tmp_path, capsys) -> dict[str, Any]:
    """A certificate of the two grids, to be changed."""
    if not once:
        path = tmp_path / "made.gz"
        code = certify(str(path), jobs=0, as_json=True)
        once.update(code=code, told=json.loads(capsys.readouterr().out), bytes=path.read_bytes())
    body: dict[str, Any] = json.loads(gzip.decompress(once["bytes"]))
    return body


def written(path: Path, body: dict[str, Any]) -> str:
    certificate.write(str(path), body)
    return str(path)


def test_the_judge_finds_that_a_right_certificate_holds(made, tmp_path, capsys):
    assert judge.main([written(tmp_path / "c.gz", made)]) == 0
    told = capsys.readouterr().out
    assert "holds. " in told
    assert "legal states, each once" in told
    assert "4 layers of models" in told


def lose_a_state(space: dict[str, Any]) -> None:
    layer = space["layers"][7]
    space["tables"].append(space["tables"][layer[1]][1:])
    layer[1] = len(space["tables"]) - 1


def lose_a_layer(space: dict[str, Any]) -> None:
    del space["layers"][11]


def double_a_layer(space: dict[str, Any]) -> None:
    space["layers"].append(space["layers"][5])


def double_a_state(space: dict[str, Any]) -> None:
    space["tables"][3].append(space["tables"][3][0])


def alter_a_coefficient(space: dict[str, Any]) -> None:
    first = space["coefficients"][-1][0]
    (first[0] if isinstance(first[0], list) else first)[1] += 1e-7


def alter_a_ledger(space: dict[str, Any]) -> None:
    space["ledgers"][-1].append(["all_reduce", "tp"])


def alter_a_layer(space: dict[str, Any]) -> None:
    """A refused one in its place."""
    known = {code for code, _ in space["layers"]}
    space["layers"][9][0] = next(code for code in range(len(known) + 1) if code not in known)


def alter_a_call(space: dict[str, Any]) -> None:
    space["tables"][2][0][0] += 1


def give_a_layer_the_table_of_another(space: dict[str, Any]) -> None:
    space["layers"][9][1] = space["layers"][-1][1]


def alter_an_axis(space: dict[str, Any]) -> None:
    space["layer_axes"][2][1][0] = "nobody"


def lose_a_piece(body: dict[str, Any]) -> None:
    del body["pieces"][0]


def spoil_a_piece(body: dict[str, Any]) -> None:
    body["pieces"][1][1] = "mismatch"


def lose_a_space(body: dict[str, Any]) -> None:
    del body["dispatch"]


CHANGES: dict[Callable[[dict[str, Any]], None], str] = {
    lose_a_state: "missing",
    lose_a_layer: "missing: every state",
    double_a_layer: "is there 2 times",
    double_a_state: "is there 2 times",
    alter_a_coefficient: "coefficients",
    alter_a_ledger: "ledger",
    alter_a_layer: "missing: every state",
    alter_a_call: "",
    give_a_layer_the_table_of_another: "",
    alter_an_axis: "axes",
}
OF_ALL: dict[Callable[[dict[str, Any]], None], str] = {
    lose_a_piece: "missing: piece",
    spoil_a_piece: "is mismatch",
    lose_a_space: "dispatch",
}


@pytest.mark.parametrize("space", ["decisions", "dispatch"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_judge_rejects_what_was_changed_in_a_space_even_with_a_new_hash(change, space, made, tmp_path, capsys):
    change(made[space])
    assert judge.main([written(tmp_path / "c.gz", made)]) == 1
    told = capsys.readouterr().out
    assert "DOES NOT HOLD" in told
    assert CHANGES[change] in told
    assert "hash" not in told


@pytest.mark.parametrize("change", OF_ALL, ids=lambda change: change.__name__)
def test_the_judge_rejects_a_certificate_that_lacks_a_part(change, made, tmp_path, capsys):
    change(made)
    assert judge.main([written(tmp_path / "c.gz", made)]) == 1
    told = capsys.readouterr().out
    assert "DOES NOT HOLD" in told
    assert OF_ALL[change] in told


def test_the_judge_rejects_content_that_its_hash_does_not_fit(made, tmp_path, capsys):
    path = tmp_path / "c.gz"
    body = {**made, "hash": certificate.digest(made)}
    body["torch"] += "x"
    path.write_bytes(gzip.compress(json.dumps(body).encode()))
    assert judge.main([str(path)]) == 1
    assert "hash: the file says" in capsys.readouterr().out
    with pytest.raises(UsageError, match="hash is not that of its content"):
        certificate.read(str(path))


def test_the_judge_refuses_what_is_no_certificate_with_exit_code_2(tmp_path, capsys):
    path = tmp_path / "c.gz"
    path.write_bytes(b"\x1f\x8b damaged")
    assert judge.main([str(path)]) == 2
    assert judge.main([str(tmp_path / "none")]) == 2
    assert judge.main([]) == 2
    path.write_bytes(gzip.compress(b"[1, 2]"))
    assert judge.main([str(path)]) == 1
    assert "moe-harness certify" in capsys.readouterr().err


def test_the_judge_imports_the_standard_library_alone():
    tree = ast.parse(Path(judge.__file__).read_text())
    names = {
        (alias.name if isinstance(node, ast.Import) else str(node.module)).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names <= sys.stdlib_module_names


# ------------------------------------------------------------------------------------------------- the two verbs


def test_certify_writes_a_certificate_and_says_how_many_states_it_has(made, once):
    told = once["told"]
    assert once["code"] == 0
    assert told["legal"] + told["refused"] == told["product"]
    assert told["pieces"] == 4
    assert told["wrong"] == told["wrong_pieces"] == told["lost"] == 0
    assert told["bytes"] == len(once["bytes"])


def test_certify_names_the_wrong_state_and_leaves_the_old_certificate_alone(two_grids, tmp_path, capsys, monkeypatch):
    right = MoERunner.reduce_and_trunc

    def reduce(self, rows, width, plan):
        total = right(self, rows, width, plan)
        return total * 2 if (plan.output_unit, self.share, plan.cut_before_sum) == (0.4, 0.5, True) else total

    monkeypatch.setattr(MoERunner, "reduce_and_trunc", reduce)
    monkeypatch.setitem(states.LAYER_AXES, "grid", ("tp1",))
    monkeypatch.setitem(axes.LAYER_AXES, "grid", ("tp1",))
    path = tmp_path / "c.gz"
    path.write_text("old")
    assert certify(str(path), jobs=0, as_json=False) == 1
    told = capsys.readouterr().out
    assert "wrong: tp1 experts=" in told
    assert "scaling=output shared=sharded" in told
    assert "pad=8 share=0.5 dtype=fp16" in told
    assert path.read_text() == "old"


def test_a_piece_that_is_wrong_or_lost_makes_certify_fail(two_grids, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(states.LAYER_AXES, "grid", ())
    monkeypatch.setattr(pieces, "cases", lambda: ("mixtral@tp2.tokens0+order=2", "llama4@tp9", "mixtral@tp2.tokens1"))
    assert certify(str(tmp_path / "c.gz"), jobs=0, as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["wrong_pieces"] == 2
    assert [each["state"] for each in told["first_wrong"]] == ["mixtral@tp2.tokens0+order=2", "llama4@tp9"]


def test_the_pieces_are_the_same_for_every_model_and_cover_grids_dtypes_and_token_numbers():
    cases = pieces.cases()
    kinds: dict[str, set[str]] = {}
    for case in cases:
        model, _, kind = case.partition("@")
        kinds.setdefault(model, set()).add(kind)
    assert len(kinds) == 26
    assert len({frozenset(each) for each in kinds.values()}) == 1
    words = {word for case in cases for word in case.replace("+", ".").split(".")}
    assert {"bf16", "fp16", "ep4", "sp4", "tokens0", "tokens130", "experts=batched", "kernel=deepep_ll"} <= words


def test_replay_runs_drawn_states_again_and_sees_one_that_was_changed(made, tmp_path, capsys):
    path = written(tmp_path / "c.gz", made)
    assert replay(path, count=60, seed=3, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["states"] == 60
    changed = copy.deepcopy(made)
    for values in changed["decisions"]["coefficients"]:
        values[0][1] += 0.5
    for values in changed["dispatch"]["coefficients"]:
        values[0][0][2] += 0.5
    assert replay(written(tmp_path / "d.gz", changed), count=5, seed=3, as_json=False) == 1
    told = capsys.readouterr().out
    assert "rank 0: routed" in told
    assert "rank 0, row 0: expert 1" in told
    assert "5 differ" in told
    changed = copy.deepcopy(made)
    for space in ("decisions", "dispatch"):
        changed[space]["ledgers"] = [[["broadcast", "tp"], *ledger] for ledger in changed[space]["ledgers"]]
    assert replay(written(tmp_path / "e.gz", changed), count=2, seed=3, as_json=False) == 1
    assert "ledger" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [None, b"", b"\x1f\x8b\x08 no", gzip.compress(b"{}"), gzip.compress(b"[]")], ids=str
)
def test_replay_of_a_missing_or_damaged_certificate_says_what_to_type(content, tmp_path):
    path = tmp_path / "c.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"moe-harness certify --output"):
        replay(str(path), count=1, seed=0, as_json=False)


def test_certify_refuses_a_place_where_it_cannot_write_before_it_runs_anything(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "c.gz"):
        with pytest.raises(UsageError, match=r"Type --output certificate\.json\.gz"):
            certify(str(path), jobs=0, as_json=False)


def test_names_and_numbers_of_states_lead_to_each_other():
    def every(axes: dict[str, tuple[str, ...]]) -> Iterator[int]:
        size = 1
        for values in axes.values():
            size *= len(values)
        return iter(range(0, size, 997 if size > 1000 else 1))

    assert all(states.layer_code(states.layer_at(code)) == code for code in every(states.LAYER_AXES))
    assert all(states.call_code(states.call_at(code)) == code for code in every(states.CALL_AXES))
    for layer in every(axes.LAYER_AXES):
        for call in every(axes.CALL_AXES):
            assert tuple(map(axes.code_of, axes.state_at(layer, call))) == (layer, call)
