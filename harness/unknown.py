"""What can be said of an error without a name: how large it is, and what the wrong places have in common."""

from __future__ import annotations

import math

import torch

from harness.algebra import Evidence
from harness.recover import Story, numbers_text, suspects


def unknown_story(evidence: Evidence) -> Story:
    """That nothing explains it, with its figures."""
    given = evidence.given
    errors = torch.stack([(output - given.stages.output_MH).norm(dim=-1) for output in evidence.outputs])
    rank, row = divmod(int(errors.argmax()), errors.shape[1])
    relative = float(errors[rank, row] / given.stages.output_MH[row].norm().clamp(min=1e-30))
    wrong = int(evidence.wrong_RM.any(0).sum())
    return Story(
        None, "output",
        f"unknown: neither a sum of the parts nor a known wrong rule explains it; {wrong} of {errors.shape[1]} rows wrong, "
        f"worst token {row} on rank {rank}, off by {relative:.3g} of its length{_whereabouts(evidence, relative)}",
    )  # fmt: skip


def _whereabouts(evidence: Evidence, relative: float) -> str:
    """What the wrong places have in common, for an error without a name: tokens, columns, experts, ranks."""
    given, wrong_RM = evidence.given, evidence.wrong_RM
    wrong_M, clues = wrong_RM.any(0), []
    if not bool(wrong_M.all()):
        clues.append(f"only tokens {numbers_text(wrong_M.nonzero()[:, 0].tolist())}")
    error_MH = torch.stack([(output - given.stages.output_MH).abs() for output in evidence.outputs]).amax(0)[wrong_M]
    naive_M = evidence.naive_M[wrong_M]
    wrong_H = (error_MH > 6 * naive_M[:, None] / math.sqrt(error_MH.shape[1])).any(0)
    columns = wrong_H.nonzero()[:, 0].tolist()
    if columns and len(columns) <= 3 * len(wrong_H) // 4:
        clues.append(f"only columns {numbers_text(columns)} of {len(wrong_H)}")
    visited = suspects(given.stages.topk_ids_MK, wrong_M)
    if visited:
        clues.append(f"exactly the tokens that visit expert {' or '.join(map(str, visited))}")
    if zero := zero_ranks(evidence):
        clues.append(f"y = 0 on {evidence.layout.where(zero)}")
    right = [r for r, wrong in enumerate(wrong_RM) if not bool(wrong.any()) and bool(evidence.held_RM[r].any())]
    if given.dtype is torch.float32 and bool(wrong_M.all()) and 2**-12 < relative < 2**-6:
        clues.append("as little as a rounding to bf16 or fp16 somewhere would do")
    if right:
        clues.append(f"{evidence.layout.where(right)} right")
    elif len(evidence.outputs) > 1:
        clues.append("all ranks alike" if evidence.ranks_agree else "the ranks differ")
    return f" ({'; '.join(clues)})" if clues else ""


def zero_ranks(evidence: Evidence) -> list[int]:
    """The ranks that return nothing but zeros, and should not."""
    held = zip(evidence.outputs, evidence.held_RM, strict=True)
    return [r for r, (y, rows) in enumerate(held) if not bool(y[rows].any()) and bool(evidence.wrong_RM[r].any())]
