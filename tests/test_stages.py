"""A mismatch is placed at the first stage that is wrong, on any number of ranks, in our runner and in foreign layers alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from harness import models
from harness.case import Case, parse
from harness.check import check
from harness.comm import Communicator
from harness.errors import UsageError
from harness.execution import run_system
from harness.faults import plant
from harness.faults.fault import Fault, FaultyRunner
from harness.faults.reduce import NOTHING_REDUCED, reducing
from harness.faults.rules import routing_rule
from harness.finding import Finding, Verdict
from harness.outputs import handed, told, whole_output
from harness.problem import problem
from harness.runner.layer import FusedMoE
from harness.stages import Handed, Looked, Placed, first_wrong
from harness.systems import System, resolve
from harness.systems.hf import TransformersSystem

GRIDS = ("tp1", "tp4", "tp4.ep4", "tp2.ep4.dp2")
BEHIND = {None, "sum", "reduction", "output"}  # what is said where every stage that is handed out is right


def _looked(case: Case, system: System) -> tuple[Looked, list[Handed]]:
    given, run = problem(case), run_system(case, system, problem(case))
    assert run.broken is None
    outputs = [whole_output(out, given) for out in run.ranks]
    nothing_RM = torch.zeros(len(outputs), case.tokens, dtype=torch.bool)
    precision = system.precision(case.spec)
    return Looked(given, outputs, nothing_RM, case.grid, precision, not system.foreign), handed(case, run)


def _placed(case: Case, system: System) -> Placed:
    return first_wrong(*_looked(case, system))


# ---- right layers


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("grid", [*GRIDS, "tp4.ep4.sp4", "tp4.ep2"])
def test_no_stage_of_a_right_layer_is_called_wrong(grid: str, dtype: str):
    for model in models.names():
        try:
            case = parse(f"{model}@{grid}.{dtype}.tokens33")
        except UsageError:
            continue
        placed = _placed(case, resolve("runner"))
        assert placed.stage in BEHIND, f"{case}: {placed}"
        assert {"logits", "topk_ids", "topk_weights", "routed", "sum"} <= placed.read.keys(), f"{case}: {placed}"
        assert ("shared" in placed.read) == (case.spec.shared is not None)
        summed = {name for name, how in placed.read.items() if how.startswith("right, summed over ranks")}
        partial = case.grid.tp > 1 and case.grid.sp == 1
        assert ("routed" in summed) == partial, f"{case}: {placed}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_no_stage_of_a_released_module_is_called_wrong(dtype: str):
    system, reached = resolve("transformers"), 0
    for model in models.names():
        case = parse(f"{model}@{dtype}.tokens33")
        if system.supports(case) is None:
            placed = _placed(case, system)
            assert placed.stage in BEHIND, f"{case}: {placed}"
            reached += {"topk_ids", "topk_weights", "routed"} <= placed.read.keys()
    assert reached >= 20


OPTIONS = (
    "kernel=reduced", "kernel=deepep_ht", "kernel=deepep_ll", "shared=fused", "pad=8", "junk=3", "batches=2", "order=3",
    "scale=kernel", "scale=output", "scale=output.s=real", "experts=monolithic", "placement=replicas", "reduce=caller",
    "quant=int8", "swap=reduced",
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_the_runner_hand_out_right_stages(options: str):
    tried = 0
    for model in ("deepseek_v3", "nemotron_h", "ernie4_5_vl_moe", "mixtral"):
        for grid in ("tp1", "tp2.fp16", "tp2.ep4.dp2.bf16", "tp2.ep2.sp2"):
            try:
                case = parse(f"{model}@{grid}.tokens9+{options}")
            except UsageError:
                continue
            if resolve("runner").supports(case) is None:
                placed = _placed(case, resolve("runner"))
                assert placed.stage in BEHIND, f"{case}: {placed}"
                assert "sum" in placed.read, f"{case}: {placed}"
                tried += 1
    assert tried > 0


def test_it_is_said_of_each_stage_what_it_is():
    def read(case: str) -> dict[str, str]:
        return _placed(parse(case), resolve("runner")).read

    assert read("deepseek_v3@tp2+scale=router")["routed"] == "right, summed over ranks, times s"
    assert read("deepseek_v3@tp2+scale=output")["routed"] == "right, summed over ranks"
    assert read("deepseek_v3@tp2+kernel=reduced.scale=kernel")["routed"] == "right, on every rank, times s"
    assert read("deepseek_v3@tp2.fp16+scale=output")["sum"] == "right, summed over ranks, times 1/s"
    assert read("nemotron_h@tp2")["routed_reduced"].startswith("right, on every rank")


def test_slots_of_shared_experts_make_no_routed_stage_and_do_not_hide_the_router():
    placed = _placed(parse("deepseek_v3@tp2+shared=fused"), resolve("runner"))
    assert "routed" not in placed.read
    assert "shared" not in placed.read
    assert {"topk_ids", "topk_weights", "sum"} <= placed.read.keys()


# ---- one fault at each stage


def _kernel(change: Callable[[Tensor], Tensor]) -> plant.Plant:
    def each(kernel, placement, layer):
        right = kernel.steps

        def steps(*given):
            return change((yield from right(*given)))

        kernel.steps = steps

    return plant.kernels(each)


def _on_the_last_rank(change: plant.Plant) -> plant.Plant:
    def planted(layer: FusedMoE, comm: Communicator) -> None:
        if comm.rank == comm.world_size - 1:
            change(layer, comm)

    return planted


def _without_the_last(y_MH: Tensor, comm: Communicator) -> Tensor:
    return comm.tp.all_gather(y_MH[None])[:-1].sum(0)


# stage, what is planted
PLANTED: list[tuple[str, str, dict[str, object]]] = [
    ("logits", "times 1.5", {"layer": plant.logits(lambda z: z * 1.5)}),
    ("logits", "bias of one expert", {"layer": plant.logits(lambda z: z + torch.eye(z.shape[1])[2])}),
    ("scores", "softmax for sigmoid", {"spec": routing_rule(scoring_func="softmax")}),
    ("topk_ids", "the next expert", {"layer": plant.rerouted(lambda w, ids: (w, (ids + 1) % 8))}),
    ("topk_ids", "an expert too many", {"spec": routing_rule(top_k=5)}),
    ("topk_weights", "five per cent", {"layer": plant.rerouted(lambda w, ids: (w * 1.05, ids))}),
    ("topk_weights", "paired wrongly", {"layer": plant.rerouted(lambda w, ids: (w.roll(1, 1), ids))}),
    ("topk_weights", "on one rank", {"layer": _on_the_last_rank(plant.rerouted(lambda w, ids: (w * 1.5, ids)))}),
    ("routed", "ten per cent", {"layer": _kernel(lambda r: r * 1.1)}),
    ("routed", "on one rank", {"layer": _on_the_last_rank(_kernel(lambda r: r * 1.5))}),
    ("routed", "one column", {"layer": _kernel(lambda r: r.index_fill(1, torch.tensor([3]), 0.0))}),
    ("shared", "twenty per cent", {"layer": plant.sharing(lambda module, x, comm: module(x) * 1.2)}),
    ("shared", "negated", {"layer": plant.sharing(lambda module, x, comm: -module(x))}),
    ("shared", "of another token", {"layer": plant.sharing(lambda module, x, comm: module(x.roll(1, 0)))}),
    ("sum", "R too large", {"layer": plant.scaling(lambda S, R, s, plan: (S, R * 1.2))}),
    ("sum", "S too large", {"layer": plant.scaling(lambda S, R, s, plan: (S * 1.2, R))}),
    ("sum", "S left out", {"layer": plant.scaling(lambda S, R, s, plan: (None, R))}),
    ("sum", "S left out on one rank", {"layer": _on_the_last_rank(plant.scaling(lambda S, R, s, plan: (None, R)))}),
    ("reduction", "one rank left out", {"layer": reducing(_without_the_last)}),
    ("reduction", "nothing is reduced", {"layer": NOTHING_REDUCED}),
    ("reduction", "twice", {"layer": reducing(lambda y, comm: comm.tp.all_reduce(comm.tp.all_reduce(y)))}),
    ("output", "ten per cent", {"layer": plant.answering(lambda y, x, layer, comm: y * 1.1)}),
    ("output", "the input too", {"layer": plant.answering(lambda y, x, layer, comm: y + x)}),
]  # fmt: skip


def _checked(case: str, **hooks) -> Finding:
    fault = Fault(name="planted", family="-", computes="", references=(), case=case, words="", **hooks)
    return check(parse(case), FaultyRunner(fault), alone=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("stage", "what", "hooks"), PLANTED, ids=[f"{stage}: {what}" for stage, what, _ in PLANTED])
def test_a_fault_is_placed_at_its_stage_on_every_grid(stage: str, what: str, hooks, grid: str, dtype: str):
    finding = _checked(f"deepseek_v3@{grid}.{dtype}.tokens33", **hooks)
    if stage == "reduction" and grid == "tp1":
        assert finding.verdict is Verdict.OK
        return
    assert finding.verdict is Verdict.MISMATCH
    assert finding.stage == stage, f"{finding.stage}: {finding.diagnosis} {finding.figures['stages']}"
    told = finding.figures["stages"]
    assert all(how.startswith("right") for name, how in told.items() if name != list(told)[-1]), told


def _kernel_keeps_its_share(kernel, placement, layer) -> None:
    kernel.prepare_finalize.output_is_reduced = True


@pytest.mark.parametrize("case", ["deepseek_v3@tp4+kernel=reduced", "deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht"])
def test_a_shared_part_that_is_left_partial_beside_a_complete_r_is_a_reduction(case: str):
    finding = _checked(case, layer=plant.planning(lambda plan, layer: {"shared_reduced": None}))
    assert finding.stage == "reduction", f"{finding.stage}: {finding.diagnosis} {finding.figures['stages']}"
    assert finding.figures["stages"]["sum"] == "wrong"


def test_a_kernel_that_calls_its_share_the_sum_is_a_reduction():
    finding = _checked("deepseek_v3@tp4", layer=plant.kernels(_kernel_keeps_its_share))
    assert finding.stage == "reduction", f"{finding.stage}: {finding.diagnosis} {finding.figures['stages']}"


def test_a_reduction_of_one_part_alone_that_skips_a_rank_is_a_reduction():
    finding = _checked("deepseek_v3@tp4+kernel=reduced", layer=reducing(_without_the_last))
    assert finding.stage == "reduction"
    assert finding.figures["stages"]["shared_reduced"] == "wrong"


def test_rows_gathered_in_another_order_under_sequence_parallelism_are_a_reduction():
    def gathered(comm, block, hidden_states, **inputs):
        return block(hidden_states, **inputs).roll(8, 0)

    finding = _checked("deepseek_v3@tp4.ep4.sp4.tokens32", block=plant.around(gathered))
    assert finding.stage == "reduction"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_factor_of_the_kernel_is_not_taken_for_one_of_the_runner(dtype: str):
    """s lost in a kernel that has to scale: what it hands over is wrong, not the sum."""

    def forgets(kernel, placement, layer) -> None:
        kernel.scale = 1.0

    finding = _checked(f"deepseek_v3@tp2.{dtype}.tokens33+scale=kernel", layer=plant.kernels(forgets))
    assert finding.stage == "routed"
    finding = _checked(
        f"deepseek_v3@tp2.{dtype}.tokens33+scale=output", layer=plant.scaling(lambda S, R, s, plan: (S, R / s))
    )
    assert finding.stage == "sum"


# ---- layers that are not ours


class Changed(TransformersSystem):
    """transformers' deepseek_v3 with a method of one submodule replaced."""

    def __init__(self, path: str, change) -> None:
        self.path, self.change = path, change

    def build(self, case, weights, comm):
        layer = super().build(case, weights, comm)
        module = layer.module.get_submodule(self.path) if self.path else layer.module
        right, change = module.forward, self.change
        module.forward = lambda *given, **named: change(right(*given, **named))
        return layer


