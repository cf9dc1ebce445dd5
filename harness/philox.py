"""Philox4x32-10 bits addressed by (seed, tensor name, element): the same numbers on every machine, device and version.

docs/numbers.md describes the addressing well enough to rewrite it in another language, with test vectors.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter.

    counter: four int64 tensors of one shape (or broadcastable), values 0 to 2**32 - 1.    key: two such integers.
    Returns four int64 tensors with values 0 to 2**32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & _MASK, (k1 + KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; in halves, since the whole product overflows a signed 64-bit integer."""
    low_part = (a & 0xFFFF) * m
    high_part = (a >> 16) * m + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def tensor_words(name: str) -> tuple[int, int]:
    """The two counter words that stand for a tensor: the first eight bytes of SHA-256 of its name, little-endian."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uint16(name: str, seed: int, start: int, stop: int, device: str | torch.device = "cpu") -> Tensor:
    """The 16-bit numbers of elements start to stop - 1 of a tensor, as int64 [stop - start], 0 to 65535.

    Element i is half i % 2 (low half first) of word i % 8 // 2 of the block whose counter is (i // 8 mod 2**32,
    i // 8 div 2**32, *tensor_words(name)) under the key (seed mod 2**32, seed div 2**32).
    """
    first = start // 8
    block = torch.arange(first, (stop + 7) // 8, device=device)
    words = tensor_words(name)
    counter = (block & _MASK, block >> 32, torch.full_like(block, words[0]), torch.full_like(block, words[1]))
    bits = torch.stack(philox(counter, (seed & _MASK, seed >> 32)), -1)
    halves = torch.stack((bits & 0xFFFF, bits >> 16), -1).flatten()
    return halves[start - first * 8 : stop - first * 8]


def uniform(name: str, seed: int, start: int, stop: int, device: str | torch.device = "cpu") -> Tensor:
    """Numbers strictly between -1 and 1, symmetric and never 0: (2 * uint16 - 65535) / 65536 as float32, exact."""
    return (2 * uint16(name, seed, start, stop, device) - 65535).to(torch.float32) / 65536
