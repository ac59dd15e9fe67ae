"""Chance without state: every random number is a function of (seed, use, epoch, sample, slot), by Philox4x32-10.

Nothing is consumed and nothing has to be saved: a restarted job, another rank, another world size or a GPU draws the
same bits. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), define the generator.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
Words = TypeVar("Words", Tensor, int)


class Use(IntEnum):
    """What a random number is for. It is a word of the counter, so two uses never see the same bits: a new use takes
    a new number, and a number once used keeps its meaning."""

    ORDER = 1
    VIEWS = 2
    LAYERS = 3
    STRONG = 4
    WEAK = 5
    RANDAUGMENT = 6
    CTAUGMENT = 7
    PROBE = 8
    CUTOUT = 9
    LABELS = 10
    KMEANS = 11
    PICTURES = 12


def philox(key: tuple[int, int], counter: Tensor) -> Tensor:
    """Four random 32-bit words for each counter: [..., 4] int64 of uint32 values -> the same shape and kind.

    The words live in int64 because torch has no full uint32 arithmetic. A product of two of them needs 64 bits and
    may wrap into the sign; its bits are right all the same, and the mask after `>>` takes off the sign it drags along.
    """
    return torch.stack(_rounds(key, *counter.unbind(-1)), dim=-1)


def _rounds(key: tuple[int, int], c0: Words, c1: Words, c2: Words, c3: Words) -> tuple[Words, Words, Words, Words]:
    """The same of tensors or of plain numbers."""
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & WORD, (p1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & WORD, high0 ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def words(seed: int, use: Use, epoch: int, index: Tensor, slots: int, lane: int = 0) -> Tensor:
    """Random words [n, slots, 4] for the samples (or positions) `index` [n], on its device.

    The counter is (index, epoch, lane and slot, use). `lane` tells the streams of one sample apart, as its two views.
    """
    assert 0 < slots < 1 << 16
    assert 0 <= lane < 1 << 16
    n = len(index)
    counter = torch.empty(n, slots, 4, dtype=torch.int64, device=index.device)
    counter[..., 0] = (index & WORD).unsqueeze(1)
    counter[..., 1] = epoch & WORD
    counter[..., 2] = torch.arange(slots, device=index.device) + (lane << 16)
    counter[..., 3] = int(use)
    return philox(_key(seed), counter)


def _key(seed: int) -> tuple[int, int]:
    return seed & WORD, (seed >> 32) & WORD


def seed_of_step(seed: int, step: int, rank: int) -> int:
    """For the generator that layers such as dropout draw from: set anew at each step, it has no state to be saved."""
    first, second, *_ = _rounds(_key(seed), rank & WORD, step & WORD, 0, int(Use.LAYERS))  # as `words`, of one slot
    return first << 31 | second >> 1


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1), from the upper 24 of the 32 bits: every value is exact, hence the same on every device."""
    return (bits >> 8).to(torch.float32) * 2.0**-24


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """A permutation of 0..n-1 [n] int64: the order of n random 63-bit keys, ties (practically none) by position.

    Only integer arithmetic and a stable sort, so no version of torch or numpy can change it. A counter gives two keys;
    they are made in pieces that stay in a core's cache and on one thread, ten times faster than all at once.
    """
    pieces = torch.arange((n + 1) // 2).split(8192)
    bits = torch.cat([words(seed, Use.ORDER, epoch, piece, slots=1).view(-1, 2) for piece in pieces])[:n]
    return torch.argsort(bits[:, 0] << 31 | bits[:, 1] >> 1, stable=True)
