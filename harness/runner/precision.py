"""The precision in which products, scores and weighted sums are formed: fp32, whatever half precision came in."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = (torch.float32, torch.float64)


def wide(tensor: Tensor) -> Tensor:
    """In fp32. A float64 tensor stays one, so that a layer can be asked for its exact result (`harness.faults`)."""
    return tensor if tensor.dtype in _WIDE else tensor.float()
