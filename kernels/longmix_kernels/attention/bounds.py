"""Make and check row bounds, which say by two int32 numbers per row which keys a query row sees.

Query row i sees the contiguous key rows `lo[i] <= j < hi[i]`. Neither bound ever decreases along i, so the score tiles
that any block of rows needs follow from the bounds of its first and last row alone. Causal, windowed, packed and
sorted (bucketed, clustered) attention all have this form. A row with `lo[i] >= hi[i]` sees nothing.

With fewer queries than keys (decoding, chunked prefill) the queries are the *last* rows: query row i stands at key
position `i + keys - queries`.
"""

import torch

from longmix_kernels.runtime import is_readable


def row_bounds(
    queries: int,
    keys: int,
    *,
    causal: bool = True,
    window: int | None = None,
    document_ids: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Build the bounds of causal, windowed and packed attention, in any combination.

    Args:
        queries: how many query rows there are, Tq.
        keys: how many key rows there are, Tk.
        causal: whether a row sees no key after its own position; otherwise it sees its whole document.
        window: how many keys a row sees at most, its own position included; needs `causal`.
        document_ids: int32 or int64 [B, Tk] or [B, H, Tk], non-decreasing along the last axis; rows see their own
            document only. Mixers pass the sorted bucket or cluster ids of each head here.
        device: the device of the bounds; by default that of `document_ids`.

    Returns:
        `lo` and `hi`, int32 [B or 1, H or 1, Tq].

    Raises:
        ValueError: `window` is below 1 or given without `causal`, or `document_ids` has another length or order, or
            there are more queries than keys to say which document they belong to.
    """
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window={window} with causal={causal}; window must be at least 1 and needs causal=True")
    if document_ids is not None:
        _check_document_ids(document_ids, queries, keys)
        device = document_ids.device if device is None else device
    position = torch.arange(keys - queries, keys, dtype=torch.int32, device=device)[None, None]
    lo = torch.zeros_like(position)
    hi = (position + 1).clamp(min=0) if causal else torch.full_like(position, keys)
    if window is not None:
        lo = (hi - min(window, keys)).clamp(min=0)
    if document_ids is not None:
        first, end = _document_extent(document_ids.to(device), queries)
        lo = torch.maximum(lo, first)
        hi = torch.minimum(hi, end)
    return lo, hi


def key_bounds(lo: torch.Tensor, hi: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the transposed bounds, which say which query rows see a key.

    Key row j is seen by exactly the query rows `first[j] <= i < end[j]` with `lo[i] <= j < hi[i]`: the first row whose
    `hi` exceeds j, up to the first row whose `lo` does. A tile of keys is seen from `first` of its first key to `end`
    of its last one.

    Args:
        lo: int32 [B or 1, H or 1, Tq], non-decreasing along the last axis.
        hi: as `lo`.
        keys: how many key rows there are, Tk.

    Returns:
        `first` and `end`, int32 [B or 1, H or 1, Tk], non-decreasing; `first[j] >= end[j]` where no row sees key j.
    """
    lo, hi = torch.broadcast_tensors(lo, hi)
    return rows_up_to(hi, keys), rows_up_to(lo, keys)


def rows_up_to(bound: torch.Tensor, keys: int) -> torch.Tensor:
    """Return for each key j how many rows have a bound of at most j, int32 [B or 1, H or 1, keys].

    Args:
        bound: int32 [B or 1, H or 1, Tq], non-decreasing along the last axis.
        keys: how many key rows there are.
    """
    key = torch.arange(keys, dtype=torch.int32, device=bound.device).expand(*bound.shape[:-1], keys).contiguous()
    return torch.searchsorted(bound.contiguous(), key, right=True, out_int32=True)


def positions_from_document_ids(document_ids: torch.Tensor) -> torch.Tensor:
    """Return each token's position in its own document, int32 [B, T], counted from 0.

    Args:
        document_ids: int32 or int64 [B, T], non-decreasing along T.

    Raises:
        ValueError: `document_ids` has another shape, dtype or order. The order is read on the CPU only.
    """
    _check_document_ids(document_ids, 1, document_ids.shape[-1])
    first = torch.searchsorted(document_ids.contiguous(), document_ids.contiguous(), out_int32=True)
    return torch.arange(document_ids.shape[-1], dtype=torch.int32, device=document_ids.device) - first


def check_row_bounds(lo: torch.Tensor, hi: torch.Tensor, keys: int) -> None:
    """Check that bounds stay within the keys and never decrease.

    This reads values, so on an accelerator it would wait for the device; call it for CPU tensors only.

    Args:
        lo, hi: int32 [B or 1, H or 1, Tq].
        keys: how many key rows there are, Tk.

    Raises:
        ValueError: a bound breaks a rule; the message names the bound, and the first row that is below the one before.
    """
    for name, bound in (("lo", lo), ("hi", hi)):
        falls = (bound[..., 1:] < bound[..., :-1]).flatten(0, -2).any(0)
        if falls.any():
            row = int(falls.int().argmax()) + 1
            raise ValueError(f"{name} must not decrease along its last axis, but row {row} is below row {row - 1}")
    if lo[..., 0].min() < 0 or hi[..., -1].max() > keys:
        least, most = int(lo[..., 0].min()), int(hi[..., -1].max())
        raise ValueError(f"lo starts at {least} and hi ends at {most}; lo must be >= 0 and hi <= {keys}, the keys")


def _document_extent(document_ids: torch.Tensor, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first key, and one past the last key, of every query row's document, int32 [B, H or 1, Tq]."""
    ids = document_ids if document_ids.dim() == 3 else document_ids[:, None]
    ids = ids.contiguous()
    own = ids[..., ids.shape[-1] - queries :].contiguous()
    first = torch.searchsorted(ids, own, out_int32=True)
    end = torch.searchsorted(ids, own, right=True, out_int32=True)
    return first, end


def _check_document_ids(document_ids: torch.Tensor, queries: int, keys: int) -> None:
    shape = list(document_ids.shape)
    if document_ids.dim() not in (2, 3) or shape[-1] != keys:
        raise ValueError(f"document_ids has shape {shape}; allowed are [B, {keys}] and [B, H, {keys}]")
    if document_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"document_ids has dtype {document_ids.dtype}; allowed are torch.int32 and torch.int64")
    if queries > keys:
        raise ValueError(f"document_ids needs a key for every query, but there are {queries} queries and {keys} keys")
    if is_readable(document_ids) and (document_ids[..., 1:] < document_ids[..., :-1]).any():
        raise ValueError("document_ids must not decrease along its last axis")
