"""Rotary positions whose frequencies depend on the context: CARoPE (arXiv 2507.23083).

    f_t = 1 / (1 + softplus(W x_t + b))                for each key head, in (0, 1)
    phase_i(m) = sum over t <= m of f_t^i              pair i = 0, 1, ... of a head; pair 0 turns one radian a token

Queries and keys are turned by their own phase, so that a pair of tokens sees the sum over the tokens between them. With
W = 0 and b = log(exp(base^(2 / channels) - 1)) these are the rotary positions of that base, and so they begin; as
published b is 0, with which they are not. Only differences of phases matter, so nothing restarts at a document.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.metrics import HighEnd, LowEnd, Mean, Metric
from longmix.mixers.parts.rotary import Rotary, rotate
from longmix.recipe import Recipe, set_recipe

POSITION_KINDS = ("rotary", "context", "none")
"""The words of `mixer.position`."""

_BLOCK = 1024
"""Tokens that are summed up in float32. Over 100,000 tokens its rounding would add up to 2.6e-3 radians."""


def context_positions(
    position: str, rotary: Rotary | None, d_model: int, key_heads: int, pairwise: bool, name: str
) -> "ContextPositions | None":
    """The positions that `mixer.position=context` asks for; None for other words.

    Args:
        position: the word.
        rotary: the rotation that these begin as.
        d_model, key_heads: see `ContextPositions`.
        pairwise: see `SoftmaxAttention`.
        name: the class of the mixer.

    Raises:
        ConfigError: the word is unknown, there is no such rotation, or more than differences of phases shows.
    """
    if position not in POSITION_KINDS:
        raise ConfigError(f"mixer.position={position} is unknown; use {', '.join(POSITION_KINDS)}.")
    if position != "context":
        return None
    if not pairwise:
        raise ConfigError(
            f"mixer.position=context needs scores in which only differences of phases show, and {name} has others; use "
            "mixer.position=rotary."
        )
    if rotary is None:
        raise ConfigError("mixer.position=context begins as the rotary positions of mixer.rotary_base, which is null.")
    if rotary.scaling is not None:
        raise ConfigError(
            f"mixer.position=context has frequencies of its own, so that mixer.rotary_scaling={rotary.scaling.kind} "
            "scales nothing; use mixer.rotary_scaling=null."
        )
    return ContextPositions(d_model, key_heads, rotary.channels, rotary.base)


class ContextPositions(nn.Module):
    """Turns queries and keys by phases that the tokens before them add up to.

    Args:
        d_model: channels of a token.
        key_heads: each has its own phases, which its queries share.
        channels: of a head that turn, the first ones; even.
        base: wavelength base of the rotary positions that these begin as.
    """

    def __init__(self, d_model: int, key_heads: int, channels: int, base: float) -> None:
        super().__init__()
        self.pairs = channels // 2
        self.frequency = nn.Linear(d_model, key_heads)
        nn.init.zeros_(self.frequency.weight)
        step = base ** (2 / channels) - 1
        nn.init.constant_(self.frequency.bias, step + math.log(-math.expm1(-step)))
        set_recipe(self.frequency.weight, Recipe("scalar", weight_decay=False))

    def forward(self, x: Tensor, query: Tensor, key: Tensor, state: object) -> tuple[Tensor, Tensor, Tensor]:
        """Turn queries and keys [B, T, H, head_dim] of the tokens x [B, T, D].

        Args:
            x, query, key: of the same tokens; all heads of keys may come several times, one set after the other.
            state: None, `Slices`, or a state of which `carried` is what this returned for the tokens before.

        Returns:
            Query and key, and the phases of the last token, float64 [B, Hkv, pairs], within a turn.
        """
        steps = self.steps(x)
        total = steps.sum(1, dtype=torch.float64)
        before = _before(state, total)
        cosine, sine = _angles(_phases(steps, before))
        if (times := key.shape[2] // cosine.shape[2]) > 1:
            key = rotate(key, cosine.repeat(1, 1, times, 1), sine.repeat(1, 1, times, 1))
        else:
            key = rotate(key, cosine, sine)
        if query.shape[2] > cosine.shape[2]:
            group = query.shape[2] // cosine.shape[2]
            cosine, sine = cosine.repeat_interleave(group, 2), sine.repeat_interleave(group, 2)
        return rotate(query, cosine, sine), key, (before + total).remainder(2 * math.pi)

    def steps(self, x: Tensor) -> Tensor:
        """What each token x [B, T, D] adds to the phases: [B, T, Hkv, pairs], float32 or better."""
        log_frequency = -torch.log1p(F.softplus(exact_linear(self.frequency, x)))
        return (log_frequency.unsqueeze(-1) * torch.arange(self.pairs, device=x.device)).exp()

    @torch.no_grad()
    def metrics(self, x: Tensor) -> dict[str, Metric]:
        """Of the f of the tokens x [B, T, D], for each key head: the mean, and what 5 % and 95 % lie below."""
        f = (-torch.log1p(F.softplus(exact_linear(self.frequency, x)))).exp()
        found: dict[str, Metric] = {}
        for head, (each, low, high) in enumerate(zip(f.unbind(-1), LowEnd.of_each(f), HighEnd.of_each(f), strict=True)):
            parts = {"mean": Mean.of(each), "low": low, "high": high}
            found |= {f"frequency_{name}_head_{head}": measure for name, measure in parts.items()}
        return found

    def zeros(self, batch: int) -> Tensor:
        """The phases before the first token."""
        weight = self.frequency.weight
        return weight.new_zeros(batch, len(weight), self.pairs, dtype=torch.float64)

    def state_bytes(self) -> int:
        """Bytes of the phases of a row."""
        return 8 * len(self.frequency.weight) * self.pairs

    def flops(self, length: int) -> int:
        """Of the frequencies of `length` tokens."""
        return 2 * length * self.frequency.weight.numel()


def _before(state: object, total: Tensor) -> Tensor:
    """The phases before the tokens whose sum is `total`, both float64 [B, H, pairs]."""
    carried: Tensor | None = getattr(state, "carried", None)
    if isinstance(state, Slices):
        earlier = state.each_before(total).sum(1)
        own: Tensor | None = None if state.carried is None else state.carried.carried
        return earlier if own is None else earlier + own
    return torch.zeros_like(total) if carried is None else carried


def _phases(steps: Tensor, before: Tensor) -> Tensor:
    """Sums over the tokens so far of steps [B, T, H, pairs], in blocks that begin from float64 sums within a turn."""
    length = steps.shape[1]
    if length <= _BLOCK:
        return steps.cumsum(1) + before.remainder(2 * math.pi).to(steps.dtype).unsqueeze(1)
    blocks = F.pad(steps, (0, 0, 0, 0, 0, -length % _BLOCK)).unflatten(1, (-1, _BLOCK))
    totals = blocks[:, :-1].sum(2, dtype=torch.float64)
    starts = torch.cat((before.unsqueeze(1), totals), 1).cumsum(1).remainder(2 * math.pi)
    return (blocks.cumsum(2) + starts.to(steps.dtype).unsqueeze(2)).flatten(1, 2)[:, :length]


def _angles(phases: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, H, channels] as `rotate` takes them."""
    cosine, sine = phases.cos(), phases.sin()
    return torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)