CHANGES = {
    "routed": ("experts", lambda y: y.flip(-1)),
    "shared": ("shared_experts", lambda y: 2 * y),
    "sum": ("", lambda y: 1.5 * y),
}


@pytest.mark.parametrize("stage", CHANGES)
def test_a_change_of_one_submodule_of_transformers_is_placed_there(stage: str):
    finding = check(parse("deepseek_v3@tokens33"), Changed(*CHANGES[stage]))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.stage == stage, f"{finding.stage}: {finding.diagnosis}"


class Outside:
    """Somebody's Mixtral with S-less parts cut over tp, that hands out its stages in one of several ways.

    gives: "parts", partial sums; "wholes", what it reduced; "sent", what all ranks computed of everybody's tokens.
    wrong: stage -> what becomes of it on the way.
    """

    name, foreign = "outside", True

    def __init__(self, gives: str = "parts", **wrong: Callable[[Tensor], Tensor]) -> None:
        self.gives, self.wrong = gives, wrong

    def supports(self, case):
        return None

    def precision(self, spec):
        return spec.routing.precision

    def build(self, case, weights, comm):
        k, told = case.spec.routing.top_k, {}

        def at(name: str, value: Tensor) -> Tensor:
            told[name] = self.wrong.get(name, lambda t: t)(value)
            return told[name]

        def forward(x):
            told.clear()
            logits = at("logits", linear(x, weights["router_weight"]).float())
            w, ids = at("scores", logits.softmax(-1)).topk(k)
            w = at("topk_weights", w / w.sum(-1, keepdim=True))
            at("topk_ids", ids)
            y = torch.zeros_like(x)
            for e, (w13, w2) in enumerate(zip(weights["w13"], weights["w2"], strict=True)):
                rows, slot = (ids == e).nonzero(as_tuple=True)
                gate, up = (linear(x[rows], half.chunk(comm.tp.size)[comm.tp.rank]) for half in w13.chunk(2))
                out = linear(silu(gate) * up, w2.chunk(comm.tp.size, 1)[comm.tp.rank])
                y = y.index_add(0, rows, (out * w[rows, slot, None]).to(y.dtype))
            y = at("routed", y)
            y = self.wrong.get("reduction", comm.tp.all_reduce)(y)
            if self.gives == "wholes":
                told["routed"] = y.clone()
            return self.wrong.get("output", lambda t: t)(y)

        forward.stages = lambda: dict(told)
        return forward


