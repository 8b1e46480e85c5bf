"""Which blocks of earlier keys a query chooses: the highest scores among a run of blocks, without a gradient.

Scores are made for some queries at a time, so that memory does not grow with their number times that of the blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SCORES_AT_ONCE = 2**22
"""The most scores that are held at a time."""


@torch.no_grad()
def chosen_blocks(
    scores_of: Callable[[slice], Tensor], queries: int, first: Tensor, end: Tensor, keep: int, scores_a_query: int
) -> Tensor:
    """The `keep` blocks with the highest scores of each query, the earlier one of equal ones: int64 [B, Tq, H, keep].

    Args:
        scores_of: the scores [B, n, H, N] of a slice of queries for all N blocks; all heads choose for themselves.
        queries: how many there are, Tq.
        first: integer [B or 1, Tq], the first block that a query may choose.
        end: likewise, one past the last. Where there are fewer than `keep`, N fills what is left.
        keep: how many.
        scores_a_query: how many scores `scores_of` holds for one query of all rows.
    """
    step = max(1, SCORES_AT_ONCE // max(scores_a_query, 1))
    found = []
    for start in range(0, queries, step):
        some = slice(start, start + step)
        scores = scores_of(some)
        number = torch.arange(scores.shape[-1], device=scores.device)
        allowed = (number >= first[:, some, None, None]) & (number < end[:, some, None, None])
        # A stable sort, since `topk` leaves open which of equal scores comes first, and every split must agree.
        hidden = scores.masked_fill(~allowed, -torch.inf)
        order = torch.sort(hidden, dim=-1, descending=True, stable=True).indices[..., :keep]
        found.append(torch.where(allowed.expand_as(scores).gather(-1, order), order, scores.shape[-1]))
    return torch.cat(found, 1)


def gathered(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, H, n] of x [B, S, Hkv, D] for each head, Hkv a divisor of H: [B, n, H, D]; rows past the last are it."""
    group = rows.shape[1] // x.shape[2]
    index = rows.clamp(max=x.shape[1] - 1).unflatten(1, (-1, group)).flatten(2)
    taken = x.transpose(1, 2).gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))
    return taken.unflatten(2, (group, -1)).flatten(1, 2).transpose(1, 2)


def listed_rows(
    chosen: Tensor, none: int, first: Tensor, size: int, tail: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """The rows of chosen blocks, those of the last choice first, and then of a run of rows.

    Args:
        chosen: integer [B, H, n], numbers of blocks; those that are `none` come last.
        none: the number of no block.
        first: integer [B], the first row of block 0.
        size: rows of a block.
        tail: integer [B], the first row of the run.
        length: rows of the run.

    Returns:
        Rows [B, H, n * size + length], and how many at the beginning are of no block, int32 [B, H].
    """
    chosen = chosen.flip(-1)
    inside = torch.arange(size, device=chosen.device)
    rows = (first[:, None, None, None] + chosen[..., None] * size + inside).flatten(2)
    run = tail[:, None, None] + torch.arange(length, device=chosen.device)
    missing = (chosen == none).sum(-1, dtype=torch.int32) * size
    return torch.cat((rows, run.expand(-1, chosen.shape[1], -1)), -1), missing
