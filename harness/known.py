"""The ledger of known faults: wrong results that a system is expected to give, each with a public reference.

An entry claims by what a part is multiplied, or that each rank keeps its own share of it. Several may meet in one case.
A case that is wrong in another way, or that has become right, is a mismatch: the ledger may not rot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.algebra import Reading, formula, law, symbol_values
from harness.case import DTYPES, KERNELS, Case
from harness.compare import RUN_LIMIT, near_ties
from harness.layout import Layout
from harness.parts import Part, parts, shares
from harness.problem import Problem, ways
from reference.spec import RouterPrecision

NVLINK = ("nvlink_one_sided", "nvlink_two_sided")
DEEPEP = ("deepep_ht", "deepep_ll")
# Files in which the fused layer made the final reduction, which it left out where it passed rows on in chunks.
IN_LAYER = ("aria", "gemma4", "gpt_oss", "granitemoehybrid", "jamba", "mixtral", "olmoe", "phimoe")
# Files that reduced R + S unless the kernel had reduced R, and that left S a partial sum then.
LEFT_PARTIAL = (
    "afmoe", "ernie4_5_moe", "ernie4_5_vl_moe", "glm4_moe", "glm4_moe_lite", "qwen2_moe", "sarvam_moe", "step3p5",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """One fault and where it shows.

    models: None for all, but for those that are named in `unless`.    sequence_parallel: None for both.
    factors: part -> what its lawful coefficient is multiplied by: "s", "1/s" or "tp".
    own: parts of which a rank's output has that tp rank's share alone.
    """

    system: str
    models: tuple[str, ...] | None
    reference: str
    factors: Mapping[str, str] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("model",)
    kernels: tuple[str, ...] = KERNELS
    dtypes: tuple[str, ...] = DTYPES
    sequence_parallel: bool | None = None

    def covers(self, case: Case) -> bool:
        """Whether the fault is in the system's layer, be it that nothing shows it there."""
        named = case.model not in self.unless if self.models is None else case.model in self.models
        rows = self.sequence_parallel in (None, case.grid.sp > 1)
        where = case.backend in self.backends and case.kernel in self.kernels and case.dtype in self.dtypes
        return named and rows and where


_FC2 = "vLLM 0.19.1, models/nemotron_h.py: fc2_latent runs on a rank's partial sum; early reduction since 0.27.0rc1"
_NVLINK = "vLLM #41382: NVLink kernels return complete sums and say that they do not"
_PARTIAL = "fused_moe/shared_fused_moe.py reduces S beside a kernel that reduced R only if reduce_results=True"

