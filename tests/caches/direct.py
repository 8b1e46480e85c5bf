"""Caches without a model around them: queries, keys and values of fixtures, read in any split."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape
from longmix.mixers.parts.rotary import Rotary

FIXTURES = Path(__file__).parents[1] / "fixtures"


def case(file: str, number: int) -> dict[str, Tensor]:
    """A case of a fixture by name; real numbers are float64."""
    start, content = f"case{number}.", np.load(FIXTURES / f"{file}.npz")
    found = {name.removeprefix(start): torch.from_numpy(x) for name, x in content.items() if name.startswith(start)}
    return {name: x.double() if x.is_floating_point() else x.long() for name, x in found.items()}


def built(kind: CacheKind, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None = None) -> Cache:
    """An empty cache for tokens such as these, [B, T, H, D]."""
    heads, key_heads = query.shape[2], key.shape[2]
    widths = key.shape[3], value.shape[3]
    return kind.build(
        CacheShape(len(query), key_heads, heads // key_heads, *widths, key.dtype, key.device, rotary=rotary)
    )


@torch.no_grad()
def attended(cache: Cache, query: Tensor, key: Tensor, value: Tensor, part: slice, ids: Tensor | None = None) -> Tensor:
    """The output [B, t, Hq, D] of some of the tokens, which the cache then holds."""
    length = query[:, part].shape[1]
    positions = cache.length + torch.arange(length)[None]
    return cache.attend(query[:, part], key[:, part], value[:, part], positions, ids)[0]
