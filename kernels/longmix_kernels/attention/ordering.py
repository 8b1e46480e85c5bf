"""Sort rows so that a query's keys lie side by side: attention among the tokens that carry one label.

A label is a bucket, a cluster, or "kept". Rows are sorted by label; those of one label keep their order, and so ascend
in document and position. With the code (label, row) of every key, which ascends too, a query sees the run of keys

    lo = first key of its label from the first row of its document on
    hi = one past the last key of its label up to its position - gap, or before

and neither bound ever decreases along the sorted queries, which is all that `attention` asks for. What a row sees
depends on its label and its position alone, so nothing later can change it. The sort takes labels alone, as numbers of
8 or 16 bits where these are enough; a GPU then needs one or two passes over the rows.
"""

from typing import NamedTuple

import torch


class Ordering(NamedTuple):
    """Sorted rows and their bounds, for `attention(query, key, value, **ordering._asdict())`.

    Attributes:
        lo: int32 [B, Hq, Tq], the first sorted key that a sorted query sees.
        hi: int32 [B, Hq, Tq], one past the last; None where it is one past the query's own place.
        query_rows: int32 [B, Hq, Tq], the query row at each sorted place.
        key_rows: int32 [B, Hkv, Tk], the key row at each sorted place.
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
    first_rows: torch.Tensor | None = None,
) -> Ordering:
    """Return the order in which each query sees the keys of its label and document, at least `gap` positions before it.

    Args:
        query_labels: integer [B, Tq, Hq], 0 <= label < num_labels; the queries are the last of Tk positions.
        key_labels: integer [B, Tk, Hkv], Hkv a divisor of Hq; None if queries and keys have the same labels.
        num_labels: how many labels there are.
        document_ids: integer [B, Tk], non-decreasing along Tk; None if each row is one document.
        gap: 0 lets a query see its own position, 1 does not, w leaves the last w positions to a window.
        members: how many of those keys a query sees at most, the latest ones; None for all.
        copies: how many key rows a position has, side by side, each with a label of its own. Tk counts key rows, and
            each query stands at the last one of its position.
        before: integer [B or 1, Tq], non-decreasing, in place of `gap`: a query sees only key rows before this one.
        first_rows: int32 [B, Tk], the first row of each key row's document, if the caller has it already.

    Returns:
        The sorted rows and their bounds.

    Raises:
        ValueError: `gap` is below 0, or `members` or `copies` below 1; there are several `copies` without
            `key_labels`; or `before` and a `gap` are given together.
    """
    if before is not None and gap:
        raise ValueError(f"got before and gap={gap}; before says alone how far a query sees")
    if gap < 0 or (members is not None and members < 1) or copies < 1:
        raise ValueError(f"gap={gap}, members={members}, copies={copies}; allowed are gap from 0, others from 1 on")
    shared = key_labels is None
    if shared and copies > 1:
        raise ValueError(f"copies={copies} without key_labels; allowed is 1, since queries have one label each")
    given = [query_labels] if key_labels is None else [query_labels, key_labels]
    queries, keys = query_labels.shape[1], given[-1].shape[1]
    found = _sorted(given, num_labels, keys)
    query, key = found[0], found[-1]
    own = slice(keys - 1 - (queries - 1) * copies, None, copies)  # the key rows at which queries stand
    first = codes = None
    if document_ids is not None:
        ids = document_ids.contiguous()
        first_rows = torch.searchsorted(ids, ids, out_int32=True) if first_rows is None else first_rows
        first, codes = _taken(first_rows[:, own], query.places), key.codes()
        if before is not None:
            ends = torch.searchsorted(ids, ids, right=True, out_int32=True)
            before = torch.clamp(before, first_rows[:, own], ends[:, own])

    lo = _count_below(key.labels, query.labels) if codes is None else _count_below(codes, query.codes(first))
    if before is None and shared and gap <= 1:
        hi = torch.arange(1 - gap, keys + 1 - gap, dtype=torch.int32, device=lo.device).expand_as(lo)
    else:
        if before is not None:
            limit = _taken(before, query.places)
        else:
            row = query.rows if keys == queries else query.rows * copies + own.start
            limit = row + (1 - gap * copies)
            if gap:
                limit = limit.clamp(min=0) if first is None else torch.maximum(limit, first)
        hi = _count_below(key.codes() if codes is None else codes, query.codes(limit))
    if members is not None:
        lo = torch.maximum(lo, hi - members)
    own_place = shared and gap == 0 and before is None
    return Ordering(lo, None if own_place else hi, query.rows.int(), key.rows.int())


class _Sorted(NamedTuple):
    """Sorted labels and the rows they come from.

    Attributes:
        labels: [B, H, T], ascending.
        places: int64 [B, H, T], the rows, as indices.
        rows: the same in int32 where that holds the codes, for arithmetic.
        keys: how many key rows there are.
    """

    labels: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    keys: int

    def codes(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return label * keys + row for each label: by default with its own row, else with one of `rows`."""
        return torch.add(self.rows if rows is None else rows.to(self.rows.dtype), self.labels, alpha=self.keys)


def _sorted(given: list[torch.Tensor], num_labels: int, keys: int) -> list[_Sorted]:
    """Return labels [B, T, H], stably sorted along T. One sort takes queries and keys if there are as many of both."""
    narrow = next((kind for kind, most in _NARROW if num_labels <= most), torch.int64)
    labels = [x.mT.to(narrow, memory_format=torch.contiguous_format) for x in given]
    together = len({x.shape[2] for x in labels}) == 1 and len(labels) > 1
    joined = [torch.cat([x.flatten(0, 1) for x in labels])] if together else labels
    wide = torch.int32 if num_labels * keys < 2**31 else torch.int64
    sorts: list[tuple[torch.Tensor, ...]] = []
    for x in joined:
        values, places = x.sort(dim=-1, stable=True)
        sorts.append((values, places, places.to(wide)))
    if together:
        sizes = [x.shape[0] * x.shape[1] for x in labels]
        sorts = list(zip(*(part.split(sizes) for part in sorts[0]), strict=True))
    every = ([part.view(x.shape) for part in parts] for x, parts in zip(labels, sorts, strict=True))
    return [_Sorted(values, places, rows, keys) for values, places, rows in every]


_NARROW = (torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31)
"""Integer dtypes, and how many labels each tells apart."""


def _taken(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the numbers of x [B or 1, T] at rows [B, H, n], which are int64."""
    return x[:, None].expand(*rows.shape[:2], x.shape[1]).gather(-1, rows)


def _count_below(sorted_codes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return for each code [B, Hq, Tq] how many codes [B, Hkv, Tk] of its key head are below it, int32."""
    batch, key_heads, _ = sorted_codes.shape
    found = torch.searchsorted(sorted_codes, codes.reshape(batch, key_heads, -1), out_int32=True)
    return found.view(codes.shape)
