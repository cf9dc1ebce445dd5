"""Runs a system on all ranks of a case and keeps what each of them did: steps 5 to 7 of a check.

Nothing here judges numbers; what a layer may never do (another shape, dtype or type, its input changed, a raise) is told.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case
from harness.comm import Communicator, Entry, tensor_text
from harness.comm.simulated import run_ranks
from harness.errors import CollectiveMismatch, CouldNotRun, UsageError, raised_text, ranks_text
from harness.problem import Problem
from harness.systems import Layer, System


@dataclass(frozen=True, slots=True, eq=False)
class RankOutput:
    """output: [m, H] for the m tokens of the rank.    rows: which of the case's M they are.    unit: the layer returned y * unit.    broken: what the call did that no layer may, or None.

    layer: as built, to be asked for its stages and plan.
    """

    output: Tensor
    rows: slice
    unit: float
    broken: str | None
    layer: Layer


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """broken: (stage, sentence) if the run gave no outputs that could be compared, else None."""

    ranks: tuple[RankOutput, ...]
    ledger: tuple[tuple[Entry, ...], ...]
    broken: tuple[str, str] | None


class _CallFailed(Exception):
    """A layer's forward raised; building it had gone well."""


def run_system(case: Case, system: System, given: Problem) -> Run:
    """Build the layer on each rank and call it once. Raises CouldNotRun if importing or building fails."""
    modality_M = None if given.tokens.is_vision is None else given.tokens.is_vision.long()

    def rank_body(comm: Communicator) -> RankOutput:
        weights = given.weights_of(comm.rank)
        if system.foreign:  # a build that writes into what it is given must not spoil the cases after it
            weights = {name: tensor.clone() for name, tensor in weights.items()}
        layer = system.build(case, weights, comm)
        rows = case.rows[comm.rank]
        given_MH = given.tokens.hidden_states[rows]
        x_MH = given_MH.clone()
        inputs = {} if modality_M is None else {"modality": modality_M[rows]}
        try:
            output = layer(x_MH, **inputs)
        except (Exception, SystemExit) as error:
            raise _CallFailed(f"{raised_text(error)} in forward") from error
        unit = float(getattr(layer, "output_unit", 1.0))
        return RankOutput(output, rows, unit, _broken(output, x_MH, given_MH), layer)

    with torch.inference_mode():
        ranks = run_ranks(case.grid, rank_body, threads=system.foreign)
    if ranks.failure is None:
        broken = [f"{ranks_text([r])}: {out.broken}" for r, out in enumerate(ranks.results) if out.broken]
        return Run(tuple(ranks.results), ranks.ledger, ("call", "; ".join(broken)) if broken else None)
    return Run((), ranks.ledger, _failure(ranks.failure))


def _failure(failure: BaseException) -> tuple[str, str]:
    if isinstance(failure, CollectiveMismatch):
        return "collectives", str(failure)
    if isinstance(failure, (_CallFailed, UsageError)):
        return "call", str(failure)
    raise failure if isinstance(failure, CouldNotRun) else CouldNotRun(f"{raised_text(failure)} while it was built")


def _broken(output: object, x_MH: Tensor, given_MH: Tensor) -> str | None:
    if not isinstance(output, Tensor):
        return f"forward returned {tensor_text(output)}, expected {tensor_text(given_MH)}"
    if output.shape != given_MH.shape or output.dtype != given_MH.dtype:
        return f"forward returned {tensor_text(output)}, expected {tensor_text(given_MH)}"
    if not torch.equal(x_MH, given_MH):
        return "forward changed its input in place; the caller still needs the hidden states for its residual"
    return None