@pytest.mark.parametrize("gives", ["parts", "wholes"])
@pytest.mark.parametrize("case", ["mixtral@tokens33", "mixtral@tp4.bf16.tokens33", "mixtral@tp2.dp2.tokens9"])
def test_a_foreign_layer_that_is_right_has_right_stages_whatever_they_are(case: str, gives: str):
    placed = _placed(parse(case), Outside(gives))
    assert set(placed.read) == {"logits", "scores", "topk_ids", "topk_weights", "routed"}
    assert all(how.startswith("right") for how in placed.read.values()), placed
    assert placed.stage == ("sum" if parse(case).grid.ranks == 1 else None)


@pytest.mark.parametrize("case", ["mixtral@tokens33", "mixtral@tp4.bf16.tokens33", "mixtral@tp2.dp2.tokens9"])
@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        ("logits", lambda t: t * 1.3),
        ("scores", lambda t: t.square()),
        ("topk_ids", lambda t: (t + 1) % 8),
        ("topk_weights", lambda t: t * 1.3),
        ("routed", lambda t: t * 1.3),
    ],
)
def test_a_foreign_layer_is_placed_at_its_first_wrong_stage(case: str, stage: str, wrong):
    finding = check(parse(case), Outside(**{stage: wrong}), alone=True)
    if stage == "topk_ids":  # told wrongly, and used rightly
        assert finding.verdict is Verdict.OK
        assert _placed(parse(case), Outside(**{stage: wrong})).stage == stage
        return
    assert finding.verdict is Verdict.MISMATCH
    assert finding.stage == stage, f"{finding.stage}: {finding.diagnosis} {finding.figures['stages']}"


