"""Statement 39: each defect that the refactoring had, or was found beside it, is found when it is planted on purpose.

The numbers are those of the project's list of defects; 15 changes bits alone, which no comparison with a law can judge.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from harness.case import parse
from harness.check import check
from harness.comm import Communicator
from harness.execution import run_system
from harness.finding import Verdict
from harness.problem import problem
from harness.runner.layer import FusedMoE
from harness.runner.plan import Reduced
from harness.runner.shared_experts import SharedMLP
from tests.bite import faulty
from tests.statements.layers import RUNNER


def flag_read_at_construction(layer: FusedMoE, comm: Communicator) -> None:
    """The first plan that is made serves all kernels to come."""
    kept = []
    right = layer.runner.plan
    layer.runner.plan = lambda *given: (kept or kept.append(right(*given)) or kept)[0]


def finally_reduced_again(layer: FusedMoE, comm: Communicator) -> None:
    faulty.planning(routed_reduced=Reduced.FINAL, shared_reduced=Reduced.FINAL)(layer, comm)


def transform_before_the_sum(layer: FusedMoE, comm: Communicator) -> None:
    """Each rank transforms its partial sum, so that the bias is added once a rank."""
    finally_reduced_again(layer, comm)


def shared_cut_where_rows_are(layer: FusedMoE, comm: Communicator) -> None:
    shared = layer._spec.shared
    layer.runner.shared_experts._module = SharedMLP(layer._weights, shared, comm.tp.rank, comm.tp.size)


def one_expert_for_all_slots(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return weights, ids[:, :1].expand_as(ids).contiguous()


def gate_behind_the_transform(layer: FusedMoE, comm: Communicator) -> None:
    right = layer.gate

    def gate(x_MH: Tensor) -> Tensor:
        x_ML = layer.runner.apply_routed_input_transform(x_MH)
        return right(torch.nn.functional.pad(x_ML, (0, x_MH.shape[1] - x_ML.shape[1])))

    layer.gate = gate


def logits_in_bf16(layer: FusedMoE, comm: Communicator) -> None:
    right = layer.gate
    layer.gate = lambda x: right(x).bfloat16().float()


def stale_map_of_experts(layer: FusedMoE, comm: Communicator) -> None:
    """Weights move, and what was written down about them does not."""

    def place(placement) -> None:
        old = layer.runner.placement
        FusedMoE.place(layer, placement)
        layer.runner.placement = old

    layer.place = place


TWICE = faulty.scaling(lambda s: s * s)
NEVER = faulty.scaling(lambda s: 1.0)
# number -> what is planted, and the cases that have to show it
DEFECTS: dict[str, tuple[faulty.Plant, tuple[str, ...]]] = {
    "1 flag taken at construction": (
        flag_read_at_construction,
        ("deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht.swap=partial", "deepseek_v3@tp2+kernel=partial.swap=reduced"),
    ),
    "2 added before unpadding": (
        faulty.planning(cut_before_sum=False),
        ("deepseek_v3@tp2+pad=8", "nemotron_h@tp2.ep4.dp2+pad=8"),
    ),
    "3 all-to-all reduced twice": (
        finally_reduced_again,
        tuple(f"deepseek_v3@tp2.ep4.dp2+kernel={kernel}" for kernel in ("nvlink_one_sided", "nvlink_two_sided")),
    ),
    "4 s twice": (TWICE, ("deepseek_v3@tp2+scale=output", "deepseek_v3@tp2.ep4.dp2+scale=kernel")),
    "5 s lost in the kernel": (NEVER, ("kimi_linear+scale=kernel", "kimi_linear@tp2.ep2+scale=kernel")),
    "6 s lost in the router": (NEVER, ("glm4_moe@tp2+scale=router", "lfm2_moe@tp2.dp2+scale=router")),
    "7 fp16 without compensation": (
        faulty.undeclared_unit,
        ("glm4_moe@fp16+scale=output", "nemotron_h@tp2.ep2.fp16+scale=output"),
    ),
    "8 latent bias once a rank": (transform_before_the_sum, ("nemotron_h@tp2", "nemotron_h@tp4.ep2")),
    "9 shared experts that reduce themselves": (
        faulty.shared_summed_per_rank,
        ("aria@tp2", "aria@tp4.ep4", "aria@tp2.dp2"),
    ),
    "10 shared experts cut under sequence parallelism": (
        shared_cut_where_rows_are,
        ("qwen3_next@tp2.ep2.sp2", "deepseek_v3@tp2.ep4.dp2.sp2"),
    ),
    "11 one expert twice": (faulty.routing(one_expert_for_all_slots), ("deepseek_v3", "mixtral@tp2.ep2")),
    "12 gate behind the latent transform": (gate_behind_the_transform, ("nemotron_h@tp2", "nemotron_h@tp2.ep4.dp2")),
    "13 router without its bias": (
        faulty.router_with(bias_E=torch.zeros_like),
        ("glm4_moe@tokens33", "deepseek_v3@tp2.tokens33"),
    ),
    "14 logits rounded to bf16": (logits_in_bf16, ("deepseek_v2@tp2", "qwen3_next@tp2.ep2")),
    "16 stale facts after experts moved": (
        stale_map_of_experts,
        ("deepseek_v3@tp2.ep2+placement=moved", "glm4_moe@tp2.ep4.dp2+placement=moved.kernel=deepep_ht"),
    ),
    "17 the model reduces as well": (faulty.all_reduced_twice, ("minimax_m2@tp2", "deepseek_v3@tp2.ep4.dp2")),
}


@pytest.mark.parametrize(("plant", "texts"), DEFECTS.values(), ids=list(DEFECTS))
def test_39_each_defect_is_found_when_it_is_planted(plant: faulty.Plant, texts: tuple[str, ...]):
    for text in texts:
        case = parse(text)
        assert check(case, RUNNER).verdict is Verdict.OK, text
        finding = check(case, faulty.Faulty(plant))
        assert finding.verdict is Verdict.MISMATCH, text
        assert finding.diagnosis, text


def test_39_every_defect_of_the_list_is_planted():
    assert [int(name.split()[0]) for name in DEFECTS] == [n for n in range(1, 18) if n != 15]


def test_39_a_sum_in_another_order_each_time_shows_in_the_bits_of_a_second_run():
    """Defect 15: every order is lawful, so the check passes; reruns are what shows it."""
    turn = itertools.count()

    def sum_in_turns(y: Tensor, comm: Communicator) -> Tensor:
        parts = comm.tp.all_gather(y[None].contiguous())
        order = torch.arange(comm.tp.size).roll(next(turn) // comm.tp.size).tolist()
        return functools.reduce(torch.add, [parts[rank] for rank in order])

    case, system = parse("deepseek_v3@tp4.tokens33"), faulty.Faulty(faulty.reducing(sum_in_turns))
    assert check(case, system).stage == "collectives"  # the output is right
    one, other = (run_system(case, system, problem(case)).ranks[0].output for _ in range(2))
    assert not torch.equal(one, other)
    right = [run_system(case, RUNNER, problem(case)).ranks[0].output for _ in range(2)]
    assert torch.equal(*right)
