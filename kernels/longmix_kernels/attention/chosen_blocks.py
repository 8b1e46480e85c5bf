"""Attention of each query to blocks of keys that it chose itself, on the kernels for row bounds.

Blocks of `size` keys, a block every `stride` keys, begin where documents do; a block that its document does not fill is
none. Every pair of a query and one of its blocks is a row of its own. Pairs are sorted by block, so that a pair sees

    lo = first key of its block,   hi = lo + size

and neither bound decreases: `attention` does the rest, with all its gradients, and the pairs of one query are merged
through their logsumexp (the efficient form of MoBA, Lu et al. 2025, arXiv 2502.13189, section 2.4). Memory is linear in
Tq * n for n blocks a query. The choice itself has no gradient: it is a set.
"""

from typing import NamedTuple

import torch

from longmix_kernels.attention.bounds import positions_from_document_ids
from longmix_kernels.attention.combine import merge
from longmix_kernels.attention.op import attention


class KeyBlocks(NamedTuple):
    """Where blocks of keys begin.

    Attributes:
        starts: int32 [B or 1, N], the first key of each block, ascending; Tk where a row has fewer blocks.
        first: int32 [B or 1, Tk], the first block of each key's document.
        ended: int32 [B or 1, Tk], how many blocks of its document end at a key or before it.
        size: keys of a block.
    """

    starts: torch.Tensor
    first: torch.Tensor
    ended: torch.Tensor
    size: int

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of each block of x [B, Tk, H, D], [B, N, size, H, D]; any rows for blocks that are none."""
        batch, keys = x.shape[:2]
        count = self.starts.shape[1]
        row = self.starts.long()[:, :, None] + torch.arange(self.size, device=x.device)
        row = row.clamp(max=keys - 1).flatten(1).expand(batch, -1)
        taken = x.gather(1, row[:, :, None, None].expand(-1, -1, *x.shape[2:]))
        return taken.unflatten(1, (count, self.size))


def key_blocks(
    keys: int,
    size: int,
    *,
    stride: int | None = None,
    document_ids: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> KeyBlocks:
    """Return the complete blocks of each document.

    Args:
        keys: how many keys there are, Tk.
        size: keys of a block.
        stride: keys from one block to the next, at most `size`; None for `size`.
        document_ids: integer [B, Tk], non-decreasing along Tk; None if each row is one document.
        device: of the result; by default that of `document_ids`.

    Raises:
        ValueError: a size is not allowed.
    """
    stride = size if stride is None else stride
    if not 1 <= stride <= size:
        raise ValueError(f"size={size} with stride={stride}; allowed are strides from 1 to the size of a block")
    if document_ids is None:
        row = torch.arange(keys, dtype=torch.int32, device=device)[None]
        count = max(0, (keys - size) // stride + 1)
        return KeyBlocks(row[:, :count] * stride, torch.zeros_like(row), _ended(row, size, stride), size)
    position = positions_from_document_ids(document_ids)
    row = torch.arange(keys, dtype=torch.int32, device=document_ids.device)
    ends = (position >= size - 1) & ((position - (size - 1)) % stride == 0)
    before = ends.cumsum(1, dtype=torch.int32)
    count = keys // stride  # in no document more
    number = torch.arange(1, count + 1, dtype=torch.int32, device=row.device).expand(len(ends), count).contiguous()
    last = torch.searchsorted(before, number, out_int32=True)
    starts = torch.where(last < keys, last - (size - 1), keys)
    ended = _ended(position, size, stride)
    return KeyBlocks(starts, before - ended, ended, size)


def _ended(position: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Return how many blocks end at a position of a document or before it, int32."""
    return ((position + (1 + stride - size)).clamp(min=0) // stride).int()


def attention_to_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: torch.Tensor,
    blocks: KeyBlocks,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention of each query to all keys of the blocks that were chosen for it.

    Nothing here looks at positions: a choice is causal if it has only blocks that end at the query or before it.

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D]; value: [B, Tk, Hkv, Dv].
        chosen: integer [B, Tq, H, n], distinct numbers of blocks, N for none; H is Hq, or Hkv where the heads of a
            group share a choice.
        blocks: those of the keys.
        scale, backend: as in `attention`.

    Returns:
        The output [B, Tq, Hq, Dv], and the logsumexp [B, Tq, Hq]: 0 and -inf for a query without a block.

    Raises:
        ValueError: `chosen` has a wrong shape, or `attention` refuses the rest.
    """
    batch, queries, heads = query.shape[:3]
    keys, key_heads = key.shape[1:3]
    if chosen.dim() != 4 or tuple(chosen.shape[:2]) != (batch, queries) or chosen.shape[2] not in (heads, key_heads):
        allowed = f"[{batch}, {queries}, {heads} or {key_heads}, n]"
        raise ValueError(f"chosen has shape {list(chosen.shape)}; allowed is {allowed}")
    count, each = blocks.starts.shape[1], chosen.shape[3]
    if each == 0 or count == 0:
        exact = torch.promote_types(query.dtype, torch.float32)
        nothing = query.new_full(query.shape[:3], -torch.inf, dtype=exact)
        return query.new_zeros(*query.shape[:3], value.shape[3]), nothing
    narrow = torch.int16 if count < 2**15 else torch.int32
    numbers, order = chosen.permute(0, 2, 3, 1).flatten(2).to(narrow).sort(dim=-1, stable=True)
    starts = torch.cat((blocks.starts, torch.full_like(blocks.starts[:, :1], keys)), 1).expand(batch, -1)
    lo = starts[:, None].expand(-1, chosen.shape[2], -1).gather(2, numbers.long())
    hi = (lo + blocks.size).clamp(max=keys)
    lo, hi, order = (x.repeat_interleave(heads // chosen.shape[2], 1) for x in (lo, hi, order.int()))
    pairs = query.unsqueeze(1).expand(-1, each, -1, -1, -1).flatten(1, 2)
    output, logsumexp = attention(
        pairs, key, value, lo=lo, hi=hi, query_rows=order, scale=scale, return_logsumexp=True, backend=backend
    )
    if each == 1:
        return output, logsumexp
    parts = (x.unflatten(1, (each, queries)).unbind(1) for x in (output, logsumexp))
    return merge(list(zip(*parts, strict=True)))
