"""Biases of attention scores as further columns of queries and keys: FlashBias (arXiv 2505.12044).

    alibi      -s_h (i - j),  s_h = 2^(-8 h / H)                             (Press et al. 2022, arXiv 2108.12409)
    fourier    sum_r a_r cos(w_r (i - j)) + c_r sin(w_r (i - j)),  learned for each head
    low_rank   (A x_i) . (B x_j),  learned, the same for all heads
    forget     c_i - c_j, the gates of the tokens between them, see `ForgetBias`         (FoX, arXiv 2503.02130)

A bias is added after the scores are scaled. One of rank R is R columns, which make attention neither slower by a matrix
of T * T numbers nor larger; in half precision 4 R, as every number is there in two digits. ALiBi has an argument of the
engine where key rows stand in their order, and columns elsewhere.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.base import COUNT, at_most
from longmix.mixers.parts.exact import exact_linear
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.attention import bias_columns

_SLOWEST = math.pi / 8192
"""The smallest frequency at the start: half a turn in 8,192 tokens. The largest is a quarter of a turn a token."""

_WHOLE = 32.0
"""Multiples of it in the sums of forget gates are one column, the rest another."""

KINDS = ("none", "alibi", "fourier", "low_rank", "forget")
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

    def widened(
        self, query: Tensor, key: Tensor, x: Tensor, positions: Tensor, state: object
    ) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """Query and key with the columns, the scale that `attention` takes with them, and what the next call needs.

        Args:
            query, key, x, positions: of the same tokens.
            state: as in `SoftmaxAttention.forward`.
        """
        # The factors of any two calls must fit each other, since keys are cached: so none depends on the others' size.
        return *bias_columns(query, key, *self.factors(x, positions), balanced=False), None

    def zeros(self, batch: int) -> Tensor | None:
        """What a call needs of the tokens before the first one, for `batch` rows; None for nothing."""
        return None

    def state_bytes(self) -> int:
        """Bytes of `zeros` for one row."""
        return 0

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


class ForgetBias(ScoreBias):
    """A forget gate in the softmax: forgetting attention (Lin et al. 2025, arXiv 2503.02130).

        f_t  = sigmoid(W x_t + b)                       one number for each key head, which its queries share
        s_ij = q_i . k_j / sqrt(d) + c_i - c_j,         c_t = sum over u <= t of log f_u

    A key's weight falls by the gates of all tokens behind it. Sums begin anew with each document. Over long ones c
    grows to tens of thousands. It is summed up in float64 and enters as its whole multiples of 32, which two digits of
    half precision hold exactly up to 4 million, and the rest. What is left is the rounding of a score that is summed up
    in float32: 0.004 where c is 45,000, as after 65,536 gates of one half.

    Args:
        d_model: channels of a token.
        heads, key_heads: query heads, and key heads, each of which has a gate.
    """

    rank = 4

    def __init__(self, d_model: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.group = heads // key_heads
        self.gate = nn.Linear(d_model, key_heads)
        nn.init.normal_(self.gate.weight, std=d_model**-0.5)
        nn.init.zeros_(self.gate.bias)
        set_recipe(self.gate.weight, Recipe("scalar"))

    def widened(
        self, query: Tensor, key: Tensor, x: Tensor, positions: Tensor, state: object
    ) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """As the base; the next call needs the sums after the last token, float64 [B, Hkv]."""
        steps = F.logsigmoid(exact_linear(self.gate, x))
        wide = steps.double()
        # Whole numbers add up exactly, so that nothing of one document is left in the rounding of the next.
        parts = wide.detach().floor(), wide - wide.detach().floor()
        whole, rest = (_since_first(part.cumsum(1), positions) for part in parts)
        goes_on = (positions > torch.arange(x.shape[1], device=x.device)).unsqueeze(-1)
        before = self._before(state, (whole + rest)[:, -1]).unsqueeze(1)
        whole = whole + before.floor() * goes_on
        rest = rest + (before - before.detach().floor()) * goes_on
        sums = (whole + rest)[:, -1]
        many = (whole / _WHOLE).floor()
        rest = whole - _WHOLE * many + rest
        more = (rest.detach() / _WHOLE).floor()
        whole, rest = ((many + more).to(steps.dtype), (rest - _WHOLE * more).to(steps.dtype))
        one, many = torch.ones_like(rest), torch.full_like(rest, _WHOLE)
        of_query = torch.stack((many, whole, one, rest), -1)
        if self.group > 1:
            of_query = of_query.repeat_interleave(self.group, 2)
        of_key = torch.stack((-whole, many, -rest, one), -1)
        return *bias_columns(query, key, of_query, of_key, balanced=False), sums

    def _before(self, state: object, own: Tensor) -> Tensor:
        """The sums before these tokens, of the document that goes on; `own` [B, H] are those of the last one here."""
        if not isinstance(state, Slices):
            carried: Tensor | None = getattr(state, "carried", None)
            return torch.zeros_like(own) if carried is None else carried
        earlier = state.each_before(own)
        through = torch.ones_like(earlier[..., 0], dtype=torch.bool)
        if state.filled is not None and state.rank:
            # A slice counts if all those after it have its last document alone.
            after = state.filled[:, 1 : state.rank].flip(1).cumprod(1).flip(1).bool()
            through = torch.cat((after, through[:, :1]), 1)
        before = (earlier * through.unsqueeze(-1)).sum(1)
        sums = None if state.carried is None else state.carried.carried
        if sums is None:
            return before
        reached = state.filled[:, : state.rank].all(1, keepdim=True) if state.filled is not None else through[:, :1]
        return before + sums * reached

    def zeros(self, batch: int) -> Tensor:
        """The sums before the first token."""
        weight = self.gate.weight
        return weight.new_zeros(batch, len(weight), dtype=torch.float64)

    def state_bytes(self) -> int:
        """Bytes of the sums of a row."""
        return 8 * len(self.gate.weight)

    def flops(self, length: int) -> int:
        """Of the gates of `length` tokens."""
        return 2 * length * self.gate.weight.numel()


def _since_first(sums: Tensor, positions: Tensor) -> Tensor:
    """Sums [B, T, H] of a row less those before the first token of each token's document, at positions [B or 1, T]."""
    first = (torch.arange(sums.shape[1], device=sums.device) - positions).clamp(min=0)
    index = first.expand(len(sums), -1).unsqueeze(-1).expand_as(sums)
    return sums - F.pad(sums, (0, 0, 1, 0)).gather(1, index)


