"""Statistics of a mixer's matrix: how many tokens count, how far away, with which sign, in how many dimensions.

Statistics are of the shares |a_ij| / sum_j |a_ij| of each row: most mixers here normalise each head after mixing, so
that only shares tell. A row without any mass is left out.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from longmix_kernels.attention import positions_from_document_ids

REACH = 0.9
"""The share of the mass that the receptive field holds."""


def signed_shares(matrix: Tensor) -> Tensor:
    """[..., T, T] with each row divided by the sum of its magnitudes; rows without mass stay 0."""
    mass = matrix.abs().sum(-1, keepdim=True)
    return matrix / mass.masked_fill(mass == 0, 1.0)


@dataclass
class AttentionStatistics:
    """Sums over windows, from which the mean statistics of each head follow.

    Attributes:
        sums: what `window_statistics` gave, summed over windows.
        windows: how many there were.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    windows: int = 0

    @torch.no_grad()
    def update(self, matrix: Tensor, document_ids: Tensor | None = None) -> None:
        """Add the causal matrices [B, H, T, T] of B windows of documents int32 [B, T] (None: one document each)."""
        of_heads = [window_statistics(head, document_ids) for head in matrix.split(1, 1)]  # one at a time, for memory
        for name in of_heads[0]:
            found = torch.cat([head[name] for head in of_heads], 1).sum(0)
            self.sums[name] = self.sums.get(name, 0.0) + found
        self.windows += len(matrix)

    def summary(self) -> list[dict[str, float | list[float]]]:
        """The means of each head.

        Returns:
            for each head `entropy` in nats; `mean_distance` and `receptive_field` (the distance within which `REACH` of
            the mass lies) in tokens; `effective_rank`; the shares `negative_mass` and `first_token_mass` (of the first
            token of the document); and `histogram`, the share of the mass in each of `distance_bins`.
        """
        tensors = {name: total / self.windows for name, total in self.sums.items()}
        profile = tensors.pop("profile")
        length = profile.shape[-1]
        distance = torch.arange(length, dtype=profile.dtype, device=profile.device)
        # A sum that rounds to a hair less than its last term would find no distance; 1e-9 is far above rounding.
        within = profile.cumsum(-1) >= REACH * profile.sum(-1, keepdim=True) - 1e-9
        tensors["mean_distance"] = (profile * distance).sum(-1) / profile.sum(-1).clamp(min=1e-300)
        tensors["receptive_field"] = within.double().argmax(-1).double()
        bins = torch.stack([profile[:, start:stop].sum(-1) for start, stop in distance_bins(length)], -1)
        heads: list[dict[str, float | list[float]]] = []
        for head in range(len(profile)):
            heads.append({name: of_heads[head].item() for name, of_heads in tensors.items()})
            heads[-1]["histogram"] = bins[head].tolist()
        return heads


def window_statistics(matrix: Tensor, document_ids: Tensor | None) -> dict[str, Tensor]:
    """Statistics of the causal matrices [B, H, T, T] of some windows, each [B, H].

    Besides those of `AttentionStatistics.summary` there is `profile` [B, H, T], the share of the mass at each distance.
    """
    signed = signed_shares(matrix.double())
    shares = signed.abs()
    there = (shares.sum(-1) > 0).double()
    rows = there.sum(-1).clamp(min=1)

    def row_mean(x: Tensor) -> Tensor:
        return (x * there).sum(-1) / rows

    return {
        "entropy": row_mean(torch.special.entr(shares).sum(-1)),
        "effective_rank": effective_rank(signed),
        "negative_mass": row_mean(signed.clamp(max=0).abs().sum(-1)),
        "first_token_mass": row_mean(shares.gather(-1, _first_tokens(shares, document_ids)).squeeze(-1)),
        "profile": by_distance(shares) / rows.unsqueeze(-1),
    }


def by_distance(shares: Tensor) -> Tensor:
    """Sums of [..., T, T] along its diagonals: [..., T] by the distance i - j from 0 on."""
    length = shares.shape[-1]
    positions = torch.arange(length, device=shares.device)
    distance = (positions[:, None] - positions).clamp(min=0).flatten().expand(*shares.shape[:-2], -1)
    return shares.new_zeros(shares.shape[:-1]).scatter_add_(-1, distance, shares.tril().flatten(-2))


def distance_bins(length: int) -> list[tuple[int, int]]:
    """Distances `start <= d < stop`: 0, 1, 2-3, 4-7, and so on, up to `length`."""
    powers = [2**n for n in range(max(0, math.ceil(math.log2(length))))] if length > 1 else []
    return list(pairwise([0, *powers, length]))


def effective_rank(matrix: Tensor) -> Tensor:
    """exp of the entropy of the singular values of [..., T, T], divided by their sum (Roy and Vetterli 2007): [...]."""
    values = torch.linalg.svdvals(matrix)
    total = values.sum(-1, keepdim=True)
    return torch.special.entr(values / total.masked_fill(total == 0, 1.0)).sum(-1).exp()


def _first_tokens(shares: Tensor, document_ids: Tensor | None) -> Tensor:
    """Position of the first token of each row's document, [B, H, T, 1]."""
    batch, heads, length, _ = shares.shape
    first = torch.zeros(batch, length, dtype=torch.int64, device=shares.device)
    if document_ids is not None:
        positions = torch.arange(length, device=shares.device)
        first = positions - positions_from_document_ids(document_ids).long()
    return first[:, None, :, None].expand(-1, heads, -1, -1)
