"""Rows sorted so that a query's keys lie side by side: attention among the tokens that carry one label.

A label is a bucket, a cluster, or "kept". With the code c = (document, label, position) of every row, queries and keys
sorted by c, and the keys' codes searched for each query's, the keys that a query sees are the run

    lo = first key of its document and label,    hi = one past the last of them at its position - gap or before

and neither bound ever decreases along the sorted queries, which is all that `attention` asks for. A row's label and
position say alone what it sees, so nothing later can change it.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class Ordering(NamedTuple):
    """Sorted rows and their bounds; `attention(query, key, value, **ordering._asdict())`.

    Attributes:
        lo, hi, query_rows, key_rows: see `attention`. `hi` is None where it is the row's own place.
    """

    lo: torch.Tensor
    hi: torch.Tensor | None
    query_rows: torch.Tensor
    key_rows: torch.Tensor


def order_by_label(
    query_labels: torch.Tensor,
    key_labels: torch.Tensor | None = None,
    *,
    num_labels: int,
    document_ids: torch.Tensor | None = None,
    gap: int = 0,
    members: int | None = None,
    copies: int = 1,
    before: torch.Tensor | None = None,
) -> Ordering:
    """Let each query see the keys that carry its label, in its document, at least `gap` positions before it.

    Args:
        query_labels: integer [B, Tq, Hq], 0 <= label < num_labels; the queries are the last of Tk positions.
        key_labels: integer [B, Tk, Hkv], Hkv a divisor of Hq; None if they are those of the queries.
        num_labels: how many labels there are.
        document_ids: integer [B, Tk], non-decreasing along Tk.
        gap: 0 lets a query see its own position, 1 does not, w leaves the last w positions to a window.
        members: how many of those keys it sees at most, the latest ones; None for all.
        copies: how many key rows a position has, side by side, each with a label of its own; Tk counts key rows, and
            each query stands at the last one of its position.
        before: integer [B or 1, Tq], in place of `gap`: the key row from which on each query sees none; non-decreasing.

    Raises:
        ValueError: a `gap` below 0, `members` or `copies` below 1, copies without labels of the keys, `before` and a
            `gap`.
    """
    if before is not None and gap:
        raise ValueError(f"got before and gap={gap}; before says alone how far a query sees")
    if gap < 0 or (members is not None and members < 1) or copies < 1:
        raise ValueError(f"gap={gap}, members={members}, copies={copies}; allowed are gap from 0, others from 1 on")
    shared = key_labels is None
    if shared and copies > 1:
        raise ValueError(f"copies={copies} without key_labels; allowed is 1, since queries have one label each")
    key_labels = query_labels if key_labels is None else key_labels
    keys, queries = key_labels.shape[1], query_labels.shape[1]
    base = _document_index(document_ids) * num_labels if document_ids is not None else 0
    place = torch.arange(keys, device=key_labels.device)
    key_codes, key_rows = _sorted_codes(key_labels, base, place, keys)
    if shared:
        codes, rows = key_codes, key_rows
    else:
        stand = place[keys - 1 - (queries - 1) * copies :: copies]
        codes, rows = _sorted_codes(query_labels, base if isinstance(base, int) else base[:, stand], stand, keys)

    position = codes % keys
    label_start = codes - position
    if shared:
        first = label_start[..., 1:] != label_start[..., :-1]
        lo = F.pad(first * place[1:], (1, 0)).cummax(-1).values
    else:
        lo = _count_below(key_codes, label_start)
    if before is not None:
        limit = before[:, None].long().expand(codes.shape).gather(-1, rows)
        hi = _count_below(key_codes, label_start + limit)
    elif shared and gap <= 1:
        hi = torch.maximum(place + (1 - gap), lo)
    else:
        hi = _count_below(key_codes, label_start + (position - gap * copies + 1).clamp(min=0))
    if members is not None:
        lo = torch.maximum(lo, hi - members)
    own_place = shared and gap == 0 and before is None
    return Ordering(lo.int(), None if own_place else hi.int(), rows.int(), key_rows.int())


def _sorted_codes(
    labels: torch.Tensor, base: torch.Tensor | int, position: torch.Tensor, keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted codes (base + label) * keys + position, int64 [B, H, T], and the rows they come from."""
    labels = labels.transpose(1, 2).long() + (base if isinstance(base, int) else base[:, None])
    codes, rows = (labels * keys + position).contiguous().sort(-1)
    return codes, rows


def _count_below(sorted_codes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """How many of a key head's codes [B, Hkv, Tk] are below each code [B, Hq, Tq]."""
    batch, key_heads, _ = sorted_codes.shape
    return torch.searchsorted(sorted_codes, codes.reshape(batch, key_heads, -1)).view(codes.shape)


def _document_index(document_ids: torch.Tensor) -> torch.Tensor:
    """Number documents 0, 1, ... within each row, int64 [B, T]."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return F.pad(changes.long().cumsum(1), (1, 0))
