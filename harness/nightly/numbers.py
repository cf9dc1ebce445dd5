"""Which cases a worker judges at a time. No torch here: the parent counts, workers draw."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 64  # cases that share weights


@dataclass(frozen=True, slots=True)
class Numbers:
    """The cases first to stop - 1 of a seed, of the named models; as text, since that is what the pool carries."""

    seed: int
    first: int
    stop: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.seed} {self.first} {self.stop} {','.join(self.names)}"

    @classmethod
    def parse(cls, text: str) -> Numbers:
        seed, first, stop, names = text.split()
        return cls(int(seed), int(first), int(stop), tuple(names.split(",")))


def blocks(seed: int, count: int, names: tuple[str, ...]) -> list[Numbers]:
    """Numbers 0 to count - 1, in blocks."""
    return [Numbers(seed, first, min(first + BLOCK, count), names) for first in range(0, count, BLOCK)]
