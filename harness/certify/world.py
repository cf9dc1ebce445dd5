"""Labels in place of experts: every source owns a column, so that an output row is the list of its coefficients.

n ranks, H hidden, L latent, P kernel width. Columns of H as `law.Coefficients` has them; the first 1 + 2n are those of L.
A token is a power of two in column 0, another on each rank that has tokens of its own: whatever was computed of it is a
multiple of that label, in every dtype.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Grid, parse_grid
from harness.certify.law import Coefficients
from harness.certify.states import LayerState, hidden_of, latent_of, spec_of
from reference.spec import weight_shapes

LATENT_LABEL = 4.0  # the input transform multiplies the token by it, so that an untransformed one is seen
LATER = 2.0**-8  # of the second micro-batch, so that an exchanged output is seen
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """The columns of one grid: where its ranks' tokens and sources are."""

    sizes: Grid

    @property
    def hidden(self) -> int:
        return hidden_of(self.sizes.ranks)

    def token(self, rank: int) -> float:
        """1, 2, 4: the same on the tp ranks of a group, unless they take different rows."""
        return 2.0 ** (rank if self.sizes.sp > 1 else rank // self.sizes.tp)

    def tokens(self, dtype: torch.dtype) -> Tensor:
        """[n, H]: one row of every rank."""
        x_nH = torch.zeros(self.sizes.ranks, self.hidden, dtype=dtype)
        x_nH[:, 0] = torch.tensor([self.token(rank) for rank in range(self.sizes.ranks)])
        return x_nH

    def output(self, given: Coefficients, x_nH: Tensor) -> Tensor:
        """[n, H]: what all ranks return for these tokens, to the bit."""
        y_nH = torch.tensor(given, dtype=torch.float64)
        y_nH[:, :-1] *= x_nH[:, :1]
        return y_nH.to(x_nH.dtype)

    def read(self, y_nH: Tensor, x_nH: Tensor) -> Coefficients:
        """The coefficients that an output shows."""
        seen_nH = y_nH.double()
        seen_nH[:, :-1] /= x_nH[:, :1].double()
        return tuple(map(tuple, seen_nH.tolist()))


@functools.cache
def world(grid: str) -> World:
    return World(parse_grid(grid))


def weights_of(layer: LayerState) -> dict[str, Tensor]:
    """What the real layer is built from. The transforms count; of the experts only who keeps b2 is looked at."""
    return _weights(layer._replace(experts="", order="", reduce="", pad="", share="1"))


@functools.cache
def _weights(layer: LayerState) -> dict[str, Tensor]:
    ranks = world(layer.grid).sizes.ranks
    weights = {name: torch.zeros(shape) for name, shape in weight_shapes(spec_of(layer)).items()}
    if "b2" in weights:
        weights["b2"].fill_(1.0)
    return weights | {name: tensor for name, tensor in _transforms(ranks).items() if name in weights}


@functools.cache
def _transforms(ranks: int) -> dict[str, Tensor]:
    """The same tensors for all layers of a size, so that layers with the same parts are seen to have the same parts."""
    latent, hidden = latent_of(ranks), hidden_of(ranks)
    into, out, bias = torch.zeros(latent, hidden), torch.zeros(hidden, latent), torch.zeros(hidden)
    into[0, 0], bias[-1] = LATENT_LABEL, 1.0
    source = torch.arange(1, latent)
    out[source, source] = 1.0
    return {"fc1_latent": into, "fc1_latent_bias": torch.zeros(latent), "fc2_latent": out, "fc2_latent_bias": bias}


def logits_of(layer: LayerState) -> Tensor:
    """[1, E] so large that a sigmoid is 1."""
    return _saturated(spec_of(layer).routing.num_logits)


@functools.cache
def _saturated(count: int) -> Tensor:
    return torch.full((1, count), 64.0)


def seats(ranks: int) -> tuple[slice, slice, slice]:
    """The columns of routed shards, of expert biases and of shared shards, one for each rank."""
    return slice(1, 1 + ranks), slice(1 + ranks, 1 + 2 * ranks), slice(1 + 2 * ranks, 1 + 3 * ranks)


def junk(rows: Tensor, pad: int) -> Tensor:
    """pad more columns, of NaN: no number may come from them."""
    return torch.cat([rows, rows.new_full((*rows.shape[:-1], pad), torch.nan)], -1)
