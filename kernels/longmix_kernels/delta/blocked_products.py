"""Products of decays between the tokens of a chunk, and how rows and columns meet through them.

Row i of a chunk reads column j <= i through the decays of the tokens after j up to i, per channel. To be a product of
matrices, that must split into a factor of i and one of j, and both are at most 1 only if a token between i and j is the
reference. Hence halves: the later half of a chunk reads the earlier one through the products up to each row and after
each column, and so on within each half. No factor is divided by, so this holds for any decay, 0 included.

A few levels of halves cost more than one product of matrices, though. Where decays are bounded the chunk is therefore
one block, whose first token is the reference: the factor of j is the inverse of a product, at most exp(`BLOCK_RANGE`).

Factors of a row use no later token, so tokens change nothing before them, bit for bit. Only if a later decay takes its
run of chunks across the bound are earlier rows of the run rounded differently.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

BLOCK_RANGE = 40.0
"""Largest sum of log decays in a block, taking each for the largest there is.

In base 2 it is 58, and float32 has 126 on either side of 1. Chunks of 16 tokens are blocks for log decays down to -2.5,
chunks of 64 for RWKV-7's (-0.61). If less than that is kept, the gradient of a decay is better not left a difference.
"""


class Documents(NamedTuple):
    """Where documents lie in N chunks of L tokens.

    Attributes:
        ids: [N, L].
        begins: bool [N, L], where a document begins other than at the first token of the sequence.
        carried: bool [N, L], whose rows belong to the document that the entering state is from.
    """

    ids: torch.Tensor
    begins: torch.Tensor
    carried: torch.Tensor


class Meeting:
    """Rows that meet columns: in blocks of a chunk all of both, or rows of later halves those of earlier ones.

    Attributes:
        size: how many rows and columns of each kind meet.
        halves: whether those are of the two halves of a block of twice the size.
        row_factor, column_factor: [N, blocks, size, K].
        reads, writes: [N * blocks, kinds * size, K], rows and columns times their factors; set by who computes them.
    """

    reads: torch.Tensor
    writes: torch.Tensor

    def __init__(self, size: int, halves: bool, prefix: torch.Tensor, suffix: torch.Tensor) -> None:
        """Take the factors from products [N, L, K] up to each row and after each column."""
        self.size, self.halves = size, halves
        self.row_factor = self.rows(prefix.unsqueeze(1)).squeeze(2)
        self.column_factor = self.columns(suffix.unsqueeze(1)).squeeze(2)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """View the rows in [N, kinds, L, K], as [N, blocks, kinds, size, K]."""
        return x.unflatten(2, (-1, self.size * (1 + self.halves)))[:, :, :, -self.size :].transpose(1, 2)

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """View the columns in [N, kinds, L, K], as [N, blocks, kinds, size, K]."""
        return x.unflatten(2, (-1, self.size * (1 + self.halves)))[:, :, :, : self.size].transpose(1, 2)

    def pairs(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """View the pairs in [N, R * L, P * L], as [N, blocks, R, size, P, size]."""
        block = self.size * (1 + self.halves)
        x = x.unflatten(2, (-1, length // block, block)).unflatten(1, (-1, length // block, block))
        return x[:, :, :, -self.size :, :, :, : self.size].diagonal(0, 2, 5).permute(0, 5, 1, 2, 3, 4)


def decay_products(
    decay: torch.Tensor, halve: bool, documents: Documents | None, space: Callable[..., torch.Tensor]
) -> tuple[list[Meeting], torch.Tensor, torch.Tensor]:
    """Multiply decays [N, L, K].

    Args:
        decay: changed.
        halve: whether to halve the chunks down to single tokens.
        documents: where documents begin; products up to a token begin anew there.
        space: gives memory to compute in.

    Returns:
        The meetings that cover all pairs of a chunk, and the products up to each token and of all after it, [N, L, K].
        Products after tokens that are not of the chunk's last document are not to be used.
    """
    length = decay.shape[1]
    if not halve:
        prefix, inner = decay, space("inner", *decay.shape).copy_(decay)
        inner[:, 0] = 1.0
        size = 1
        while size < length:
            _extend(inner, size, documents)
            size *= 2
        outer = torch.reciprocal(inner, out=space("outer", *decay.shape))
        meetings = [Meeting(length, False, inner, outer)]
        suffix = torch.mul(outer, inner[:, -1:], out=space("suffix", *decay.shape))
        first = decay[:, :1].clone()
        if documents is not None:
            first = torch.where((documents.ids == documents.ids[:, :1]).unsqueeze(-1), first, 1.0)
        return meetings, torch.mul(inner, first, out=prefix), suffix

    prefix, suffix = decay, space("suffix_1", *decay.shape).fill_(1.0)
    meetings = [Meeting(1, False, suffix, suffix)]
    size = 1
    while size < length:
        meetings.append(Meeting(size, True, prefix, suffix))
        earlier, total = suffix, prefix.unflatten(1, (-1, 2 * size))[:, :, -1:]
        size *= 2
        prefix = space(f"prefix_{size}", *decay.shape).copy_(prefix)
        suffix = space(f"suffix_{size}", *decay.shape).copy_(earlier)
        suffix.unflatten(1, (-1, size))[:, :, : size // 2].mul_(total)
        _extend(prefix, size // 2, documents)
    return meetings, prefix, suffix


def _extend(prefix: torch.Tensor, size: int, documents: Documents | None) -> None:
    """Turn products from the beginning of blocks of `size` into those from the beginning of blocks of twice that."""
    blocks = prefix.unflatten(1, (-1, 2 * size))
    factor = blocks[:, :, size - 1 : size]
    if documents is not None:
        ids = documents.ids.unflatten(1, (-1, 2 * size)).unsqueeze(-1)
        factor = torch.where(ids[:, :, size:] == ids[:, :, size - 1 : size], factor, 1.0)
    blocks[:, :, size:].mul_(factor)
