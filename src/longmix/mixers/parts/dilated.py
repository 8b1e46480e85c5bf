"""Windows with gaps: which keys a query sees in dilated and strided neighborhood attention, causal and one-dimensional.

With the position p of a token in its document, r = p mod dilation and a = p // dilation (Hassani et al. 2022 and 2023,
arXiv 2209.15001; the mask of NATTEN): a token sees the keys of its document with its r and

    leader - window < a_j <= a,    leader = (a // stride) stride + stride - 1

So strides share a window: the last token of a group sees `window` keys, the first one `stride - 1` fewer. In NATTEN the
last group of a row is led by the last token there is; that would depend on how long the row is, and is left out here.

Rows are sorted by document and r, and then the keys that a row sees lie side by side: `attention` takes that order.
"""

from typing import Any

import torch
from torch import Tensor

from longmix_kernels.attention import positions_from_document_ids


def positions(document_ids: Tensor | None, keys: int, device: torch.device) -> Tensor:
    """The position of each key row in what the rows have of its document, int64 [B or 1, Tk]."""
    if document_ids is None:
        return torch.arange(keys, device=device)[None]
    return positions_from_document_ids(document_ids).long()


def begun_positions(
    document_ids: Tensor | None, keys: int, earlier: int, next_position: Tensor, device: torch.device
) -> Tensor:
    """Positions as of `positions`, but of the document that goes on its position in the whole document.

    Args:
        document_ids: integer [B, Tk], or None for one document.
        keys: key rows, Tk.
        earlier: how many of them come from before.
        next_position: int64 [B or 1], the position of the first new row if its document goes on.
        device: of the result.
    """
    found = positions(document_ids, keys, device)
    if not earlier:
        return found
    going = torch.ones_like(found, dtype=torch.bool)
    if document_ids is not None:
        going = document_ids == document_ids[:, earlier - 1 : earlier]
    missing = next_position.to(device) - going[:, :earlier].sum(1)
    return found + missing[:, None] * going


def dilated_bounds(
    position: Tensor, place: Tensor, queries: int, window: int, stride: int, dilations: tuple[int, ...], group: int
) -> dict[str, Any]:
    """The arguments of `attention` with which the last rows see what the head of this file says.

    Args:
        position: int64 [B or 1, Tk], of each key row in what the rows have of its document.
        place: as `position`, in the whole document; only strides need it.
        queries: how many query rows there are, the last ones.
        window, stride: as above.
        dilations: of each key head.
        group: query heads to a key head.
    """
    keys = position.shape[1]
    row = torch.arange(keys, device=position.device)
    found = {}
    for dilation in set(dilations):
        # Documents begin at least one row apart, so that codes of one document are below those of the next.
        code = (row - position) * dilation + position % dilation
        key_rows = code.argsort(dim=1, stable=True)
        own = torch.empty_like(key_rows).scatter_(1, key_rows, row.expand_as(key_rows))
        ordered = code.gather(1, key_rows)
        query_rows = code[:, keys - queries :].argsort(dim=1, stable=True)
        at = query_rows + (keys - queries)
        own, seen = own.gather(1, at), window - (stride - 1) + (place.gather(1, at) // dilation) % stride
        first = torch.searchsorted(ordered, code.gather(1, at))
        lo = torch.maximum(first, own + 1 - seen)
        found[dilation] = lo, own + 1, query_rows, key_rows
    by_head = [torch.stack(parts, 1).int() for parts in zip(*(found[dilation] for dilation in dilations), strict=True)]
    lo, hi, query_rows, key_rows = by_head
    wide = (x.repeat_interleave(group, 1).contiguous() for x in (lo, hi, query_rows))
    return dict(zip(("lo", "hi", "query_rows"), wide, strict=True)) | {"key_rows": key_rows}


def seen_pairs(length: int, window: int, stride: int, dilation: int) -> int:
    """How many keys all tokens of a document see together."""
    whole, rest = divmod(length, dilation)
    return rest * _pairs(whole + 1, window, stride) + (dilation - rest) * _pairs(whole, window, stride)


def _pairs(length: int, window: int, stride: int) -> int:
    """Those of one residue."""

    def several(start: int, stop: int) -> int:
        return sum(min(a + 1, window - (stride - 1) + a % stride) for a in range(start, stop))

    full = -(-window // stride) * stride  # from here on no document's beginning cuts windows off
    if stride == 1:
        head = min(window, length)
        return head * (head + 1) // 2 + (length - head) * window
    if length <= full:
        return several(0, length)
    groups, rest = divmod(length - full, stride)
    return several(0, full) + groups * several(full, full + stride) + several(full, full + rest)
