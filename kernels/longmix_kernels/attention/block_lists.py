"""Make lists of blocks for fixed causal block-sparse patterns: sink and local, stripe, butterfly."""

import torch

from longmix_kernels.attention.pattern import BlockList


def block_list(mask: torch.Tensor, size: int) -> BlockList:
    """Return the lists of a mask of blocks.

    Args:
        mask: bool [blocks, blocks], whether a row block (first axis) sees a key block.
        size: how many rows, and how many keys, a block has; a power of two, at least 16.

    Raises:
        ValueError: `mask` is no square, or `size` is not allowed.
    """
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; allowed is torch.bool [blocks, blocks]")
    if size < 16 or size & (size - 1):
        raise ValueError(f"size={size}; allowed are powers of two from 16 on")
    return BlockList(size, *_lists(mask), *_lists(mask.T))


def sink_and_local_blocks(
    length: int, size: int, *, sink: int, local: int, device: torch.device | str | None = None
) -> BlockList:
    """Return lists in which a row sees the first `sink` blocks and the last `local` ones up to its own.

    Source: Xiao et al. 2024, arXiv 2309.17453.

    Args:
        length: how many keys the blocks have to cover, Tk.
        size: how many rows, and how many keys, a block has; a power of two, at least 16.
        sink: how many blocks at the beginning every row sees, from 0 on.
        local: how many blocks up to its own a row sees, its own included.
        device: the device of the lists.

    Raises:
        ValueError: a number is not allowed.
    """
    row, key = _blocks(length, size, device, local=local, sink=sink)
    return block_list((key <= row) & ((key < sink) | (row - key < local)), size)


def stripe_blocks(
    length: int, size: int, *, local: int, stride: int, device: torch.device | str | None = None
) -> BlockList:
    """Return lists in which a row sees the last `local` blocks up to its own, and every `stride`-th block before.

    Source: Child et al. 2019, arXiv 1904.10509.

    Args:
        length, size, local, device: as in `sink_and_local_blocks`.
        stride: how many blocks there are from one stripe to the next; a stripe is the last block of each group of
            `stride`.

    Raises:
        ValueError: a number is not allowed.
    """
    row, key = _blocks(length, size, device, local=local, stride=stride)
    return block_list((key <= row) & ((key % stride == stride - 1) | (row - key < local)), size)


def butterfly_blocks(length: int, size: int, *, device: torch.device | str | None = None) -> BlockList:
    """Return lists in which a row sees its own block and those 1, 2, 4, 8, ... blocks before it.

    These are log2(blocks) + 1 blocks at most: the causal half of the butterfly of FlashAttention's block-sparse variant
    (Dao et al. 2022, arXiv 2205.14135).

    Args:
        length, size, device: as in `sink_and_local_blocks`.

    Raises:
        ValueError: a number is not allowed.
    """
    row, key = _blocks(length, size, device)
    distance = row - key
    return block_list((distance >= 0) & ((distance & (distance - 1)) == 0), size)


def _blocks(
    length: int, size: int, device: torch.device | str | None, **at_least_one: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of row blocks [n, 1] and of key blocks [1, n], and check the arguments."""
    for name, number in {"length": length, **at_least_one}.items():
        least = 0 if name == "sink" else 1
        if number < least:
            raise ValueError(f"{name}={number}; allowed are numbers from {least} on")
    block = torch.arange(-(-length // size), device=device)
    return block[:, None], block[None]


def _lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the offsets and the ascending column numbers of the rows of a mask."""
    offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    offsets[1:] = mask.sum(1).cumsum(0)
    return offsets, mask.nonzero()[:, 1].int()
