"""Which rank holds which expert: physical slots, the logical experts they hold, and the tables made from both.

A physical slot is a place for one expert's weights on one ep rank. Expert-parallel load balancing (EPLB) may hold an
expert in several slots, in any order; a router knows logical experts only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Knuth's multiplicative hash, as upstream spreads tokens over the replicas of an expert.
_HASH = 2654435769


@dataclass(frozen=True, slots=True)
class Placement:
    """owners: the ep rank of each physical slot.    held: the logical expert in each slot.    num_experts: logical ones.

    Raises ValueError if an expert is held nowhere: its tokens would get nothing.
    """

    owners: tuple[int, ...]
    held: tuple[int, ...]
    num_experts: int

    def __post_init__(self) -> None:
        if len(self.owners) != len(self.held):
            raise ValueError(f"{len(self.owners)} owners for {len(self.held)} physical slots: expected one for each")
        beyond = [expert for expert in self.held if not 0 <= expert < self.num_experts]
        if beyond:
            raise ValueError(f"physical_to_logical holds expert {beyond[0]}: expected 0 to {self.num_experts - 1}")
        missing = sorted(set(range(self.num_experts)) - set(self.held))
        if missing:
            raise ValueError(
                f"physical_to_logical has no slot for expert {missing[0]}: each of the {self.num_experts} experts needs one"
            )

    @property
    def is_identity(self) -> bool:
        """Physical ids are the logical ones."""
        return self.held == tuple(range(self.num_experts))

    def experts_of(self, ep_rank: int) -> tuple[int, ...]:
        """The logical experts that a rank holds, in the order of its local slots."""
        return tuple(expert for owner, expert in zip(self.owners, self.held, strict=True) if owner == ep_rank)

    def expert_map(self, ep_rank: int) -> Tensor:
        """int64 [E + 1]: physical id -> local slot on that rank, -1 elsewhere; the last entry serves the id -1."""
        return _expert_map(self.owners, ep_rank)

    def owner_map(self) -> Tensor:
        """int64 [E + 1]: physical id -> ep rank; -1 for the id -1."""
        return _owner_map(self.owners)

    def local_map(self) -> Tensor:
        """int64 [E + 1]: physical id -> local slot on its owner; -1 for the id -1."""
        return _local_map(self.owners)

    def to_physical(self, logical_MK: Tensor) -> Tensor:
        """Ids of slots for ids of experts; replicas take turns by row, ids that are no expert become -1.

        Source: `eplb_map_to_physical_and_record` of vLLM.
        """
        table_ER, count_E = _replicas(self.held, self.num_experts)
        known_MK = (logical_MK >= 0) & (logical_MK < self.num_experts)
        safe_MK = torch.where(known_MK, logical_MK, 0)
        turn_M1 = (torch.arange(logical_MK.shape[0])[:, None] * _HASH) % 2**32
        return torch.where(known_MK, table_ER[safe_MK, turn_M1 % count_E[safe_MK]], -1)


def linear(num_experts: int, ep_size: int) -> Placement:
    """Neighbours together; the first E mod n ranks hold one more. Source: `determine_expert_map` of vLLM."""
    return physical(tuple(range(num_experts)), num_experts, ep_size)


def round_robin(num_experts: int, ep_size: int) -> Placement:
    """Expert e on rank e mod n."""
    experts = range(num_experts)
    return Placement(tuple(e % ep_size for e in experts), tuple(experts), num_experts)


def replicated(num_experts: int, ep_size: int, redundant: int) -> Placement:
    """The first experts a second time, behind all others. Source: initial EPLB placement of vLLM."""
    held = tuple(p % num_experts for p in range(num_experts + redundant))
    return physical(held, num_experts, ep_size)


def physical(physical_to_logical: Sequence[int], num_experts: int, ep_size: int) -> Placement:
    """Slots dealt out in order, as evenly as it goes, holding what the table says."""
    base, rest = divmod(len(physical_to_logical), ep_size)
    owners = tuple(rank for rank in range(ep_size) for _ in range(base + (rank < rest)))
    return Placement(owners, tuple(physical_to_logical), num_experts)


@functools.lru_cache(maxsize=512)
def _expert_map(owners: tuple[int, ...], ep_rank: int) -> Tensor:
    return torch.where(_owner_map(owners) == ep_rank, _local_map(owners), -1)


@functools.lru_cache(maxsize=512)
def _owner_map(owners: tuple[int, ...]) -> Tensor:
    return torch.tensor([*owners, -1])


@functools.lru_cache(maxsize=512)
def _local_map(owners: tuple[int, ...]) -> Tensor:
    seen: dict[int, int] = {}
    local = []
    for owner in owners:
        local.append(seen.setdefault(owner, 0))
        seen[owner] += 1
    return torch.tensor([*local, -1])


@functools.lru_cache(maxsize=512)
def _replicas(held: tuple[int, ...], num_experts: int) -> tuple[Tensor, Tensor]:
    """logical -> physical table [E, most replicas], and how many each expert has [E]."""
    slots: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(held):
        slots[expert].append(slot)
    most = max(map(len, slots))
    table = torch.tensor([found + [-1] * (most - len(found)) for found in slots])
    return table, torch.tensor([len(found) for found in slots])