def gain_columns(
    kind: str, rank: int, heads: int, key_heads: int, bias: str, takes: bool, key: str
) -> ScoreBias | None:
    """The columns of a gain's logarithm; None for `none`.

    With c_h(i - j) = exp(fourier(i - j)) on the weights after the softmax, y_i = sum_j p_ij c(i - j) v_j (Luo et al.
    2022, URPE, arXiv 2205.13401): weights that positions change whatever the tokens are.

    Args:
        kind: the word of `mixer.gain`.
        rank: `mixer.bias_rank`, how many frequencies.
        heads, key_heads: of queries and keys.
        bias: the word of `mixer.bias`.
        takes: whether the mixer has gains.
        key: the class of the mixer.

    Raises:
        ConfigError: naming the setting.
    """
    if kind not in ("none", "fourier"):
        raise ConfigError(f"mixer.gain={kind} is unknown; use none, fourier.")
    if kind == "none":
        return None
    if not takes:
        raise ConfigError(
            f"mixer.gain={kind} cannot be had in {key}, but in flash, sliding_window and block_sparse; use "
            "mixer.gain=none."
        )
    if bias not in ("none", "alibi"):
        raise ConfigError(f"mixer.gain={kind} and mixer.bias={bias} are both columns of the keys; use one of them.")
    return FourierBias(heads, key_heads, rank)


def score_bias(kind: str, rank: int, d_model: int, heads: int, key_heads: int) -> ScoreBias | None:
    """The columns of a bias, of a word in `KINDS`; None for `none`."""
    if kind == "alibi":
        return DistanceBias(heads)
    if kind == "fourier":
        return FourierBias(heads, key_heads, rank)
    if kind == "forget":
        return ForgetBias(d_model, heads, key_heads)
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
