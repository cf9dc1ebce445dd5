"""The ledger of known faults: wrong results that a system is expected to give, each with a public reference.

An entry claims coefficients. A case that is wrong in another way, or that has become right, is a mismatch: the ledger
may not rot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.algebra import law, symbol_values
from harness.case import DTYPES, Case
from harness.parts import parts
from harness.problem import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """coefficients: part -> symbol, for the parts that are wrong; the others are lawful.

    model: None for every model.    kernel: the fault shows with a kernel that returns partial sums, or reduced ones.
    """

    system: str
    model: str | None
    coefficients: dict[str, str]
    reference: str
    backend: str = "model"
    kernel: str = "partial"
    dtypes: tuple[str, ...] = DTYPES


LEDGER: tuple[Known, ...] = (
    Known(
        system="legacy",
        model="dots1",
        coefficients={"routed": "s", "shared": "s"},
        reference="vLLM 0.12.0 to 0.19.1, models/dots1.py computes (R + S) * s; right again with PR #35949",
    ),
    Known(
        system="legacy",
        model="aria",
        coefficients={"shared": "tp"},
        reference="vLLM #49122, #49366, #49378: the shared MLP of Aria reduces itself, the layer reduces it again",
    ),
    Known(
        system="legacy",
        model="nemotron_h",
        coefficients={"latent bias": "tp"},
        reference="vLLM 0.19.1, models/nemotron_h.py: fc2_latent runs on a rank's partial sum; early reduction since 0.27.0rc1",
        dtypes=("fp32", "bf16"),
    ),
    Known(
        system="legacy",
        model="nemotron_h",
        coefficients={"routed": "1", "shared": "1/s", "shared bias": "1/s", "latent bias": "tp"},
        reference="vLLM 0.19.1, models/nemotron_h.py: fp16 returns R + S/s and the decoder does not compensate",
        dtypes=("fp16",),
    ),
    Known(
        system="legacy",
        model="nemotron_h",
        kernel="reduced",
        coefficients={"routed": "1", "shared": "1/s", "shared bias": "1/s"},
        reference="vLLM 0.19.1, models/nemotron_h.py: fp16 returns R + S/s and the decoder does not compensate",
        dtypes=("fp16",),
    ),
    Known(
        system="legacy",
        model=None,
        backend="transformers",
        coefficients={"shared": "tp", "shared bias": "tp"},
        reference="vLLM before PR #35949, model_executor/models/transformers: MLPWithAllReduce sums S, which was reduced",
    ),
)


def expected(case: Case, system: str, given: Problem) -> Known | None:
    """The entry that foretells this case, unless its fault changes nothing here (tp = 1, no tokens, no such part)."""
    for entry in LEDGER:
        here = (system, case.model, case.backend, case.kernel)
        if (
            here != (entry.system, entry.model or case.model, entry.backend, entry.kernel)
            or case.dtype not in entry.dtypes
        ):
            continue
        if case.tokens > 0 and _wanted(entry, case, given) != _lawful(case, given):
            return entry
    return None


def agrees(entry: Known, coefficients: dict[str, str], case: Case, given: Problem) -> bool:
    """Whether a diagnosis read exactly the coefficients that the entry claims."""
    values = _values(case, given)
    read = {name: values.get(symbol) for name, symbol in coefficients.items()}
    return read == _wanted(entry, case, given)


def explains(entry: Known, outputs: Sequence[Tensor], case: Case, given: Problem) -> bool:
    """Whether every rank's output is what the entry foretells, within roundings of the addends that it foretells.

    For outputs that no fit can read: a part that counts tp times leaves tp times its roundings, and one token in bf16
    then determines nothing. outputs: [M, H] float64 for each rank, in units of y.
    """
    wanted = _wanted(entry, case, given)
    addends = [wanted[part.name] * part.value_MH * given.spec.output.share for part in parts(given)]
    foretold_MH = torch.stack(addends).sum(0)
    u = torch.finfo(given.dtype).eps / 2
    allowed_M = (case.grid.tp + 4) * u * torch.stack([addend.norm(dim=-1) for addend in addends]).sum(0)
    return all(bool(((output - foretold_MH).norm(dim=-1) <= allowed_M).all()) for output in outputs)


def told(entry: Known) -> str:
    """The entry's claim as a sentence."""
    claims = ", ".join(f"{name} x {symbol}" for name, symbol in entry.coefficients.items())
    return f"as the ledger of known faults foretells: {claims}; no fit can read it off so few tokens"


def _values(case: Case, given: Problem) -> dict[str, float]:
    tp, s = case.grid.tp, given.spec.scale
    return {
        **symbol_values(s, {"tp": tp} if tp > 1 else {}),
        "tp": float(tp),
        "s": s,
        "s^2": s * s,
        "1/s": 1 / s,
        "s*tp": s * tp,
    }


def _lawful(case: Case, given: Problem) -> dict[str, float]:
    values = _values(case, given)
    return {name: values[symbol] for name, symbol in law(given).items()}


def _wanted(entry: Known, case: Case, given: Problem) -> dict[str, float]:
    values, lawful = _values(case, given), _lawful(case, given)
    return {name: values[entry.coefficients[name]] if name in entry.coefficients else lawful[name] for name in lawful}
