"""Taking the rows of [B, T, H, D] tensors in another order for every batch row and head, and putting them back."""

import torch


def take_rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return row `rows[b, h, i]` of head h as row i: [B, T, H, ...] -> [B, T, H, ...], kept head by head in memory.

    Args:
        x: [B, T, H, ...].
        rows: int32 [B or 1, H or 1, T], a permutation of each head's rows; None leaves `x` as it is.
    """
    if rows is None:
        return x
    batch, length, heads = x.shape[:3]
    taken = _flat(x).index_select(0, _places(x, rows))
    return taken.view(batch, heads, length, *x.shape[3:]).transpose(1, 2)


def put_rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Undo `take_rows`: row i of head h becomes row `rows[b, h, i]`; the result is contiguous."""
    if rows is None:
        return x
    result = x.new_empty(x.shape)
    values = x.transpose(1, 2).reshape(-1, *x.shape[3:])
    result.flatten(0, 2).index_copy_(0, _places(x, rows), values)
    return result


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, *x.shape[3:])


def _places(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Where each sorted row lies in [B * T * H], head by head."""
    batch, length, heads = x.shape[:3]
    head = torch.arange(heads, device=x.device)[:, None]
    row = torch.arange(batch, device=x.device)[:, None, None] * length
    return ((rows + row) * heads + head).flatten()
