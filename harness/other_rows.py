"""Experts that compute the rows of other tokens: the router's weights and experts are right, the lists of rows are not.

Each wrong row is read as its lawful sum in which some of the experts, or all, have the input of one other token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.algebra import RESIDUAL_LIMIT, Evidence
from harness.layout import Layout
from harness.recover import Story, describe_moves, each_expert, numbers_text, recoverable

# Rows that are asked; and how near a slot's factor has to be to 0, its own token, or 1, the other one.
_ROWS = 48
_NEAR = 0.05


def other_rows_story(evidence: Evidence) -> Story | None:
    """Which token's row the experts of each wrong token have read; None unless that explains every wrong row."""
    given = evidence.given
    rows = (evidence.wrong_RM.any(0) & evidence.decided_M).nonzero()[:, 0]
    if not recoverable(given) or not evidence.ranks_agree or len(rows) < 2:
        return None
    spec, stages, rows = given.spec, given.stages, rows[:_ROWS]
    ids_mK, weights_mK = stages.topk_ids_MK[rows], stages.topk_weights_MK[rows]
    miss_mH = (evidence.assembled_MH - stages.output_MH)[rows] / (spec.output.share * spec.scale)
    limit_m = RESIDUAL_LIMIT * (evidence.naive_M[rows] + evidence.naive_M.mean()) / (spec.output.share * spec.scale)
    made_EMH = each_expert(given)
    if not spec.experts.bias:  # a row of padding, of which an expert makes 0, is one more token to be read
        made_EMH = torch.cat([made_EMH, torch.zeros_like(made_EMH[:, :1])], 1)
    own_mKH = weights_mK[:, :, None] * made_EMH[ids_mK, rows[:, None]]
    sources, read = [], []
    for i in range(len(rows)):
        other_JKH = (weights_mK[i, :, None, None] * made_EMH[ids_mK[i]]).transpose(0, 1)
        found = _source(miss_mH[i], other_JKH - own_mKH[i], float(limit_m[i]))
        if found is None:
            return None
        sources.append(found[0])
        read.append(found[1])
    padding = torch.tensor(sources) == stages.output_MH.shape[0]
    if int(padding.sum()) > len(rows) // 4:
        return None  # where most rows get nothing, they are lost
    return _told(
        rows[~padding], torch.tensor(sources)[~padding], torch.stack(read)[~padding], ids_mK[~padding], evidence.layout
    )


def _source(miss_H: Tensor, change_JKH: Tensor, limit: float) -> tuple[int, Tensor] | None:
    """The token j, and bool [K], whose slots have read it.    change_JKH: what each slot would add if it had."""
    gram_JKK = change_JKH @ change_JKH.mT
    solved_JK = torch.linalg.pinv(gram_JKK, hermitian=True) @ (change_JKH @ miss_H)[:, :, None]
    read_JK = (solved_JK[:, :, 0] - 1).abs() <= _NEAR
    sound_J = (read_JK | (solved_JK[:, :, 0].abs() <= _NEAR)).all(-1)
    left_J = (miss_H - (read_JK.double()[:, None] @ change_JKH)[:, 0]).norm(dim=-1).masked_fill(~sound_J, torch.inf)
    best = int(left_J.argmin())
    return (best, read_JK[best]) if float(left_J[best]) <= limit else None


def _told(rows: Tensor, source_m: Tensor, read_mK: Tensor, ids_mK: Tensor, layout: Layout) -> Story | None:
    moved = describe_moves(source_m, "gets what its experts make of", rows)
    if moved is None:
        return None
    if bool(read_mK.all()):
        return Story("H2", "routed", f"the experts compute the rows of other tokens: {moved}")
    wrong = ids_mK[read_mK].unique().tolist()
    right = sorted(set(ids_mK[~read_mK].unique().tolist()) - set(wrong))
    owners = layout.owners_of(wrong, ids_mK.unique().tolist())
    if owners and right:
        told = f"experts {numbers_text(wrong)}, {owners}, compute the rows of other tokens"
        return Story("H2", "routed", f"{told}: {moved}")
    which = f"experts {numbers_text(wrong)}" if right and len(wrong) > 1 else "some experts"
    which = f"expert {wrong[0]}" if len(wrong) == 1 else which
    those = f", those of {numbers_text(right)} are right" if right else ""
    return Story("G9", "routed", f"the lists of {which} hold other tokens{those}: {moved}")