def test_a_foreign_layer_that_reduces_nothing_is_not_placed_at_a_part():
    finding = check(parse("mixtral@tp4.tokens33"), Outside(reduction=lambda t: t), alone=True)
    assert finding.stage == "reduction"
    assert finding.figures["stages"]["routed"] == "right, summed over ranks"


def test_stages_that_raise_or_are_no_tensors_of_tokens_are_passed_over():
    class Bad:
        def __init__(self) -> None:
            self.stage_factors = {"routed": 2, "sum": 0.0}

        def stages(self):
            return {"routed": torch.zeros(3, 4), "logits": "none", "sum": torch.zeros(4), 7: torch.zeros(2, 2)}

    assert told(Bad())[0].keys() == {"routed", "7"}
    assert told(Bad())[1] == {"routed": 2.0}

    def raising() -> dict[str, Tensor]:
        raise RuntimeError("nothing to tell")

    Bad.stages = staticmethod(raising)
    assert told(Bad()) == ({}, {})
    assert told(lambda x: x) == ({}, {})


def test_a_stage_of_another_shape_and_one_that_a_rank_keeps_to_itself_are_passed_over():
    looked, ranks = _looked(parse("deepseek_v3@tp2"), resolve("runner"))
    cut = [replace(rank, tensors={**rank.tensors, "sum": rank.tensors["sum"][:, 1:]}) for rank in ranks]
    assert "sum" not in first_wrong(looked, cut).read
    alone = [ranks[0], replace(ranks[1], tensors={})]
    read = first_wrong(looked, alone).read
    assert "routed" not in read
    assert read["topk_ids"] == "right"


