"""The ledger of known faults: exact, referenced, and unable to rot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import known, models
from harness.case import Case, Grid
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
    wrong = tuple(replace(e, coefficients={"shared": "tp"}) if e.model == "dots1" else e for e in known.LEDGER)
    monkeypatch.setattr(known, "LEDGER", wrong)
    finding = check(Case(model="dots1", grid=Grid(tp=2)), LEGACY)
    assert finding.verdict is Verdict.MISMATCH
    assert "expects another fault" in str(finding.reference)


def test_an_entry_whose_fault_is_gone_is_a_mismatch(monkeypatch):
    rotten = known.Known(system="legacy", model="mixtral", coefficients={"routed": "tp"}, reference="made up")
    monkeypatch.setattr(known, "LEDGER", (*known.LEDGER, rotten))
    finding = check(Case(model="mixtral", grid=Grid(tp=2)), LEGACY)
    assert finding.verdict is Verdict.MISMATCH
    assert "passes, but the ledger expects a fault" in finding.diagnosis


@pytest.mark.parametrize("seed", [100, 102, 104, 106, 107])
def test_a_known_fault_that_no_fit_can_read_is_known_by_its_prediction(seed):
    case = Case(model="nemotron_h", grid=Grid(tp=8), dtype="bf16", tokens=1, seed=seed)
    assert check(case, LEGACY).verdict is Verdict.KNOWN


def test_a_prediction_with_other_coefficients_explains_nothing(monkeypatch):
    wrong = tuple(replace(e, coefficients={"latent bias": "s"}) if e.model == "nemotron_h" else e for e in known.LEDGER)
    monkeypatch.setattr(known, "LEDGER", wrong)
    case = Case(model="nemotron_h", grid=Grid(tp=8), dtype="bf16", tokens=1, seed=100)
    assert check(case, LEGACY).verdict is Verdict.MISMATCH


def test_every_entry_names_a_reference_and_a_model_that_exists():
    for entry in known.LEDGER:
        assert len(entry.reference) > 20
        assert entry.model is None or entry.model in models.names()
