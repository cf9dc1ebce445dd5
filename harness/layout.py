"""Which rank holds which share of the routed and the shared experts: what a diagnosis has to know of a grid."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from harness.case import Grid, groups_of
from harness.errors import ranks_text

# the parts that live with the routed experts
ROUTED = ("routed", "expert bias")


@dataclass(frozen=True, slots=True)
class Layout:
    """owners: the ep rank of each expert; None where experts have several, so that no rank's share is its own."""

    grid: Grid
    owners: tuple[int, ...] | None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that a factor can be, by name, but for those of 1."""
        grid = self.grid
        named = {"tp": grid.tp, "dp": grid.dp, "ep": grid.ep}
        if grid.tp > 1 and grid.dp > 1 and grid.ep < grid.ranks:  # else one of these is all ranks already
            named["ranks"] = grid.ranks
        if grid.moe_tp not in named.values():
            named["moe.tp"] = grid.moe_tp
        return {name: size for name, size in named.items() if size > 1}

    @property
    def text(self) -> str:
        """'tp=2, ep=4, dp=2'."""
        sizes = {"tp": self.grid.tp, "ep": self.grid.ep, "dp": self.grid.dp, "sp": self.grid.sp}
        return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name == "tp")

    def shares(self, part: str) -> int:
        """Into how many shares a part is cut: the routed experts over all ranks, the shared ones over tp.

        Under sequence parallelism the shared experts are whole; that they might not be is what shares are asked for.
        """
        return self.grid.ranks if part in ROUTED else self.grid.tp

    def own(self, part: str, rank: int) -> int:
        """Which of them a rank holds."""
        return rank if part in ROUTED else rank % self.grid.tp

    def holders(self, part: str, shares: Sequence[int]) -> str:
        """'rank 2 (ep rank 2)' or, for a share that every data-parallel rank has, 'tp rank 1'."""
        if part in ROUTED or self.grid.dp == 1:
            return self.where(shares)
        return ranks_text(shares).replace("rank", "tp rank", 1)

    def where(self, ranks: Sequence[int]) -> str:
        """'ranks 2, 3 (dp rank 1)': with the name of the group, if the ranks are all that share one."""
        told = ranks_text(ranks)
        if len(ranks) == 1 and self.grid.dp > 1 and self.grid.tp > 1:
            return f"{told} (dp rank {ranks[0] // self.grid.tp}, tp rank {ranks[0] % self.grid.tp})"
        for name, groups in _alike(self.grid).items():
            if len(groups) > 1 and tuple(ranks) in groups:
                return f"{told} ({name} rank {groups.index(tuple(ranks))})"
        return told

    def groups(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The ranks that meet in a collective, by the name of the group; groups of one rank or of all are left out."""
        return _groups(self.grid)

    def beside(self, group: str) -> str:
        """What has to be summed over as well, where one group was: 'tp' beside 'dp'."""
        return {"dp": "tp", "tp": "dp", "ep": "moe.tp", "moe.tp": "ep"}[group]

    def experts_text(self, ranks: Sequence[int]) -> str | None:
        """'experts 4 to 7' that those ranks hold, None where every rank has a piece of each or owners are unknown."""
        if self.owners is None or self.grid.ep == 1:
            return None
        held = [e for e, owner in enumerate(self.owners) if owner in {rank // self.grid.moe_tp for rank in ranks}]
        if not held:
            return "no expert"
        if len(held) > 2 and held[-1] - held[0] == len(held) - 1:
            return f"experts {held[0]} to {held[-1]}"
        return f"expert{'s' if len(held) > 1 else ''} {', '.join(map(str, held))}"

    def are_whole(self, ranks: Sequence[int]) -> bool:
        """Whether those ranks hold every piece of their experts."""
        moe_tp = self.grid.moe_tp
        return all(r in ranks for rank in ranks for r in range(rank - rank % moe_tp, rank - rank % moe_tp + moe_tp))

    def owners_of(self, experts: Sequence[int], used: Sequence[int]) -> str | None:
        """'all of ep ranks 1, 2' if these are all the used experts that those ranks hold; None if they are not."""
        if self.owners is None or self.grid.ep == 1 or not experts or max(used) >= len(self.owners):
            return None
        ranks = sorted({self.owners[e] for e in experts})
        held = [e for e in used if self.owners[e] in ranks]
        return f"all of {ranks_text(ranks).replace('rank', 'ep rank', 1)}" if sorted(experts) == held else None


@functools.lru_cache(maxsize=64)
def _groups(grid: Grid) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Groups of some ranks; tp before dp before ep, since the first that fits names a fault."""
    groups = groups_of(grid)
    return {name: groups[name] for name in ("tp", "dp", "ep", "moe.tp") if 1 < len(groups[name]) < grid.ranks}


@functools.lru_cache(maxsize=64)
def _alike(grid: Grid) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The ranks that have a number in common: those of dp rank 0, of dp rank 1 and so on."""
    groups = _groups(grid)
    named = {"dp": groups.get("tp"), "tp": groups.get("dp"), "ep": groups.get("moe.tp")}
    return {name: found for name, found in named.items() if found}


def linear_owners(experts: int, ep: int) -> tuple[int, ...]:
    """The ep rank of each expert where a layer does not tell: neighbours together, the first ranks hold one more."""
    base, rest = divmod(experts, ep)
    return tuple(rank for rank in range(ep) for _ in range(base + (rank < rest)))
