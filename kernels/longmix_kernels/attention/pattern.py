"""The pattern of an attention call: which keys a row sees, in which order rows are taken, and what bias is added."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class BlockList(NamedTuple):
    """Lists of the key blocks that each row block sees, and of the row blocks that see each key block.

    Rows and keys are cut into blocks of `size` by their positions, so row and key blocks correspond. The lists hold for
    every batch row and head.

    Attributes:
        size: how many rows, and how many keys, a block has; a power of two, at least 16.
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
        lo: int32 [B or 1, Hq or 1, Tq], the first key that a row sees; None stands for the closed form of `window`, or
            for 0 without a window.
        hi: as `lo`, one past the last key; None stands for the closed form of `causal`.
        query_rows: int32 [B or 1, Hq or 1, Tq], a permutation: row i of the bounds is row `query_rows[i]` of query,
            output and logsumexp. None for the identity.
        key_rows: int32 [B or 1, Hkv or 1, Tk], the same for key and value.
        alibi_slopes: float32 [Hq]: slope * (key row - query row) is added to the scores. Rows are counted before
            permutation, and the last query stands at the last key.
        blocks: the blocks in which a row may see keys within its bounds, or None for all. With blocks, Tk - Tq is a
            multiple of `blocks.size`, and there is no permutation.
        causal, window: as in `attention`; they matter only where bounds are None.
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
        """Return `lo` and `hi`, neither of which may be None."""
        assert self.lo is not None and self.hi is not None
        return self.lo, self.hi
