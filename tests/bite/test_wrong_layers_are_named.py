"""Every fault of the law is rejected, and the one line says which it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.case import Case, Grid, parse_grid
from harness.check import check
from harness.finding import Verdict
from harness.systems.runner import RunnerSystem
from tests.bite import faulty

CLEAN = RunnerSystem()

# fault: how it is planted, what the diagnosis has to contain, its family, and the cases that show it
FAULTS = {
    "all zeros": (faulty.answering(torch.zeros_like), "nothing was computed", "A6"),
    "the negation": (faulty.answering(torch.neg), "wrong sign", "sign"),
    "not a number": (faulty.answering(lambda y: y.clone().fill_(torch.nan)), "NaN in 7 of 7 rows", "G5"),
    "scale twice": (faulty.scaling(lambda s: s * s), "s^2*R", "A1"),
    "scale never": (faulty.scaling(lambda s: 1.0), "never applied", "A2"),
    "scale on shared": (faulty.scaling(lambda s: s, lambda s: s), "s*R + s*S", "A3"),
    "absent scale read as 0": (faulty.scaling(lambda s: 0.0), "y = S", "A6"),
    "bias in the weights": (faulty.bias_in_the_weights, "correction bias is in the weights", "D1"),
}
ON_RANKS = {
    "nothing reduced": (faulty.NOTHING_REDUCED, "nothing is reduced", "B1"),
    "all reduced twice": (faulty.all_reduced_twice, "reduced twice (R, S x tp)", "B2"),
    "shared replicated and summed": (faulty.shared_summed_per_rank, "tp*S", "B3"),
    "shared left partial": (faulty.shared_left_partial, "left partial", "B5"),
}


# Where dp > 1 a naive combine has summed R over dp by then.
ON_GRIDS = ON_RANKS | {"nothing reduced": (faulty.NOTHING_REDUCED, "a sum over tp is missing", "B8")}
GRIDS = ("tp2.ep2", "tp4.ep2", "dp2", "tp2.ep4.dp2", "tp2.ep2.sp2", "tp4.ep8.dp2.sp4")


def judged(plant: faulty.Plant, case: Case):
    return check(case, faulty.Faulty(plant))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_law_is_found_and_named_in_every_dtype(name: str, tp: int, dtype: str):
    plant, words, family = FAULTS[name]
    finding = judged(plant, Case(model="glm4_moe", grid=Grid(tp=tp), dtype=dtype, scale="router"))
    assert finding.verdict is Verdict.MISMATCH
    assert words in finding.diagnosis, finding.diagnosis
    assert finding.family == family


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tp", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ON_RANKS)
def test_a_fault_of_the_reduction_is_found_and_named_on_every_size(name: str, tp: int, dtype: str):
    plant, words, family = ON_RANKS[name]
    finding = judged(plant, Case(model="deepseek_v3", grid=Grid(tp=tp), dtype=dtype, tokens=33, scale="router"))
    assert finding.verdict is Verdict.MISMATCH
    assert words in finding.diagnosis, finding.diagnosis
    assert finding.family == family


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_law_is_found_and_named_on_every_grid(name: str, grid: str):
    plant, words, family = FAULTS[name]
    for dtype in ("fp32", "bf16", "fp16"):
        finding = judged(plant, Case(model="glm4_moe", grid=parse_grid(grid), dtype=dtype, scale="router"))
        assert finding.verdict is Verdict.MISMATCH
        assert words in finding.diagnosis, finding.diagnosis
        assert finding.family == family


@pytest.mark.parametrize("grid", ["tp2.ep2", "tp4.ep2", "tp3.ep3", "tp2.ep4.dp2", "tp2.ep2.dp2", "tp3.ep2.dp2"])
@pytest.mark.parametrize("name", ON_RANKS)
def test_a_fault_of_the_reduction_is_found_and_named_on_every_grid(name: str, grid: str):
    case = Case(model="deepseek_v3", grid=parse_grid(grid), tokens=33, scale="router")
    plant, words, family = (ON_GRIDS if case.grid.dp > 1 else ON_RANKS)[name]
    for dtype in ("fp32", "bf16", "fp16"):
        finding = judged(plant, replace(case, dtype=dtype))
        assert finding.verdict is Verdict.MISMATCH
        assert words in finding.diagnosis, finding.diagnosis
        assert finding.family == family


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_an_output_five_percent_too_large_is_rejected_with_its_factor(dtype: str):
    finding = judged(faulty.answering(lambda y: y * 1.05), Case(model="mixtral", dtype=dtype))
    assert finding.verdict is Verdict.MISMATCH
    assert "y = 1.05*R" in finding.diagnosis, finding.diagnosis


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_transposed_output_is_rejected_without_a_name_and_one_token_alone_is_right(dtype: str):
    finding = judged(faulty.answering(lambda y: y.T.reshape(y.shape)), Case(model="mixtral", dtype=dtype))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.diagnosis.startswith("a row depends on what else its call holds: token"), finding.diagnosis
    assert finding.family is None


def test_one_nan_in_one_row_names_the_token_and_the_rank():
    def spoil(y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[3, 5] = torch.nan
        return y

    plant = faulty.only_rank(1, faulty.answering(spoil))
    finding = judged(plant, Case(model="mixtral", grid=Grid(tp=2)))
    assert finding.verdict is Verdict.MISMATCH
    assert "NaN in 1 of 7 rows, first in token 3, on rank 1" in finding.diagnosis


def test_the_fp16_form_without_its_declared_unit_is_named():
    finding = judged(faulty.undeclared_unit, Case(model="deepseek_v3", dtype="fp16", scale="output"))
    assert finding.verdict is Verdict.MISMATCH
    assert "R + S/s" in finding.diagnosis
    assert finding.family == "A5"


def test_shared_experts_on_an_overwritten_buffer_are_named():
    plant = faulty.shared_reads_an_overwritten_buffer
    finding = judged(plant, Case(model="deepseek_v3", grid=Grid(tp=2), scale="router"))
    assert finding.verdict is Verdict.MISMATCH
    assert "read a buffer that holds R" in finding.diagnosis, finding.diagnosis


def test_a_fault_on_one_rank_alone_names_that_rank():
    plant = faulty.only_rank(2, faulty.answering(lambda y: y * 2))
    finding = judged(plant, Case(model="mixtral", grid=Grid(tp=4)))
    assert finding.verdict is Verdict.MISMATCH
    assert "y = 2*R instead of R on rank 2" in finding.diagnosis, finding.diagnosis


def test_an_expert_that_one_rank_lost_is_named_with_its_number():
    case = Case(model="mixtral", grid=Grid(tp=1), tokens=33)
    finding = judged(faulty.expert_dropped(3), case)
    assert finding.verdict is Verdict.MISMATCH
    assert "expert 3 counted 0 (expected 1)" in finding.diagnosis, finding.diagnosis


@pytest.mark.parametrize("tp", [2, 4])
def test_a_kernel_that_claims_to_have_reduced_leaves_one_partial(tp: int):
    def lie(layer, comm):
        layer.runner.kernel.prepare_finalize.output_is_reduced = True

    finding = judged(lie, Case(model="mixtral", grid=Grid(tp=tp)))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.family == "B1"


def test_the_clean_runner_passes_every_case_that_convicts_a_fault():
    for dtype in ("fp32", "bf16", "fp16"):
        for model, tokens in (("glm4_moe", 7), ("deepseek_v3", 33), ("mixtral", 7), ("mixtral", 33)):
            for tp in (1, 2, 3, 4, 8):
                case = Case(model=model, grid=Grid(tp=tp), dtype=dtype, tokens=tokens)
                assert check(case, CLEAN).verdict is Verdict.OK, case
            for grid in (*GRIDS, "tp3.ep3", "tp2.ep2.dp2", "tp3.ep2.dp2"):
                case = Case(model=model, grid=parse_grid(grid), dtype=dtype, tokens=tokens)
                assert check(case, CLEAN).verdict is Verdict.OK, case
