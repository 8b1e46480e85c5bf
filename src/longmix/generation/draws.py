"""Random numbers of rows that depend on nothing else in the batch.

A row has a key. Its next random number is a hash of the key and of how many tokens the row has: a counter-based
generator, as in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". So no state is kept. A row draws
alone what it draws in a batch, and a saved row goes on from its key.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 53
"""Of a random number: as many as a float64 below 1 can have."""

KEY_BITS = 63
"""Of a key, so that every file format holds it as an integer."""


def key_of(seed: int, tokens: Sequence[int]) -> int:
    """The key of a row that begins with these tokens: equal prompts with equal seeds have equal keys."""
    return _hash(seed, *tokens) >> (64 - KEY_BITS)


def forked(key: int, sample: int) -> int:
    """The key of one of several continuations of a row; the first one keeps the row's own."""
    return key if sample == 0 else _hash(key, sample) >> (64 - KEY_BITS)


def uniform(key: int, length: int) -> float:
    """The random number from 0 to, but without, 1 with which a row of `length` tokens chooses the next."""
    return (_hash(key, length) >> (64 - BITS)) / 2.0**BITS


def uniforms(keys: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Random numbers of rows, float64 [B] on the CPU."""
    return torch.tensor(list(map(uniform, keys, lengths)), dtype=torch.float64)


def _hash(*numbers: int) -> int:
    """64 bits of integers below 2**63."""
    content = b"".join(number.to_bytes(8, "little") for number in numbers)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
