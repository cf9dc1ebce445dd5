"""Does a planted fault change anything? The layer with it and the one without, asked for exact results on several seeds.

A fault that changes nothing in a case cannot be found there, and is counted as equivalent, not as missed.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from harness.case import Case
from harness.errors import CouldNotRun
from harness.execution import run_system
from harness.faults.fault import Fault, FaultyRunner
from harness.problem import Problem, problem
from harness.systems import System
from harness.systems.runner import RunnerSystem

SEEDS = (0, 1, 2)
TOKENS = (33, 8)  # the first that is not the case's own is tried as well
LIMIT = 1e-12  # of a number beside the largest of its tensor

_CLEAN = RunnerSystem()


def equivalent(case: Case, fault: Fault) -> str | None:
    """Why the fault changes nothing in that case; None if it changes something in one of the trials."""
    other = next(tokens for tokens in TOKENS if tokens != case.tokens)
    tokens = [case] if case.size == "labels" else [case, replace(case, tokens=other, split=None)]
    for seed in SEEDS:
        for each in tokens:
            trial = replace(each, seed=seed)
            if not _same(_clean(trial), _exact(trial, FaultyRunner(fault))):
                return None
    counts = " and ".join(str(each.tokens) for each in tokens)
    how = "bit by bit" if case.dtype == "fp16" else "in float64"
    return f"{_why(case, fault)}identical {how} on {len(SEEDS)} seeds with {counts} tokens"


def _why(case: Case, fault: Fault) -> str:
    stage = fault.family[:1]
    if stage == "A" and case.spec.scale == 1.0:
        return "s=1: nothing to scale; "
    if stage == "B" and case.grid.ranks == 1:
        return "one rank: nothing to reduce; "
    if stage == "B" and case.grid.tp == 1:
        return "tp=1: nothing to reduce over tp; "
    return ""


def _same(right: tuple[Tensor, ...] | None, wrong: tuple[Tensor, ...] | None) -> bool:
    if right is None or wrong is None:
        return False
    for one, other in zip(right, wrong, strict=True):
        limit = LIMIT * float(one.abs().max()) if one.numel() else 0.0
        if one.shape != other.shape or not bool(((one - other).abs() <= limit).all()):
            return False
    return True


@functools.lru_cache(maxsize=2048)
def _clean(case: Case) -> tuple[Tensor, ...] | None:
    return _exact(case, _CLEAN)


def _exact(case: Case, system: System) -> tuple[Tensor, ...] | None:
    """y of every rank, in float64; None if the layer breaks. fp16 has decisions of its own, so it is asked in fp16."""
    given = problem(case)
    try:
        run = run_system(case, system, given if case.dtype == "fp16" else widened(given))
    except CouldNotRun:
        return None
    return None if run.broken is not None else tuple(out.output.double() / out.unit for out in run.ranks)


def widened(given: Problem) -> Problem:
    """The same problem with weights and tokens in float64; a correction bias stays what it is, as routers want it."""
    weights = {
        name: t.double() if t.is_floating_point() and not name.endswith("e_score_correction_bias") else t
        for name, t in given.weights.items()
    }
    tokens = replace(given.tokens, hidden_states=given.tokens.hidden_states.double())
    return replace(given, dtype=torch.float64, weights=weights, tokens=tokens)
