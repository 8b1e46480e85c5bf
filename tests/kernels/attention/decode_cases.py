"""Calls of `decode_attention` by name: segments of every form."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longmix_kernels.attention import Codes, Segment, packed_codes

BATCH, KEY_HEADS, GROUP, WIDTH, VALUES = 4, 2, 3, 8, 6
POISON = torch.nan
"""What lies behind the slots of a segment."""


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def plain(slots: int, rows: int = BATCH, dtype: torch.dtype = torch.float64) -> Segment:
    """A segment all of which is read, a view of larger buffers as caches hold them."""
    key = random(rows, KEY_HEADS, slots + 3, WIDTH, dtype=dtype)
    value = random(rows, KEY_HEADS, slots + 3, VALUES, dtype=dtype)
    key[:, :, slots:], value[:, :, slots:] = POISON, POISON
    return Segment(key[:, :, :slots], value[:, :, :slots])


def ragged(slots: int, rows: int = BATCH, per_head: bool = False, dtype: torch.dtype = torch.float64) -> Segment:
    """A segment of which the rows of the batch read runs of their own; the last row reads nothing."""
    segment = plain(slots, rows, dtype)
    first = torch.randint(0, slots // 2, (BATCH,), dtype=torch.int32)
    count = torch.randint(slots // 2 + 1, slots + 1, (BATCH, KEY_HEADS if per_head else 1), dtype=torch.int32)
    count[-1] = 0
    return Segment(segment.key, segment.value, count, first)


def indexed(slots: int, chosen: int, rows: int = BATCH, dtype: torch.dtype = torch.float64) -> Segment:
    """A segment of which every row and head reads slots of its own, some fewer than others."""
    segment = plain(slots, rows, dtype)
    index = torch.stack([torch.randperm(slots)[:chosen].sort().values for _ in range(BATCH * KEY_HEADS)])
    index = index.view(BATCH, KEY_HEADS, chosen).int()
    index[1, 0, chosen // 2 :] = -1
    return Segment(segment.key, segment.value, index=index)


def coded(slots: int, bits: int, group: int, rows: int = BATCH, dtype: torch.dtype = torch.float64) -> Segment:
    """A segment of codes: keys by channel over groups of tokens, values by token, and by channel a scale of theirs."""
    codes = [torch.randint(0, 2**bits, (rows, KEY_HEADS, slots, 8)) for _ in range(2)]
    parameters = random(2, rows, KEY_HEADS, slots // group, WIDTH, dtype=dtype)
    key_codes = Codes(bits, parameters[0], parameters[1] / 2**bits)
    low, step = random(2, rows, KEY_HEADS, slots, 2, dtype=dtype)
    value_codes = Codes(bits, low, step / 2**bits, random(rows, KEY_HEADS, 1, 8, dtype=dtype))
    return Segment(*(packed_codes(x, bits) for x in codes), key_codes=key_codes, value_codes=value_codes)


def coded_by_block(slots: int, bits: int, block: int, rows: int = BATCH, dtype: torch.dtype = torch.float64) -> Segment:
    """A segment of codes whose values have a scale of each block of tokens, and parameters that heads share.

    Rows of the batch read runs of their own.
    """
    segment, count = coded(slots, bits, block, rows, dtype), torch.tensor([slots, 1, slots // 2, 0], dtype=torch.int32)
    low, step = random(2, rows, 1, slots, 1, dtype=dtype)
    scale = random(rows, KEY_HEADS, slots // block, 8, dtype=dtype)
    return replace(segment, count=count[:, None], value_codes=Codes(bits, low, step / 2**bits, scale))


def new_tokens(length: int, values: int = VALUES, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return (
        random(BATCH, length, KEY_HEADS, WIDTH, dtype=dtype),
        random(BATCH, length, KEY_HEADS, values, dtype=dtype),
    )


def calls(dtype: torch.dtype = torch.float64) -> dict[str, dict[str, Any]]:
    """Arguments of `decode_attention` by name."""
    torch.manual_seed(0)

    def call(length: int, *segments: Segment, new: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
        query = random(BATCH, length, KEY_HEADS * GROUP, WIDTH, dtype=dtype)
        return {"query": query, "segments": list(segments), "new": new}

    return {
        "one-segment": call(1, plain(37, dtype=dtype)),
        "new-alone": call(5, new=new_tokens(5, dtype=dtype)),
        "new-after": call(4, plain(37, dtype=dtype), new=new_tokens(4, dtype=dtype)),
        "most-queries": call(16, plain(20, dtype=dtype), new=new_tokens(16, dtype=dtype)),
        "shared-by-all": call(1, plain(64, 1, dtype), plain(5, dtype=dtype)),
        "shared-by-pairs": call(3, plain(64, 2, dtype), plain(5, dtype=dtype), new=new_tokens(3, dtype=dtype)),
        "nested-forks": call(1, plain(40, 1, dtype), plain(20, 2, dtype), plain(5, dtype=dtype)),
        "ragged": call(1, ragged(40, dtype=dtype)),
        "ragged-heads": call(2, ragged(40, per_head=True, dtype=dtype), new=new_tokens(2, dtype=dtype)),
        "ragged-shared": call(1, ragged(40, 2, dtype=dtype), plain(4, dtype=dtype)),
        "ragged-shared-by-all": call(3, ragged(40, 1, True, dtype), new=new_tokens(3, dtype=dtype)),
        "index": call(1, indexed(48, 10, dtype=dtype)),
        "index-shared": call(2, indexed(48, 10, 1, dtype=dtype), new=new_tokens(2, dtype=dtype)),
        "index-most": call(1, indexed(48, 40, dtype=dtype), plain(5, dtype=dtype)),
        "index-most-shared": call(2, indexed(48, 48, 2, dtype=dtype), new=new_tokens(2, dtype=dtype)),
        "codes-8": call(1, coded(32, 8, 8, dtype=dtype)),
        "codes-4": call(1, coded(32, 4, 16, dtype=dtype), new=new_tokens(1, 8, dtype)),
        "codes-ragged": call(1, coded_by_block(32, 4, 8, dtype=dtype), new=new_tokens(1, 8, dtype)),
        "codes-odd-blocks": call(5, coded_by_block(30, 2, 5, 2, dtype=dtype), new=new_tokens(5, 8, dtype)),
        "codes-2-shared": call(2, coded(32, 2, 8, 1, dtype), new=new_tokens(2, 8, dtype)),
    }
