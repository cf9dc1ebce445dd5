"""What a model does around the layer: its own rows under sequence parallelism, a reduction that the layer left to it.

M tokens of the data-parallel rank, m of them on this rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from harness.comm import Communicator


def sequence_parallel_chunk(rows: Tensor, comm: Communicator) -> Tensor:
    """This tp rank's ceil(M / tp) of the rows, of which those beyond M are zeros. Source: `models/utils.py` of vLLM."""
    share = -(-rows.shape[0] // comm.tp.size)
    padding = share * comm.tp.size - rows.shape[0]
    if padding:
        rows = functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, padding))
    return rows[comm.tp.rank * share : (comm.tp.rank + 1) * share]


def in_sequence_parallel(layer: Callable[..., Tensor], comm: Communicator, x_MH: Tensor, **inputs: Tensor) -> Tensor:
    """The layer on this rank's rows, and all ranks' rows gathered: [M, H] -> [M, H], replicated over tp."""
    chunks = {name: sequence_parallel_chunk(rows, comm) for name, rows in inputs.items()}
    y_mH = layer(sequence_parallel_chunk(x_MH, comm), **chunks)
    return comm.tp.all_gather(y_mH)[: x_MH.shape[0]]


def with_junk_rows(x_MH: Tensor, count: int) -> Tensor:
    """The rows of a padded batch: those beyond M hold what nobody wrote, here NaN."""
    return torch.cat([x_MH, x_MH.new_full((count, x_MH.shape[1]), torch.nan)])
