"""What an attention call is besides query, key and value: which keys a row sees, in which order, with what bias."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class BlockList(NamedTuple):
    """Which blocks of keys each block of rows sees, both ways round; the same for every batch row and head.

    Rows and keys are cut into blocks of `size`, counted by position, so row and key blocks correspond.

    Attributes:
        size: rows, and keys, of a block; a power of two, at least 16.
        row_offsets: int32 [blocks + 1]; row block r sees `row_blocks[row_offsets[r] : row_offsets[r + 1]]`.
        row_blocks: int32 [n], ascending for each row block.
        key_offsets: int32 [blocks + 1]; key block c is seen by `key_blocks[key_offsets[c] : key_offsets[c + 1]]`.
        key_blocks: int32 [n], ascending for each key block.
    """

    size: int
    row_offsets: torch.Tensor
    row_blocks: torch.Tensor
    key_offsets: torch.Tensor
    key_blocks: torch.Tensor

    def mask(self) -> torch.Tensor:
        """Return bool [blocks, blocks]: whether a row block (first axis) sees a key block."""
        blocks = self.row_offsets.shape[0] - 1
        lengths = self.row_offsets.diff().long()
        rows = torch.arange(blocks, device=lengths.device).repeat_interleave(lengths)
        mask = torch.zeros(blocks, blocks, dtype=torch.bool, device=lengths.device)
        mask[rows, self.row_blocks.long()] = True
        return mask


@dataclass(frozen=True)
class Pattern:
    """Which keys each query row sees, in which order rows are taken, and what is added to their scores.

    Attributes:
        lo: int32 [B or 1, Hq or 1, Tq], first key that a row sees. None only where the closed form of `window` (or 0)
            is to be used instead.
        hi: as `lo`, one past the last key; None only where the closed form of `causal` is to be used instead.
        query_rows: int32 [B or 1, Hq or 1, Tq], a permutation: row i of the bounds is row `query_rows[i]` of query,
            output and logsumexp. None for the identity.
        key_rows: int32 [B or 1, Hkv or 1, Tk], the same for key and value.
        alibi_slopes: float32 [Hq]: slope * (key row - query row) is added to the scores, counted before permutation,
            the last query standing at the last key.
        blocks: what a row may see of the keys within its bounds; Tk - Tq is a multiple of `blocks.size` then, and
            there is no permutation.
        causal, window: read where bounds are None.
    """

    lo: torch.Tensor | None = None
    hi: torch.Tensor | None = None
    query_rows: torch.Tensor | None = None
    key_rows: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    blocks: BlockList | None = None
    causal: bool = True
    window: int | None = None

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `lo` and `hi`, which must be there."""
        assert self.lo is not None and self.hi is not None
        return self.lo, self.hi