LEDGER: tuple[Known, ...] = (
    Known(
        system="legacy",
        models=("dots1",),
        factors={"shared": "s"},
        reference="vLLM 0.12.0 to 0.19.1, models/dots1.py computes (R + S) * s; right again with PR #35949",
    ),
    Known(
        system="legacy",
        models=("aria",),
        kernels=("partial", *DEEPEP, "nvlink_one_sided"),
        factors={"shared": "tp"},
        reference="vLLM #49122, #49366, #49378: the shared MLP of Aria reduces itself, the layer reduces it again",
    ),
    Known(
        system="legacy",
        models=("nemotron_h",),
        kernels=("partial", *NVLINK),
        sequence_parallel=False,
        factors={"latent bias": "tp"},
        reference=_FC2,
    ),
    Known(
        system="legacy",
        models=("nemotron_h",),
        dtypes=("fp16",),
        factors={"routed": "1/s", "shared": "1/s", "shared bias": "1/s"},
        reference="vLLM 0.19.1, models/nemotron_h.py: fp16 returns R + S/s and the decoder does not compensate",
    ),
    Known(
        system="legacy",
        models=None,
        backends=("transformers",),
        kernels=("partial", *NVLINK),
        factors={"shared": "tp", "shared bias": "tp"},
        reference="vLLM before PR #35949, model_executor/models/transformers: MLPWithAllReduce sums S, which was reduced",
    ),
    Known(
        system="legacy",
        models=None,
        backends=("model", "transformers"),
        kernels=("nvlink_one_sided",),
        factors={"routed": "tp", "expert bias": "tp"},
        reference=_NVLINK,
    ),
    Known(
        system="legacy",
        models=None,
        unless=IN_LAYER,
        kernels=("nvlink_two_sided",),
        factors={"routed": "tp", "expert bias": "tp"},
        reference=_NVLINK,
    ),
    Known(
        system="legacy",
        models=None,
        backends=("transformers",),
        kernels=("nvlink_two_sided",),
        factors={"routed": "tp", "expert bias": "tp"},
        reference=_NVLINK,
    ),
    Known(
        system="legacy",
        models=("dots1", "kimi_linear", "minimax_m2"),
        kernels=DEEPEP,
        factors={"routed": "tp"},
        reference="vLLM 0.19.1, models/dots1.py, kimi_linear.py, minimax_m2.py: one all-reduce, whatever the kernel had reduced",
    ),
    Known(
        system="legacy",
        models=LEFT_PARTIAL,
        kernels=DEEPEP,
        own=("shared",),
        reference=f"vLLM 0.19.1, {_PARTIAL}, and the model's file passes False",
    ),
    Known(
        system="legacy",
        models=("exaone_moe",),
        kernels=DEEPEP,
        own=("shared",),
        reference="vLLM 0.19.1, models/exaone_moe.py asks whether to reduce S at construction, before there is a kernel",
    ),
    Known(
        system="legacy",
        models=("qwen3_next",),
        sequence_parallel=True,
        own=("shared",),
        reference="vLLM #37856: the shared MLP is cut over tp although each tp rank has rows of its own",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Foretold:
    """All entries that meet in a case.    symbols, lawful: each part's factor by name.    own: as in `Known`."""

    entries: tuple[Known, ...]
    symbols: dict[str, str]
    lawful: dict[str, str]
    own: frozenset[str]

    @property
    def reference(self) -> str:
        return "; and ".join(dict.fromkeys(entry.reference for entry in self.entries))


def expected(case: Case, system: str, given: Problem) -> Foretold | None:
    """What the ledger foretells; None without an entry, or where it changes nothing (tp = 1, no tokens, no such part)."""
    here = [entry for entry in LEDGER if entry.system == system and entry.covers(case)]
    if case.tokens == 0 or not here:
        return None
    numbers, lawful = _numbers(case, given), law(given)
    wanted, own, entries = {name: numbers[symbol] for name, symbol in lawful.items()}, set[str](), []
    for entry in here:
        factors = {name: numbers[symbol] for name, symbol in entry.factors.items() if name in lawful}
        kept = {name for name in entry.own if name in lawful and case.grid.tp > 1}
        if kept or any(factor != 1.0 for factor in factors.values()):
            entries.append(entry)
            own |= kept
            wanted |= {name: wanted[name] * factor for name, factor in factors.items()}
    if not entries:
        return None
    symbols = {name: next(n for n, other in numbers.items() if math.isclose(other, wanted[name])) for name in wanted}
    return Foretold(tuple(entries), symbols, lawful, frozenset(own))


def agrees(foretold: Foretold, coefficients: Mapping[str, str], case: Case, given: Problem) -> bool:
    """Whether a diagnosis read exactly the coefficients that the ledger claims, the same on all ranks."""
    numbers = _numbers(case, given)
    if foretold.own or coefficients.keys() != foretold.symbols.keys():
        return False
    return all(
        math.isclose(numbers.get(symbol, math.nan), numbers[foretold.symbols[name]])
        for name, symbol in coefficients.items()
    )


def explains(foretold: Foretold, outputs: Sequence[Tensor], case: Case, given: Problem) -> bool:
    """Whether every rank's output is what the ledger foretells, as near as the row rule asks it of a right one.

    For outputs that no fit reads as one formula of whole parts: each rank has its own share; or a part that counts tp
    times leaves tp times its roundings, and one token in bf16 determines nothing. Near ties take no part, as in a fit.
    outputs: [M, H] float64 for each rank, in units of y.
    """
    numbers, u = _numbers(case, given), torch.finfo(given.dtype).eps / 2
    precision = RouterPrecision(logits=given.spec.routing.precision.logits, scores="fp32", weights="fp32")
    growth = max(abs(numbers[symbol] / numbers[foretold.lawful[name]]) for name, symbol in foretold.symbols.items())
    naive_M = max(1.0, growth) * given.naive_error(ways(given.spec, case.grid), precision)
    decided_M = ~near_ties(given, precision)
    if not bool(decided_M.any()):
        decided_M = torch.ones_like(decided_M)
    for rank, (output, rows) in enumerate(zip(outputs, case.rows, strict=True)):
        addends = [
            given.spec.output.share
            * numbers[foretold.symbols[part.name]]
            * (_own_share(part, rank, case, given) if part.name in foretold.own else part.value_MH)[rows]
            for part in parts(given)
        ]
        rounding_m = (case.grid.ranks + 4) * u * torch.stack([addend.norm(dim=-1) for addend in addends]).sum(0)
        miss_m = (output[rows] - torch.stack(addends).sum(0)).norm(dim=-1)
        if bool(((miss_m > rounding_m) & (miss_m > RUN_LIMIT * naive_M[rows]) & decided_M[rows]).any()):
            return False
    return True


def told(foretold: Foretold) -> str:
    """The claim as a sentence."""
    claim = formula(Reading(foretold.symbols, foretold.own, {}))
    lawful = formula(Reading(foretold.lawful, frozenset(), {}))
    return f"y = {claim} instead of {lawful}, within rounding what the ledger of known faults foretells"


def _own_share(whole: Part, rank: int, case: Case, given: Problem) -> Tensor:
    """[M, H]: the share of a tp rank, which under sequence parallelism stands in the rows that this rank computed."""
    tp, rows = case.grid.tp, case.rows[rank]
    cut = {part.shard: part.value_MH for part in shares(given, tp) if part.name == whole.name}
    if case.grid.sp == 1:
        return cut.get(rank % tp, torch.zeros_like(whole.value_MH))
    own_MH, count = torch.zeros_like(whole.value_MH), rows.stop - rows.start
    for shard, value_MH in cut.items():
        assert shard is not None  # parts that every rank holds whole are nobody's own
        held = slice(rows.start + shard * -(-count // tp), min(rows.start + (shard + 1) * -(-count // tp), rows.stop))
        own_MH[held] = value_MH[held]
    return own_MH


def _numbers(case: Case, given: Problem) -> dict[str, float]:
    """Every factor that a fit may read or an entry may claim, by name, the plainest first."""
    tp, s = float(case.grid.tp), given.spec.scale
    return symbol_values(s, Layout(case.grid, None).sizes) | {"tp": tp, "s": s, "1/s": 1 / s}