# ---- which comes first


def test_wrong_weights_wrong_experts_and_wrong_logits_come_before_what_follows_from_them():
    looked, (rank,) = _looked(parse("deepseek_v3@tokens33"), resolve("runner"))

    def stage(**changed: Tensor) -> str | None:
        return first_wrong(looked, [replace(rank, tensors={**rank.tensors, **changed})]).stage

    right = rank.tensors
    assert stage(logits=right["logits"] + 0.01) == "logits"
    assert stage(topk_ids=(right["topk_ids"] + 1) % looked.given.spec.routing.num_experts) == "topk_ids"
    assert stage(topk_weights=right["topk_weights"] * 1.01) == "topk_weights"
    assert stage(routed=right["routed"] * 1.01, shared=right["shared"] * 1.01) == "routed"
    assert stage(topk_ids=right["topk_ids"].flip(1), topk_weights=right["topk_weights"].flip(1)) == "output"


def test_weights_are_held_to_the_layers_own_logits():
    """A layer whose logits are right within its dtype has to make of them what the rule says."""
    looked, (rank,) = _looked(parse("deepseek_v3@bf16.tokens33"), resolve("runner"))
    off = {**rank.tensors, "topk_weights": rank.tensors["topk_weights"] * 1.002}
    assert first_wrong(looked, [replace(rank, tensors=off)]).stage == "topk_weights"
    loose = replace(looked, exact=False)  # a layer from outside may keep its weights in bf16
    assert first_wrong(loose, [replace(rank, tensors=off)]).read["topk_weights"] == "right"


def test_an_error_that_a_part_brings_along_within_its_limits_is_not_put_on_the_sum():
    """Where the sum alone is beyond its limit, the stage is the part that most of the error came with."""
    looked, (rank,) = _looked(parse("deepseek_v3@tokens33"), resolve("runner"))
    stages, s = looked.given.stages, looked.given.spec.scale
    drift_MH = 1e-7 * stages.shared_MH.norm(dim=-1, keepdim=True) / stages.shared_MH.shape[1] ** 0.5
    parts = {"routed": rank.factors["routed"] * stages.routed_MH, "shared": stages.shared_MH + drift_MH}
    tensors, carried_MH = {**rank.tensors, **parts}, s * stages.routed_MH + parts["shared"]
    wrong_RM = torch.ones_like(looked.wrong_RM)
    looked = replace(looked, outputs=[carried_MH], wrong_RM=wrong_RM)
    placed = first_wrong(looked, [replace(rank, tensors=tensors)])
    assert placed.read["shared"] == "right, on every rank"
    assert placed.stage == "shared"
    of_its_own = replace(looked, outputs=[carried_MH + 10 * drift_MH])
    assert first_wrong(of_its_own, [replace(rank, tensors=tensors)]).stage == "output"
