"""What every state has to give: the coefficient of each source on each rank, and the collectives, in order.

Written from the law y = s * R + S + Z and the tables of who reduces what; asks no plan and no kernel.
"""

from __future__ import annotations

import functools
import struct

from harness.case import Grid, parse_grid
from harness.certify.states import S, State, batches_of

# for each rank the coefficients of: the token (zero experts), the routed shard of each rank, the expert bias as each
# rank may add it, the shared shard of each rank, the bias of the output transform
Coefficients = tuple[tuple[float, ...], ...]
Ledger = tuple[tuple[str, str], ...]


def coefficients(state: State) -> Coefficients:
    """In the unit of the call: y, or y/s of the fp16 layer with shared experts that was asked to scale at its output."""
    layer, call = state
    apart = layer.shared in ("sharded", "gated")
    in_units = call.dtype == "fp16" and layer.scaling == "output" and apart
    scaled = not layer.scaling.startswith("absent")
    return _coefficients(
        layer.grid, scaled, in_units, layer.shared.replace("gated", "sharded"), layer.latent == "bias",
        layer.zero == "yes", layer.share, call.dtype,
    )  # fmt: skip


@functools.cache
def _coefficients(
    grid: str, scaled: bool, in_units: bool, shared: str, bias: bool, zero: bool, share: str, dtype: str
) -> Coefficients:
    sizes, s, half = parse_grid(grid), S if scaled else 1.0, float(share)
    unit = _in(dtype, 1 / s) if in_units else 1.0
    routed = 1.0 if in_units else s
    ranks = range(sizes.ranks)
    kept = [routed if rank % sizes.moe_tp == 0 else 0.0 for rank in ranks]  # one of those that cut an expert has its b2
    rows = []
    for rank in ranks:
        seen = [unit if _holds_shared(sizes, shared, rank, other) else 0.0 for other in ranks]
        row = [s if zero else 0.0, *[routed] * sizes.ranks, *kept, *seen, unit if bias else 0.0]
        rows.append(tuple(value * half for value in row))
    return tuple(rows)


def _holds_shared(sizes: Grid, shared: str, rank: int, other: int) -> bool:
    """Whether what `other` computes of the shared experts belongs into the output of `rank`."""
    if shared == "none":
        return False
    if shared == "fused":
        return True  # cut over all ranks, as the routed experts are
    if sizes.sp > 1:
        return rank == other  # whole on every rank, for rows of its own
    return rank // sizes.tp == other // sizes.tp


def _in(dtype: str, value: float) -> float:
    """Rounded to the dtype."""
    code = {"fp32": "f", "fp16": "e"}[dtype]
    rounded: float = struct.unpack(code, struct.pack(code, value))[0]
    return rounded


def ledger(state: State) -> Ledger:
    """Of every rank, since all of them take the same way."""
    layer, call = state
    apart = layer.shared in ("sharded", "gated")
    return ledger_of(layer.grid, layer.experts, call.kernel, apart, layer.latent == "bias", batches_of(call.history))


@functools.cache
def ledger_of(grid: str, experts: str, kernel: str, apart: bool, bias: bool, batches: int) -> Ledger:
    """apart: with shared experts beside the kernel.    bias: of the output transform."""
    sizes = parse_grid(grid)
    announced = _transport(sizes, kernel, experts == "monolithic")
    if sizes.sp > 1 or sizes.ranks == 1:
        return announced * batches  # rows of its own on every rank, or one rank with everything
    complete = kernel != "partial" or bias  # before S is added, by the kernel or because the bias comes next
    early = (kernel == "partial" and bias) + (apart and complete)
    reductions = early if complete else 1  # the last one by the layer, or by its caller
    return announced * batches + (("all_reduce", "tp"),) * reductions * batches


@functools.cache
def _transport(sizes: Grid, kernel: str, monolithic: bool) -> Ledger:
    """The kernel's own collectives: dispatch, then combine."""
    exchange, gather = ("all_to_all_single", "ep"), ("all_gather", "ep")
    if kernel not in ("partial", "reduced"):
        return {
            "deepep_ht": (exchange,) * 4,
            "deepep_ll": (exchange,) * 3,
            "nvlink_one_sided": (gather, *(exchange,) * 4),
            "nvlink_two_sided": (*(gather,) * 3, *(exchange,) * 2),
        }[kernel]
    group = "ep" if sizes.sp > 1 else "dp"
    naive: Ledger = ()
    if sizes.dp > 1 or sizes.sp > 1:  # sizes of all ranks, then rows and logits, or rows, weights and ids
        naive = (("all_gather", group),) * (3 if monolithic else 4) + (("reduce_scatter", group),)
    return naive if kernel == "partial" or sizes.sp > 1 else (*naive, ("all_reduce", "tp"))
