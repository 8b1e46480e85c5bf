"""How much an attention pattern has to compute, and how much its tiles compute: counted, never measured.

A visible pair is a query row and a key row that it sees. Tiles are squares of scores: those that hold a visible pair,
or lie between two that do, are computed whole.
"""

from typing import Any

import torch

from longmix_kernels.attention import BlockList, Ordering, order_by_label

BACKWARD_FACTOR = 2.5
"""FLOPs of the backward pass for one of the forward pass, as everyone counts: five products instead of two."""

TILES = (128, 64)

WASTE_SIMULATED = {
    (8192, 16): (1.74, 1.36),
    (8192, 32): (2.43, 1.74),
    (16384, 16): (1.36, 1.18),
    (16384, 32): (1.73, 1.36),
    (32768, 32): (1.37, 1.17),
    (65536, 64): (1.37, 1.18),
}
"""By length and number of buckets: waste with tiles of 128 and 64 that a simulation gave before there was a kernel."""

WASTE_HEADS = 16


def attention_flops(pairs: int, dim: int, backward: bool) -> float:
    """Floating-point operations for scores and values of `dim` columns; with `backward` those of both passes."""
    return 4.0 * dim * pairs * (1 + BACKWARD_FACTOR * backward)


def causal_pairs(length: int) -> int:
    """Pairs of one head in which no row sees a later key."""
    return length * (length + 1) // 2


def visible_pairs(lo: torch.Tensor, hi: torch.Tensor) -> int:
    """Pairs that row bounds [..., T] leave visible, over all leading axes."""
    return int((hi.long() - lo.long()).clamp(min=0).sum())


def block_pairs(blocks: BlockList, length: int) -> int:
    """Pairs of one head that a causal block list leaves visible among `length` rows and keys."""
    row, key = blocks.mask().nonzero().unbind(1)
    rows = (length - row * blocks.size).clamp(max=blocks.size)
    keys = (length - key * blocks.size).clamp(max=blocks.size)
    return int(torch.where(row == key, rows * (rows + 1) // 2, rows * keys * (key < row)).sum())


def ordering_bounds(ordering: Ordering) -> tuple[torch.Tensor, torch.Tensor]:
    """`lo` and `hi` [B, H, T] of an ordering, the implied `hi` written out."""
    if ordering.hi is not None:
        return ordering.lo, ordering.hi
    ends = torch.arange(1, ordering.lo.shape[-1] + 1, dtype=torch.int32, device=ordering.lo.device)
    return ordering.lo, ends.expand_as(ordering.lo)


def tile_scores(lo: torch.Tensor, hi: torch.Tensor, tile: int) -> int:
    """Scores that tiles of `tile` x `tile` compute for row bounds [..., T], over all leading axes.

    A tile of rows walks the keys from `lo` of its first row to `hi` of its last one, as the forward kernel does; where
    masked edges and unmasked middle meet, that may take one step more.
    """
    first = lo.long()[..., ::tile]
    last = torch.arange(tile - 1, lo.shape[-1] + tile - 1, tile, device=lo.device).clamp(max=lo.shape[-1] - 1)
    steps = -((first - hi.long()[..., last]) // tile)
    return int(steps.clamp(min=0).sum()) * tile * tile


def tile_waste(lo: torch.Tensor, hi: torch.Tensor, tile: int) -> float | None:
    """Scores computed for each score needed, at least 1; None if none is needed."""
    pairs = visible_pairs(lo, hi)
    return tile_scores(lo, hi, tile) / pairs if pairs else None


def uniform_labels(batch: int, length: int, heads: int, labels: int, seed: int) -> torch.Tensor:
    """Labels that are uniform and independent in every position and head, int64 [batch, length, heads], on the CPU."""
    return torch.randint(labels, (batch, length, heads), generator=torch.Generator().manual_seed(seed))


def waste_row(length: int, buckets: int, seed: int = 0) -> dict[str, Any]:
    """Tile waste of hash-sparse attention whose queries and keys share uniform buckets, and what was simulated."""
    labels = uniform_labels(1, length, WASTE_HEADS, buckets, seed)
    lo, hi = ordering_bounds(order_by_label(labels, num_labels=buckets))
    pairs, dense = visible_pairs(lo, hi), WASTE_HEADS * causal_pairs(length)
    row: dict[str, Any] = {"length": length, "buckets": buckets, "ideal": dense / pairs}
    for tile, simulated in zip(TILES, WASTE_SIMULATED.get((length, buckets), (None, None)), strict=True):
        scores = tile_scores(lo, hi, tile)
        row |= {
            f"waste_{tile}": scores / pairs,
            f"simulated_{tile}": simulated,
            f"visited_{tile}": dense / scores,
        }
    return row
