"""Biases of attention scores as further columns of queries and keys: FlashBias (arXiv 2505.12044).

    alibi      -s_h (i - j),  s_h = 2^(-8 h / H)                             (Press et al. 2022, arXiv 2108.12409)
    fourier    sum_r a_r cos(w_r (i - j)) + c_r sin(w_r (i - j)),  learned for each head
    low_rank   (A x_i) . (B x_j),  learned, the same for all heads

A bias is added after the scores are scaled. One of rank R is R columns, which make attention neither slower by a matrix
of T * T numbers nor larger; in half precision 4 R, as every number is there in two digits. ALiBi has an argument of the
engine where key rows stand in their order, and columns elsewhere.
"""

import math

import torch
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import COUNT, at_most
from longmix.mixers.parts.exact import exact_linear
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.attention import bias_columns

_SLOWEST = math.pi / 8192
"""The smallest frequency at the start: half a turn in 8,192 tokens. The largest is a quarter of a turn a token."""

KINDS = ("none", "alibi", "fourier", "low_rank")
"""The words of `mixer.bias`."""


class ScoreBias(nn.Module):
    """Base of the biases that are columns.

    Attributes:
        rank: how many there are, each in one number.
    """

    rank: int

    def factors(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors whose inner product is the bias, of tokens x [B, T, D] at positions [B or 1, T].

        Returns:
            Of queries [B or 1, T, H or 1, rank] and of keys [B or 1, T, Hkv or 1, rank], in float32 or better.
        """
        raise NotImplementedError

    def widened(self, query: Tensor, key: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, float]:
        """Query and key with the columns, and the scale that `attention` takes with them."""
        # The factors of any two calls must fit each other, since keys are cached: so none depends on the others' size.
        return bias_columns(query, key, *self.factors(x, positions), balanced=False)

    def columns(self, dtype: torch.dtype) -> int:
        """How many columns a key of a dtype has."""
        return self.rank * (4 if dtype.itemsize == 2 else 1)

    def flops(self, length: int) -> int:
        """Of the factors of `length` tokens, as far as they are matrix products."""
        return 0


class DistanceBias(ScoreBias):
    """ALiBi as two columns."""

    rank = 2

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def factors(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Their inner product is -slope (i - j)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        place = positions.to(exact)[..., None, None]
        slope = alibi_slopes(self.heads, x.device).to(exact)[None, None, :, None]
        one = torch.ones_like(place)
        return torch.cat((-slope * place, slope * one), -1), torch.cat((one, place), -1)


class FourierBias(ScoreBias):
    """A learned function of the distance.

    Args:
        heads: each query head has its own amplitudes.
        key_heads: each key head has its own frequencies.
        frequencies: how many; the bias has twice the rank.
    """

    def __init__(self, heads: int, key_heads: int, frequencies: int) -> None:
        super().__init__()
        self.rank = 2 * frequencies
        self.cosine, self.sine = (nn.Parameter(torch.zeros(heads, frequencies)) for _ in range(2))
        steps = torch.linspace(0, 1, frequencies) if frequencies > 1 else torch.zeros(1)
        fastest = math.pi / 2
        self.frequency = nn.Parameter((fastest * (_SLOWEST / fastest) ** steps).repeat(key_heads, 1))
        for parameter in self.parameters():
            set_recipe(parameter, Recipe("scalar", weight_decay=False))

    def factors(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions; the amplitudes are in those of the queries."""
        exact = torch.promote_types(x.dtype, torch.float32)
        angles = positions.to(exact)[..., None, None] * self.frequency.to(exact)
        cosine, sine = angles.cos(), angles.sin()
        key = torch.cat((cosine, sine), -1)
        group = len(self.cosine) // len(self.frequency)
        if group > 1:
            cosine, sine = cosine.repeat_interleave(group, 2), sine.repeat_interleave(group, 2)
        a, c = self.cosine.to(exact), self.sine.to(exact)
        return torch.cat((a * cosine + c * sine, a * sine - c * cosine), -1), key


class LowRankBias(ScoreBias):
    """A learned function of the two tokens.

    Args:
        d_model: channels of a token.
        rank: see `ScoreBias`.
    """

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.query, self.key = (nn.Linear(d_model, rank, bias=False) for _ in range(2))
        nn.init.zeros_(self.query.weight)  # so that there is no bias at first
        nn.init.normal_(self.key.weight, std=d_model**-0.5)
        for layer in (self.query, self.key):
            set_recipe(layer.weight, Recipe("scalar"))

    def factors(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Projections of the tokens."""
        query, key = (exact_linear(layer, x).unsqueeze(2) for layer in (self.query, self.key))
        return query, key

    def flops(self, length: int) -> int:
        """Of the projections."""
        return 4 * length * self.query.weight.numel()


def score_bias(kind: str, rank: int, d_model: int, heads: int, key_heads: int) -> ScoreBias | None:
    """The columns of a bias, of a word in `KINDS`; None for `none`."""
    if kind == "alibi":
        return DistanceBias(heads)
    if kind == "fourier":
        return FourierBias(heads, key_heads, rank)
    return LowRankBias(d_model, rank) if kind == "low_rank" else None


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """ALiBi's slopes 2^(-8 h / H) for h = 1 .. H: float32 [H]."""
    return torch.exp2(-8 * torch.arange(1, heads + 1, device=device, dtype=torch.float64) / heads).float()


def check_bias(kind: str, rank: int, takes: bool, key: str) -> None:
    """Refuse a bias that a mixer cannot have.

    Args:
        kind: the word of `mixer.bias`.
        rank: `mixer.bias_rank`.
        takes: whether the mixer has biases.
        key: the class of the mixer.

    Raises:
        ConfigError: naming the setting.
    """
    if kind not in KINDS:
        raise ConfigError(f"mixer.bias={kind} is unknown; use {', '.join(KINDS)}.")
    at_most(COUNT, bias_rank=rank)
    if rank < 1:
        raise ConfigError(f"mixer.bias_rank={rank} must be at least 1.")
    if kind != "none" and not takes:
        raise ConfigError(
            f"mixer.bias={kind} needs scores that are computed pair by pair, and {key} has others; use mixer.bias=none."
        )
