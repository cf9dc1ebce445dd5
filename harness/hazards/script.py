"""The calls that a built layer is asked to make, as data: which rows, on which layer, in what memory, beside which junk.

All rows come from one pool of POOL tokens, so that one run of the oracle judges every call: the law knows no neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case

POOL = 130
FEW = 7
SWEEP = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130)

# the layers of a script: two with the same weights, the last of them built in poisoned memory, and one with others
FIRST, SECOND, POISONED = "the layer", "a second layer", "a layer built in poisoned memory"

# What each experiment asks, in the order in which its first call is made.
EXPERIMENTS = {
    "first call": "right at all, or nothing can be said of later calls",
    "equal calls": "the second of two equal calls returns the same",
    "other tokens": "a call with as many other tokens",
    "more, then fewer": "few tokens, many, few again: no decision and no buffer outlives the call it was made for",
    "M sweep": "every number of tokens, 0 among them, split unevenly over dp ranks",
    "order of rows": "rows in reverse order give the same rows in reverse order",
    "a row twice": "equal rows of one call give equal rows",
    "a row alone": "a row does not need the others",
    "two layers": "a second layer with other weights, called in turn with the first",
    "poisoned memory": "whatever torch.empty returns is NaN, when the layer is built and when it is called",
    "huge neighbours": "rows of 4096 beside the others",
    "infinite neighbours": "rows of infinity beside the others",
    "NaN neighbours": "rows of NaN beside the others",
    "after junk": "an ordinary call after those",
}
JUNK = {"huge neighbours": 4096.0, "infinite neighbours": torch.inf, "NaN neighbours": torch.nan}


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One call.

    experiment: of EXPERIMENTS.    layer: FIRST, SECOND or POISONED, built when its first call is due.
    rows: int64, for each data-parallel rank the places in the pool of its tokens.
    junk: the value of every third row and of the last five, which are not judged; None for no such rows.
    poison: what torch hands out uninitialised is NaN during the call, and while the layer is built if that is due.
    """

    experiment: str
    rows: tuple[Tensor, ...]
    layer: str = FIRST
    junk: float | None = None
    poison: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.rows))

    def junk_at(self, dp_rank: int) -> Tensor | None:
        """Bool [m]: the rows of a rank that hold junk; None if the call has none."""
        if self.junk is None:
            return None
        m = len(self.rows[dp_rank])
        place_m = torch.arange(m)
        return (place_m % 3 == 0) | (place_m >= m - 5)

    def __str__(self) -> str:
        """'a call with 7 tokens (0 to 6)', 'a call with 3+4 tokens (60 to 66), some rows NaN'."""
        told, row_M = "+".join(map(str, self.sizes)), torch.cat(self.rows).tolist()
        which = f" ({row_M[0]} to {row_M[-1]})" if len(row_M) > 1 else f" ({row_M[0]})" if row_M else ""
        where = "" if self.layer == FIRST else f" of {self.layer}"
        junk = "" if self.junk is None else f", some rows {_value(self.junk)}"
        poison = ", in poisoned memory" if self.poison else ""
        return f"a call{where} with {told} token{'' if told == '1' else 's'}{which}{junk}{poison}"


def _value(junk: float) -> str:
    return {"nan": "NaN", "inf": "infinite"}.get(str(junk), f"of {junk:g}")


def script(case: Case, full: bool) -> list[Step]:
    """Every call that is made of a case, in order. full: the sweep leaves no number of tokens out."""
    dp = case.grid.dp

    def rows(start: int, stop: int, turn: int = 0) -> tuple[Tensor, ...]:
        return torch.arange(start, stop).split(split(stop - start, dp, turn))

    few, others, every = rows(0, FEW), rows(FEW, 2 * FEW), rows(0, POOL)
    sizes = range(POOL + 1) if full else SWEEP
    steps = [
        Step("first call", few), Step("equal calls", few), Step("other tokens", others), Step("more, then fewer", every),
        Step("M sweep", rows(0, 0)), Step("more, then fewer", few),
        *(Step("M sweep", rows(0, m, turn)) for turn, m in enumerate(sizes) if m),
        Step("order of rows", tuple(part.flip(0) for part in every)),
        Step("a row twice", tuple(torch.cat([part, part]) for part in rows(20, 36))),
        *(Step("a row alone", _alone(row, dp)) for row in (POOL - 1, POOL // 2)),
        Step("two layers", few, SECOND), Step("two layers", few), Step("two layers", few, SECOND),
        Step("poisoned memory", rows(30, 63), POISONED, poison=True), Step("poisoned memory", few, poison=True),
        *(Step(name, rows(60, 93), junk=value) for name, value in JUNK.items()), Step("after junk", others),
    ]  # fmt: skip
    return steps


def split(tokens: int, dp: int, turn: int) -> list[int]:
    """Shares of the tokens for each dp rank: even; all on the last; one on each but the last; most on the first."""
    if dp == 1:
        return [tokens]
    base, rest = divmod(tokens, dp)
    even = [base + (rank < rest) for rank in range(dp)]
    last = [0] * (dp - 1) + [tokens]
    ones = [1] * (dp - 1) + [tokens - dp + 1] if tokens >= dp else last
    most = [tokens - tokens // 4, *(0 for _ in range(dp - 2)), tokens // 4]
    return (even, last, ones, most)[turn % 4]


def _alone(row: int, dp: int) -> tuple[Tensor, ...]:
    """One token in all, on the dp rank that its number gives; the other ranks have none."""
    return tuple(torch.arange(row, row + (rank == row % dp)) for rank in range(dp))
