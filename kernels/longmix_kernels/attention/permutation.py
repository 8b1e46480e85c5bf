"""Take the rows of [B, T, H, D] tensors in another order for every batch row and head, and put them back."""

import torch


def take_rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return row `rows[b, h, i]` of head h as row i, for every batch row b.

    Args:
        x: [B, T, H, ...].
        rows: int32 [B or 1, H or 1, T], a permutation of each head's rows; None leaves `x` as it is.

    Returns:
        [B, T, H, ...]; its memory is head by head.
    """
    if rows is None:
        return x
    batch, length, heads = x.shape[:3]
    taken = _flat(x).index_select(0, _places(x, rows))
    return taken.view(batch, heads, length, *x.shape[3:]).transpose(1, 2)


def put_rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return row i of head h as row `rows[b, h, i]`, which undoes `take_rows`.

    Args:
        x: [B, T, H, ...].
        rows: as in `take_rows`.

    Returns:
        [B, T, H, ...]; contiguous unless `rows` is None.
    """
    if rows is None:
        return x
    result = x.new_empty(x.shape)
    values = x.transpose(1, 2).reshape(-1, *x.shape[3:])
    result.flatten(0, 2).index_copy_(0, _places(x, rows), values)
    return result


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, *x.shape[3:])


def _places(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return where each sorted row lies among the B * T * H rows of x, head by head."""
    batch, length, heads = x.shape[:3]
    head = torch.arange(heads, device=x.device)[:, None]
    row = torch.arange(batch, device=x.device)[:, None, None] * length
    return ((rows + row) * heads + head).flatten()
