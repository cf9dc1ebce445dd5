"""Public bugs of MoE layers: each is of a family that the bank plants, or there is a reason why no layer here shows it.

Threads of bug trackers were read, not reproduced; some are remarks of a review, or reports that nobody confirmed.
corpus.jsonl has one a line, told in our words.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files

# Letter and number as in docs/faults.md. R routed sum, S shared experts' output, s routed scaling factor.
FAMILIES = {
    "A1": "s is applied twice",
    "A2": "s is applied by nobody",
    "A3": "s multiplies S, or a bias, too",
    "A4": "s is applied with renormalisation alone, or without it alone",
    "A5": "the form R + S/s leaves the layer undeclared",
    "A6": "an absent s is read as 0",
    "B1": "partial sums are returned",
    "B2": "reduced twice",
    "B3": "S reduces itself, and is summed again",
    "B4": "a replicated S is added ahead of the sum",
    "B5": "S stays partial",
    "B6": "an all-reduce, then a reduce-scatter",
    "B7": "scattered, not reduced and scattered",
    "B8": "the sum meets part of the ranks",
    "B9": "who reduces is decided once, and the calls differ",
    "B10": "a bias, or the input, is added on every rank",
    "B11": "results are combined into the wrong tokens",
    "B12": "gather and scatter do not mirror each other",
    "B13": "ranks are averaged",
    "B14": "a rank's own share is added once more",
    "B15": "rows of different tokens are summed",
    "C1": "S reads a buffer that R is written to",
    "C2": "S reads the dispatched tokens",
    "C3": "a norm ahead of the sum over ranks",
    "C4": "a biased projection ahead of the sum over ranks",
    "C5": "padded columns are cut at the wrong place",
    "D1": "the correction bias in the weights",
    "D2": "the correction bias lost",
    "D3": "the correction bias in low precision",
    "D4": "the correction bias subtracted again",
    "D5": "dropped groups are not out of the choice",
    "D6": "renormalised against the model, or not although it asks",
    "D7": "logits as weights",
    "D8": "the wrong scoring function",
    "D9": "logits or weights rounded, or read in another dtype",
    "D10": "the weight on the wrong side of the expert, or on both",
    "D11": "weights unused",
    "D12": "scores underflow or overflow",
    "D13": "an expert too few, too many or passed over",
    "D14": "identity experts: a real one beside it, or columns missing",
    "D15": "weights and ids paired wrongly",
    "E1": "the gate of the shared experts lost",
    "E2": "a shared slot weighs 1/s",
    "E3": "S lost",
    "E4": "S added twice",
    "E5": "the clamp of the shared experts lost",
    "E6": "shared experts of the latent width",
    "F1": "gate and up exchanged",
    "F2": "w13 read in the other layout",
    "F3": "clamp, slope or offset of the routed experts lost",
    "F4": "the second bias not weighted",
    "F5": "biases dropped",
    "F6": "the wrong activation",
    "F7": "ids, map and weights of experts disagree",
    "F8": "a slot or a piece not loaded",
    "F9": "another rank's share of a weight",
    "G1": "the id -1 reaches an expert",
    "G2": "slots that nobody wrote are added",
    "G3": "empty blocks go to expert 0",
    "G4": "rows of padding are not zero",
    "G5": "NaN of padding reaches real rows",
    "G6": "NaN or infinite scores choose one expert again and again",
    "G7": "no tokens at all",
    "G8": "offsets that are too short for what they address",
    "G9": "token lists wrong for some numbers of tokens",
    "P1": "a part rounded to a shorter dtype on its way",
}

REASONS = {
    "equal": "a control: the formulas agree, or differ as rounding does",
    "question": "a question, or a remark on documentation: nothing is wrong",
    "unclear": "the thread does not tell what was wrong",
    "crash": "it raises at load or at a call with the right shapes; there is no wrong number",
    "training": "gradients, losses or statistics of training",
    "size": "shows beyond 2^31 elements, tens of gigabytes; the bank has its arithmetic on shorter integers (G8)",
    "quantised": "block scales or alignments of 4- and 8-bit formats",
    "adapter": "LoRA adapters, which the layer does not have",
    "layers": "shows in the residual stream or in another layer",
    "race": "depends on timing between streams or threads",
    "kernel": "one tile of one kernel on its own device",
    "outside": "a loader, a script or the engine round the layer",
}

# Families without a fault in the bank, and why.
NOT_PLANTED: dict[str, str] = {
    "C3": "no page has a norm behind its latent projection, and the law has no place for one",
    "D14": "no page has identity experts; on a page patched to have them the tests show it",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Thread:
    """One public bug. Either family (of FAMILIES) or reason (of REASONS) is None.

    ref: "owner/repository#number", or None for a lead without a thread.    stage: where in the layer.
    wrong: what went wrong, in a sentence.
    """

    id: str
    ref: str | None
    stage: str
    family: str | None
    reason: str | None
    wrong: str

    @property
    def group(self) -> str:
        """The family, or the reason."""
        return self.family or self.reason or ""

    def as_dict(self) -> dict[str, str | None]:
        """As a line of corpus.jsonl."""
        return {
            "id": self.id, "ref": self.ref, "class": self.stage, "family": self.family, "reason": self.reason,
            "wrong": self.wrong,
        }  # fmt: skip


@functools.cache
def threads() -> tuple[Thread, ...]:
    """All of them, in the order of the file."""
    lines = (files("harness.faults") / "corpus.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return tuple(Thread(stage=entry.pop("class"), **entry) for entry in entries)
