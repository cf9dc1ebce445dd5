"""The numbers: tokens, weights that write where they come from, and the law of what comes home.

m rows of a rank, H hidden, E experts, K chosen, p ranks that cut an expert. Columns of H: the token itself, then a column
for each expert and each piece of it, then one for each piece of the shared experts. Expert e squares column 0 and writes
the square into its own columns; all products are exact.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import parse_grid
from harness.certify.dispatch.axes import JUNK, Layer, State, chosen_of, experts_of, spec_of
from harness.certify.law import Ledger, ledger_of
from harness.certify.states import batches_of
from harness.runner.router import FusedMoERouter, SharedSlotsRouter, ZeroExpertRouter
from reference.spec import weight_shapes

# rows of the first ranks that have rows of their own, again and again; 8 where all have the same
COUNTS = (6, 3, 0, 1)

# for each rank and each of its rows the coefficients of its columns: of the token in column 0, else of its square
Rows = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """A router to which the logits tell the choice: the largest are chosen, and they are the weights. Routers are
    certified apart.
    """

    top_k: int
    scales: bool = True

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        weights_MK, ids_MK = router_logits_ME.topk(self.top_k, -1)
        return weights_MK, ids_MK


def told_by_logits(router: FusedMoERouter, top_k: int) -> FusedMoERouter:
    """The same parts around a router that is told."""
    match router:
        case ZeroExpertRouter():
            return ZeroExpertRouter(told_by_logits(router.inner, top_k), router.num_experts)
        case SharedSlotsRouter():
            return SharedSlotsRouter(told_by_logits(router.inner, top_k), router.first, router.count, router.weight)
        case _:
            return Told(top_k)


@functools.cache
def places(grid: str) -> tuple[tuple[int, ...], ...]:
    """For each rank which of all rows it has: those of its own, or of its data-parallel rank."""
    sizes = parse_grid(grid)
    groups = sizes.ranks if sizes.sp > 1 else sizes.dp
    counts = [COUNTS[group % len(COUNTS)] for group in range(groups)] if groups > 1 else [8]
    starts = list(itertools.accumulate(counts, initial=0))
    rows = [tuple(range(start, stop)) for start, stop in itertools.pairwise(starts)]
    return tuple(rows[rank if sizes.sp > 1 else rank // sizes.tp] for rank in range(sizes.ranks))


def choice(grid: str, row: int) -> dict[int, int]:
    """Expert -> weight: odd numbers, and tokens are powers of two, so that no row's product is another's.

    Neighbours choose alike: replicas of an expert take turns by row, and one gets the first, another the second.
    """
    count, chosen = experts_of(grid), chosen_of(grid)
    return {(row // 2 + k * count // chosen) % count: _weight(row, k) for k in range(chosen)}


def _weight(row: int, slot: int) -> int:
    return 2 * ((row + 2 * slot) % 4) + 1


@functools.cache
def tokens(grid: str, rank: int, junk: bool) -> Tensor:
    """[m, H]: 2**row in column 0; NaN in rows of nobody."""
    rows = places(grid)[rank]
    x_mH = torch.zeros(len(rows), spec_of(Layer(grid, "auto", "none", "linear")).hidden_size)
    x_mH[:, 0] = torch.tensor([2.0**row for row in rows])
    return _with_junk(x_mH) if junk else x_mH


@functools.cache
def logits(grid: str, zero: bool, rank: int, junk: bool) -> Tensor:
    """[m, E]: what `Told` reads. zero: with a zero expert behind the others."""
    rows = places(grid)[rank]
    logits_mE = torch.full((len(rows), experts_of(grid) + zero), -1.0)
    for place, row in enumerate(rows):
        for expert, weight in choice(grid, row).items():
            logits_mE[place, expert] = weight
    if zero:
        logits_mE[:, -1] = torch.tensor([float(_weight(row, chosen_of(grid))) for row in rows])
    return _with_junk(logits_mE) if junk else logits_mE


def _with_junk(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_full((JUNK, rows.shape[1]), torch.nan)])


@functools.cache
def weights_of(grid: str, beside: str) -> dict[str, Tensor]:
    """What the real layer is built from, and cuts."""
    spec = spec_of(Layer(grid, "auto", beside, "linear"))
    weights = {name: torch.zeros(shape) for name, shape in weight_shapes(spec).items()}
    count, pieces = spec.routing.num_experts, spec.experts.intermediate_size
    weights["w13"][:, :, 0] = 1.0
    expert, piece = torch.arange(count)[:, None], torch.arange(pieces)[None]
    weights["w2"][expert, 1 + expert * pieces + piece, piece] = 1.0
    if spec.shared is not None:
        weights["shared_w13"][:, 0] = 1.0
        each = torch.arange(spec.shared.intermediate_size)
        weights["shared_w2"][1 + count * pieces + each, each] = 1.0
    return weights


def coefficients(state: State) -> Rows:
    """What the law demands of each rank's rows: the same whatever the kernel, the placement and the calls before."""
    return _coefficients(state[0].grid, state[0].beside)


@functools.cache
def _coefficients(grid: str, beside: str) -> Rows:
    sizes = parse_grid(grid)
    shared = [1.0 if beside in ("shared", "fused") else 0.0] * sizes.ranks
    ranks = []
    for rows in places(grid):
        found = []
        for row in rows:
            weights, zero = choice(grid, row), float(_weight(row, chosen_of(grid)))
            experts = [float(weights.get(expert, 0)) for expert in range(experts_of(grid)) for _ in range(sizes.moe_tp)]
            found.append((zero if beside == "zero" else 0.0, *experts, *shared))
        ranks.append(tuple(found))
    return tuple(ranks)


def ledger(state: State) -> Ledger:
    """Of every rank."""
    layer, call = state
    return ledger_of(layer.grid, layer.experts, call.kernel, layer.beside == "shared", False, batches_of(call.history))


@functools.cache
def outputs(grid: str, beside: str) -> tuple[Tensor, ...]:
    """[m, H] of each rank, to the bit."""
    hidden = spec_of(Layer(grid, "auto", "none", "linear")).hidden_size
    found = []
    for rank, rows in enumerate(_coefficients(grid, beside)):
        y_mH, x_m1 = torch.tensor(rows).reshape(len(rows), hidden), tokens(grid, rank, False)[:, :1]
        found.append(torch.cat([y_mH[:, :1] * x_m1, y_mH[:, 1:] * x_m1.square()], 1))
    return tuple(found)


def read(grid: str, outputs_R: tuple[Tensor, ...]) -> Rows:
    """The coefficients that outputs show. Raises ValueError for another shape than a rank's rows have."""
    ranks = []
    for rank, y_mH in enumerate(outputs_R):
        x_mH = tokens(grid, rank, False)
        if y_mH.shape != x_mH.shape:
            raise ValueError(f"rank {rank}: output {list(y_mH.shape)}, expected {list(x_mH.shape)}")
        x_m1 = x_mH[:, :1].double()
        seen_mH = torch.cat([y_mH[:, :1].double() / x_m1, y_mH[:, 1:].double() / x_m1.square()], 1)
        ranks.append(tuple(map(tuple, seen_mH.tolist())))
    return tuple(ranks)
