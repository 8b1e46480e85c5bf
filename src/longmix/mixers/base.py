"""What every sequence mixer promises: one signature, for training, prefill and decode alike."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.measures import Metric


@dataclass(frozen=True)
class ModelShape:
    """The sizes a mixer is told about the model around it."""

    d_model: int
    num_layers: int
    num_heads: int
    norm_eps: float = 1e-6


@dataclass
class MixerOutput:
    """What a mixer returns.

    Attributes:
        y: [B, T, D], dtype of the input.
        state: what the next call needs to continue after these tokens; None unless a state was passed in.
        losses: auxiliary losses by name, scalars with gradients, added to the training loss.
        metrics: by name, logged per layer without further wiring: each a `Measure`, or a detached scalar that is a
            mean over tokens.
        first_value: what a mixer with a value residual gives to those after it.
    """

    y: Tensor
    state: Any = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    first_value: Tensor | None = None


class Mixer(nn.Module):
    """Base of the sequence mixers. A subclass is one file: projections, gates, ordering; an engine does the work.

    `forward` with a state continues the sequence: a prefill in any split followed by single-token steps gives the same
    outputs as one full pass. Without a state it is a full pass from the beginning and returns no state.

    Attributes:
        value_residual: whether `forward` also takes `first_value`, what the first such layer returned as that, or None
            in that layer itself (Zhou et al. 2024, arXiv 2410.17897).
        leaky: whether later tokens change outputs before them; training warns of it, and evaluation refuses it
            unless every prefix is run alone.
    """

    value_residual = False
    leaky = False

    def forward(self, x: Tensor, *, state: Any = None, document_ids: Tensor | None = None) -> MixerOutput:
        """Mix `x` [B, T, D] along T; `document_ids` int32 [B, T] is non-decreasing along T.

        With a state, `document_ids` continue the ids passed before; None continues each row's last document. A state
        may be `longmix.parallel.slices.Slices`: then x is this process's slice of longer rows, and no state comes back.
        """
        raise NotImplementedError

    def init_state(self, batch: int) -> Any:
        """The state before the first token, for `batch` rows."""
        raise NotImplementedError

    def state_bytes(self, length: int) -> int:
        """Bytes of state one row holds after `length` tokens."""
        raise NotImplementedError

    def step_bytes(self, length: int) -> int:
        """Bytes of state that decoding one token after `length` others reads and writes; all of it by default."""
        return self.state_bytes(length)

    def flops(self, length: int) -> int:
        """Floating-point operations of one forward pass over one row of `length` tokens, projections included."""
        raise NotImplementedError


def divided(whole: int, parts: int, whole_key: str, parts_key: str) -> int:
    """`whole // parts`, or a `ConfigError` that names both keys and lists divisors when it does not divide."""
    if parts < 1 or whole % parts:
        divisors = [d for d in range(1, min(whole, 128) + 1) if whole % d == 0]
        raise ConfigError(
            f"{parts_key}={parts} does not divide {whole_key}={whole}; use one of {', '.join(map(str, divisors))}."
        )
    return whole // parts
