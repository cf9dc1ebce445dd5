"""The ledger of known faults: exact, referenced, and unable to rot."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from harness import known, models
from harness.case import DTYPES, KERNELS, Case, Grid, parse, parse_grid
from harness.check import check
from harness.finding import Verdict
from harness.systems.legacy import LegacySystem

LEGACY = LegacySystem()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize(
    ("model", "tp", "formula"),
    [
        ("dots1", 1, "s*R + s*S"),
        ("dots1", 4, "s*R + s*S"),
        ("aria", 2, "R + tp*S"),
        ("aria", 8, "R + tp*S"),
    ],
)
def test_a_known_fault_is_listed_with_its_formula_and_reference(model, tp, formula, tokens, dtype):
    finding = check(Case(model=model, grid=Grid(tp=tp), tokens=tokens, dtype=dtype), LEGACY)
    assert finding.verdict is Verdict.KNOWN, finding.diagnosis
    assert f"y = {formula} instead of" in finding.diagnosis
    assert finding.reference


def test_the_latent_bias_of_nemotron_was_added_once_per_rank():
    finding = check(Case(model="nemotron_h", grid=Grid(tp=4)), LEGACY)
    assert finding.verdict is Verdict.KNOWN
    assert "tp*b" in finding.diagnosis
    assert finding.family == "C4"


@pytest.mark.parametrize("model", [name for name in models.names() if models.load(name).wrapped])
def test_the_wrapped_block_counted_its_shared_experts_once_per_rank(model):
    finding = check(Case(model=model, grid=Grid(tp=3), backend="transformers"), LEGACY)
    assert finding.verdict is Verdict.KNOWN, finding.diagnosis


@pytest.mark.parametrize("case", [Case(model="aria"), Case(model="dots1", grid=Grid(tp=2), tokens=0)])
def test_a_fault_that_changes_nothing_here_is_not_expected(case):
    assert check(case, LEGACY).verdict is Verdict.OK


def test_an_entry_with_other_coefficients_is_a_mismatch(monkeypatch):
    wrong = tuple(replace(e, factors={"shared": "tp"}) if e.models == ("dots1",) else e for e in known.LEDGER)
    monkeypatch.setattr(known, "LEDGER", wrong)
    finding = check(Case(model="dots1", grid=Grid(tp=2)), LEGACY)
    assert finding.verdict is Verdict.MISMATCH
    assert "expects another fault" in str(finding.reference)


def test_an_entry_whose_fault_is_gone_is_a_mismatch(monkeypatch):
    rotten = known.Known(system="legacy", models=("mixtral",), factors={"routed": "tp"}, reference="made up")
    monkeypatch.setattr(known, "LEDGER", (*known.LEDGER, rotten))
    finding = check(Case(model="mixtral", grid=Grid(tp=2)), LEGACY)
    assert finding.verdict is Verdict.MISMATCH
    assert "passes, but the ledger expects a fault" in finding.diagnosis


@pytest.mark.parametrize("seed", [100, 102, 104, 106, 107])
def test_a_known_fault_that_no_fit_can_read_is_known_by_its_prediction(seed):
    case = Case(model="nemotron_h", grid=Grid(tp=8), dtype="bf16", tokens=1, seed=seed)
    assert check(case, LEGACY).verdict is Verdict.KNOWN


def test_a_prediction_with_other_coefficients_explains_nothing(monkeypatch):
    wrong = tuple(replace(e, factors={"latent bias": "s"}) if e.models == ("nemotron_h",) else e for e in known.LEDGER)
    monkeypatch.setattr(known, "LEDGER", wrong)
    case = Case(model="nemotron_h", grid=Grid(tp=8), dtype="bf16", tokens=1, seed=100)
    assert check(case, LEGACY).verdict is Verdict.MISMATCH


# What the files did on grids: the formula that the finding shows, and a part of the reference.
ON_GRIDS = {
    "aria@tp2.ep4.dp2": ("y = R + tp*S", "#49122"),
    "aria@tp2.ep4.dp2+kernel=deepep_ht": ("y = R + tp*S", "#49122"),
    "aria@tp2.ep4.dp2+kernel=nvlink_one_sided": ("y = tp*R + tp*S", "#49378: the shared MLP of Aria reduces itself, the layer "
                                                 "reduces it again; and vLLM #41382"),
    "mixtral@tp2.ep4.dp2+kernel=nvlink_one_sided": ("y = tp*R instead of R", "#41382"),
    "gpt_oss@tp2.ep4.dp2+kernel=nvlink_one_sided": ("y = tp*R + tp*B", "#41382"),
    "glm4_moe@tp2.ep4.dp2+kernel=nvlink_two_sided": ("y = s*tp*R + S", "#41382"),
    "nemotron_h@tp2.dp2": ("y = s*R + S + tp*b + c", "fc2_latent"),
    "nemotron_h@tp2.ep4.dp2.fp16+kernel=nvlink_two_sided": ("y = tp*R + 1/s*S + tp*b + 1/s*c", "fc2_latent"),
    "nemotron_h@tp2.ep4.dp2.sp2.fp16+kernel=deepep_ll": ("y = R + 1/s*S + b + 1/s*c", "fp16 returns R + S/s"),
    "dots1@dp3.ep3": ("y = s*R + s*S", "(R + S) * s"),
    "dots1@tp2.ep4.dp2+kernel=deepep_ht": ("y = s*tp*R + s*S", "whatever the kernel had reduced"),
    "kimi_linear@tp2.ep4.dp2+kernel=deepep_ll": ("y = s*tp*R + S", "whatever the kernel had reduced"),
    "minimax_m2@tp4.ep8.dp2+kernel=deepep_ht": ("y = tp*R instead of R", "whatever the kernel had reduced"),
    "glm4_moe@tp2.ep4.dp2+kernel=deepep_ht": ("y = s*R + S_own", "shared_fused_moe.py"),
    "exaone_moe@tp4.ep8.dp2+kernel=deepep_ll": ("y = s*R + S_own", "at construction"),
    "qwen3_next@tp2.ep4.dp2.sp2": ("y = R + S_own", "#37856"),
    "afmoe@tp2.ep4.dp2+backend=transformers": ("y = s*R + tp*S", "MLPWithAllReduce"),
    "afmoe@tp2.ep4.dp2+kernel=nvlink_one_sided.backend=transformers": ("y = s*tp*R + tp*S", "MLPWithAllReduce"),
}  # fmt: skip


@pytest.mark.parametrize("tokens", ["", ".tokens1_0", ".tokens3_4"])
@pytest.mark.parametrize("text", ON_GRIDS)
def test_what_a_file_did_wrong_on_a_grid_is_known_with_its_formula(text, tokens):
    if ".dp3" in text or "@dp3" in text:
        tokens = {".tokens1_0": ".tokens1_0_0", ".tokens3_4": ".tokens3_4_0"}.get(tokens, "")
    where, plus, options = text.partition("+")
    finding = check(parse(f"{where}{tokens}{plus}{options}"), LEGACY)
    formula, reference = ON_GRIDS[text]
    assert finding.verdict is Verdict.KNOWN, finding.diagnosis
    assert formula in finding.diagnosis
    assert reference in finding.reference


@pytest.mark.parametrize(
    "text",
    [
        "jamba@tp2.ep4.dp2+kernel=nvlink_two_sided",  # rows in chunks: the layer's own reduction was left out
        "aria@tp2.ep4.dp2+kernel=nvlink_two_sided",
        "glm4_moe@ep3.dp3+kernel=nvlink_one_sided",  # one tp rank: nothing is summed twice
        "afmoe@tp2.ep4.dp2+kernel=deepep_ht.backend=transformers",
        "deepseek_v3@tp2.ep4.dp2.sp2+kernel=deepep_ll",
        "llama4@tp4.ep8.dp2.sp4",
        "gemma4@tp2.ep4.dp2+kernel=deepep_ht",
    ],
)
def test_files_that_did_it_right_on_a_grid_pass(text):
    finding = check(parse(text), LEGACY)
    assert finding.verdict is Verdict.OK, finding.diagnosis


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("deepseek_v3@tp2.ep4.dp2", "always sequence parallel"),
        ("deepseek_v3@tp2.ep2.sp2", "needed dp > 1"),
        ("glm4_moe@tp2.ep4.dp2.sp2", "knew no sequence parallelism"),
        ("glm4_moe@tp2.ep2+kernel=deepep_ht", "all-to-all needed"),
        ("glm4_moe@tp2+kernel=reduced", "no kernel but all-to-all"),
        ("glm4_moe@tp4.ep2", "no expert parallelism between 1 and tp * dp"),
        ("qwen3_next@tp5.ep10.dp2.sp5", "tp=5, which does not divide 48"),
    ],
)
def test_what_no_engine_of_the_time_did_is_not_applicable(text, reason):
    assert reason in LEGACY.supports(parse(text))


def test_whatever_the_files_did_on_any_grid_is_right_or_known():
    rng, found = random.Random(19), Counter()
    grids = [parse_grid(text) for text in ("tp2.ep2", "dp2", "tp2.dp2", "tp2.ep4.dp2", "dp3.ep3", "tp2.ep4.dp2.sp2")]
    while found.total() < 250:
        grid = rng.choice(grids)
        split = tuple(rng.choice((0, 1, 2, 5)) for _ in range(grid.dp))
        case = Case(
            model=rng.choice(models.names()), grid=grid, dtype=rng.choice(DTYPES), tokens=sum(split), split=split,
            kernel=rng.choice(KERNELS), backend=rng.choice(("model", "transformers")),
        )  # fmt: skip
        if LEGACY.supports(case) is None:
            finding = check(case, LEGACY)
            assert finding.verdict in (Verdict.OK, Verdict.KNOWN), f"{case}: {finding.diagnosis}"
            found[finding.verdict] += 1
    assert found[Verdict.KNOWN] > 50


@pytest.mark.parametrize(
    "text",
    [
        "ernie4_5_vl_moe@tp2.ep4.dp2.tokens1_5.seed369+kernel=deepep_ht",
        "qwen2_moe@tp3.ep6.dp2.tokens10.seed958+kernel=deepep_ll",
    ],
)
def test_a_prediction_is_held_to_the_rounding_of_right_layers_and_no_finer(text):
    """Roundings of its addends alone were too small a bound: one row in some thousand was past it."""
    assert check(parse(text), LEGACY).verdict is Verdict.KNOWN


def test_a_share_of_another_rank_is_not_what_the_ledger_foretells(monkeypatch):
    """qwen3_next cut S over tp: the ledger must not accept a layer that left the same share everywhere."""
    monkeypatch.setattr(known, "_own_share", lambda whole, rank, case, given: known.shares(given, 2)[1].value_MH)
    assert check(parse("qwen3_next@tp2.ep4.dp2.sp2"), LEGACY).verdict is Verdict.MISMATCH


class Worse(LegacySystem):
    """The old files, and one fault more that a case of 7 tokens never meets: all rows behind them come twice."""

    def __init__(self, factor: float = 2.0) -> None:
        self._factor = factor

    def build(self, case, weights, comm):
        layer = super().build(case, weights, comm)

        def wrong(hidden_states, **inputs):
            y_MH = layer(hidden_states, **inputs)
            return torch.cat([y_MH[:7], self._factor * y_MH[7:]])

        return wrong


# a fault of whole parts, and one that leaves each rank its own share
@pytest.mark.parametrize("text", ["dots1@tp4", "glm4_moe@tp2.ep4.dp2.tokens7_7+kernel=deepep_ht"])
def test_a_second_fault_that_the_probe_alone_sees_is_a_mismatch_beside_a_known_one(text):
    case = parse(text)
    assert check(case, LEGACY).verdict is Verdict.KNOWN
    assert check(case, Worse(), alone=True).verdict is Verdict.KNOWN
    finding = check(case, Worse())
    assert finding.verdict is Verdict.MISMATCH
    assert "size=labels" in finding.diagnosis
    assert "expects another fault" in str(finding.reference)
    assert check(case, Worse(1.0)).verdict is Verdict.KNOWN


def test_a_probe_that_reads_right_where_the_ledger_foretells_a_fault_is_a_mismatch(monkeypatch):
    rotten = known.Known(system="legacy", models=("mixtral",), factors={"routed": "tp"}, reference="made up")
    monkeypatch.setattr(known, "LEDGER", (*known.LEDGER, rotten))
    finding = check(parse("mixtral@tp2.tokens7+calls=many"), LegacySystem())
    assert finding.verdict is Verdict.MISMATCH


def test_every_entry_names_a_reference_and_models_that_exist():
    for entry in known.LEDGER:
        assert len(entry.reference) > 20
        assert set(entry.models or ()) | set(entry.unless) <= set(models.names())
        assert entry.factors or entry.own


def test_a_fault_on_rows_of_which_none_is_decided_is_read_without_a_crash():
    """Every token of some rank is a near tie here, so that there is nothing to fit."""
    case = parse("qwen3_next@tp4.ep8.dp2.sp4.bf16.seed488")
    assert check(case, LegacySystem()).verdict is Verdict.KNOWN
