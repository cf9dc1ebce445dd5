"""Wrong layers from outside the list: each is rejected and its sentence is right, or says that it does not know."""

from __future__ import annotations

import pytest
import torch

from harness.case import Case, Grid
from harness.check import check
from harness.finding import Finding, Verdict
from harness.runner import experts
from harness.systems.runner import RunnerSystem
from tests.bite import faulty


def wrong(
    plant: faulty.Plant, model: str = "mixtral", *, tp: int = 1, dtype: str = "fp32", tokens: int = 33
) -> Finding:
    case = Case(model=model, grid=Grid(tp=tp), dtype=dtype, tokens=tokens)
    finding = check(case, faulty.Faulty(plant))
    assert finding.verdict is Verdict.MISMATCH
    return finding


def changed(y: torch.Tensor, place: object, factor: float) -> torch.Tensor:
    y = y.clone()
    y[place] *= factor
    return y


def gathered_pairs(y, comm):
    everyone, first = comm.all_gather(y[None]), comm.rank // 2 * 2
    return everyone[first : first + 2].sum(0)


def by_row_blocks(y, comm):
    return comm.all_gather(y.tensor_split(comm.world_size)[comm.rank])


# plant, what the sentence has to contain, the family
ON_FOUR_RANKS = {
    "mean instead of sum": (faulty.answering(lambda y: y / 4), "are averaged instead of added", "B13"),
    "sum over pairs": (faulty.reducing(gathered_pairs), "over parts of the ranks, not over all of them: ranks 0, 1; ranks 2, 3", "B8"),
    "last rank skipped": (
        faulty.reducing(lambda y, comm: comm.all_gather(y[None])[:3].sum(0)),
        "the share of R and S of rank 3 is missing", "B8",
    ),
    "own share again": (faulty.reducing(lambda y, comm: comm.all_reduce(y) + y), "its own share of R and S again", "B14"),
    "own share lost": (faulty.reducing(lambda y, comm: comm.all_reduce(y) - y), "lacks its own share of R and S", "B14"),
    "first rank's sum for all": (
        faulty.reducing(lambda y, comm: comm.broadcast(y)), "the share of R and S of ranks 1, 2, 3 is missing", "B8",
    ),
    "gathered, not summed": (faulty.reducing(by_row_blocks), "each of them one rank's partial sum", "B7"),
    "nothing on one rank": (faulty.only_rank(2, faulty.answering(torch.zeros_like)), "y = 0 on rank 2", "A6"),
    "residual on each rank": (faulty.adding_input(float), "tp*x", "H1"),
    "shares of two ranks": (faulty.w2_of_the_next_rank, "w2's share is that of the next rank from w13's in the routed", "F9"),
    "gate and up on one rank": (
        faulty.only_rank(3, faulty.gate_and_up_exchanged), "exchanged on rank 3 alone in the routed experts", "F1",
    ),
}  # fmt: skip
ON_ONE_RANK = {
    "residual": (faulty.adding_input(), "y = R + x instead of R", "H1"),
    "rows rolled": (faulty.answering(lambda y: y.roll(1, 0)), "gets the row of the one before it", "H2"),
    "rows reversed": (faulty.answering(lambda y: y.flip(0)), "the order is reversed", "H2"),
    "one row for all": (faulty.answering(lambda y: y[:1].expand_as(y)), "every token gets the row of token 0", "H2"),
    "tail not written": (faulty.answering(lambda y: changed(y, slice(16, None), 0.0)), "y = 0 instead of R in 17 of 33 tokens (16 to 32)", "A6"),
    "columns rolled": (faulty.answering(lambda y: y.roll(1, 1)), "each column is the one before it", "H4"),
    "columns not written": (
        faulty.answering(lambda y: changed(y, (slice(None), slice(56, None)), 0.0)), "columns 56 to 63 of 64 are 0", "H4",
    ),
    "weights paired wrongly": (faulty.routing(lambda w, ids: (w.flip(-1), ids)), "but paired wrongly", "D15"),
    "ids off by one": (faulty.routing(lambda w, ids: (w, (ids + 1) % 8)), "number is off by +1", "F7"),
    "experts swapped": (
        faulty.routing(lambda w, ids: (w, torch.tensor([0, 2, 1, 3, 4, 5, 6, 7])[ids])),
        "expert 2 computes for expert 1, expert 1 computes for expert 2", "F7",
    ),
    "other token's route": (
        faulty.routing(lambda w, ids: (w.roll(1, 0), ids.roll(1, 0))), "is routed as the one before it", "H2",
    ),
    "other token's weights": (faulty.routing(lambda w, ids: (w.roll(1, 0), ids)), "with the weights of other tokens", "H2"),
    "weights squared": (faulty.routing(lambda w, ids: (w * w, ids)), "applied twice (squared)", "D10"),
    "all weights alike": (faulty.routing(lambda w, ids: (torch.full_like(w, 0.5), ids)), "the same weight 1/K", "D11"),
    "capacity": (faulty.routing(faulty.dropped_beyond(5)), "no expert serves more than its first 5 tokens", "G9"),
    "last expert dropped": (
        faulty.routing(lambda w, ids: (w * torch.tensor([1.0, 0.0]), ids)),
        "the last expert that each token chose does not count", "D13",
    ),
    "w2 of the neighbour": (faulty.w2_as(lambda w: w.roll(1, 0)), "has the w2 of the one before it", "F7"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ON_FOUR_RANKS)
def test_a_fault_between_ranks_is_named_in_every_dtype(name: str, dtype: str):
    plant, words, family = ON_FOUR_RANKS[name]
    finding = wrong(plant, "ernie4_5_moe", tp=4, dtype=dtype)
    assert words in finding.diagnosis, finding.diagnosis
    assert finding.family == family


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_right_numbers_in_the_wrong_place_are_named_in_every_dtype(name: str, dtype: str):
    plant, words, family = ON_ONE_RANK[name]
    finding = wrong(plant, dtype=dtype)
    assert words in finding.diagnosis, finding.diagnosis
    assert finding.family == family


ROUTERS = {
    "bias subtracted": ({"bias_E": torch.neg}, "the correction bias is subtracted", "D2"),
    "bias twice": ({"bias_E": lambda b: 2 * b}, "the correction bias is added twice", "D2"),
    "bias of the neighbour": ({"bias_E": lambda b: b.roll(1)}, "the correction bias belongs to the expert before", "D2"),
    "a group too many": ({"topk_group": lambda n: n + 1}, "one group too many is kept", "D5"),
    "an expert too many": ({"top_k": lambda k: k + 1}, "one expert too many is chosen", "D13"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_with_one_wrong_field_is_named(name: str):
    changes, words, family = ROUTERS[name]
    finding = wrong(faulty.router_with(**changes), "deepseek_v3")
    assert words in finding.diagnosis, finding.diagnosis
    assert finding.family == family


def test_experts_chosen_by_biased_logits_are_named():
    def plant(layer, comm):
        router = layer.runner.router

        class Wrong:
            scales = True

            def select_experts(self, logits):
                ids = (logits.float() + router.bias_E).topk(router.routing.top_k).indices
                weights = logits.float().sigmoid().gather(1, ids)
                return weights / weights.sum(-1, keepdim=True) * router.scale, ids

        layer.runner.router = Wrong()

    finding = wrong(plant, "exaone_moe")
    assert "chosen by logit + correction bias" in finding.diagnosis, finding.diagnosis
    assert finding.family == "D2"


def test_every_other_row_twice_names_the_rows_and_the_factor():
    finding = wrong(faulty.answering(lambda y: changed(y, slice(1, None, 2), 2.0)), "glm4_moe", tokens=7)
    assert "in 3 of 7 tokens (1, 3, 5)" in finding.diagnosis, finding.diagnosis
    assert "everything counts twice" in finding.diagnosis


def test_an_fp32_layer_that_rounds_its_output_to_bf16_is_named():
    finding = wrong(faulty.answering(lambda y: y.bfloat16().float()), tp=2)
    assert "every number of the fp32 output is a bf16 number" in finding.diagnosis, finding.diagnosis
    assert finding.family == "P1"


@pytest.mark.parametrize(("wrong_one", "words"), [(torch.relu, "use relu"), (torch.tanh, "use tanh")])
def test_an_activation_of_no_model_is_named_in_both_places_that_use_it(monkeypatch, wrong_one, words):
    monkeypatch.setattr(experts, "_act", lambda x, rule: wrong_one(x))
    finding = check(Case(model="deepseek_v3", grid=Grid(tp=2)), RunnerSystem())
    assert finding.verdict is Verdict.MISMATCH
    assert f"the routed and the shared experts {words}" in finding.diagnosis, finding.diagnosis
    assert finding.family == "F6"


def test_two_causes_that_a_short_dtype_cannot_tell_apart_are_both_told(monkeypatch):
    monkeypatch.setattr(experts, "_act", lambda x, rule: torch.nn.functional.gelu(x))
    finding = check(Case(model="jamba", dtype="bf16", tokens=33), RunnerSystem())
    assert finding.diagnosis.startswith("these tokens fit more than one cause"), finding.diagnosis
    assert "use gelu instead of silu" in finding.diagnosis
    assert finding.family == "F6"


def test_a_factor_of_two_on_two_ranks_is_told_apart_on_three():
    finding = wrong(faulty.all_reduced_twice, "glm4_moe", tp=2)
    assert finding.diagnosis.endswith("everything is reduced twice (R, S x tp), as it is at tp=3"), finding.diagnosis
    assert "could also be" not in wrong(faulty.all_reduced_twice, "glm4_moe_lite", tp=4).diagnosis


def test_two_faults_at_once_are_both_told():
    def both(layer, comm):
        faulty.shared_summed_per_rank(layer, comm)
        faulty.adding_input()(layer, comm)

    finding = wrong(both, "ernie4_5_moe", tp=4)
    assert "summed once per rank (S x tp)" in finding.diagnosis, finding.diagnosis
    assert "and the layer adds its input x" in finding.diagnosis


def test_a_second_factor_without_a_cause_is_said_to_have_none():
    plant = faulty.scaling(lambda s: s * s, lambda s: 0.3)
    finding = wrong(plant, "deepseek_v3")
    assert "applied twice (s^2); no known cause has the factor of S" in finding.diagnosis, finding.diagnosis


# What no rule explains gets no family, however well some law fits by accident: short dtypes, few tokens, near ties.
NAMELESS = {
    "five percent": faulty.answering(lambda y: y * 1.05),
    "noise": faulty.answering(lambda y: y + 0.05 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))),
    "weights to the root": faulty.routing(lambda w, ids: (w.sqrt(), ids)),
    "weights a little off": faulty.routing(lambda w, ids: (w * (1 + 0.1 * torch.arange(w.shape[1]) / w.shape[1]), ids)),
    "offset": faulty.answering(lambda y: y + 0.1),
    "absolute value": faulty.answering(torch.abs),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("model", ["exaone_moe", "kimi_linear", "qwen3_next", "mixtral"])
@pytest.mark.parametrize("name", NAMELESS)
def test_a_fault_without_a_rule_never_gets_a_name(name: str, model: str, tokens: int):
    for dtype in ("fp32", "bf16"):
        case = Case(model=model, grid=Grid(tp=2), dtype=dtype, tokens=tokens)
        finding = check(case, faulty.Faulty(NAMELESS[name]))
        assert finding.family is None, finding.diagnosis


def test_a_fault_of_two_experts_says_which_tokens_and_experts_it_meets():
    def swap(w2: torch.Tensor) -> torch.Tensor:
        return w2[torch.tensor([1, 0, *range(2, len(w2))])]

    finding = wrong(faulty.w2_as(swap), tokens=33)
    assert finding.diagnosis.startswith("unknown"), finding.diagnosis
    assert "exactly the tokens that visit expert 0 or 1" in finding.diagnosis, finding.diagnosis
