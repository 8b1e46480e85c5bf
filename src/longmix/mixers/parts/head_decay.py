"""Linear attention with one decay per head: Lightning Attention-2, retention and simple gated linear attention.

C_t = exp(f_t) C_{t-1} + k_t v_t^T,    y_t = W_o (gate(W_g x_t) * norm(C_t^T q_t / sqrt(d)))

lightning    f constant, by ALiBi's slopes, gentler in deeper layers (Qin et al. 2024, arXiv 2401.04658)
retention    f constant, log(1 - 2^(-5 - h)), with rotary positions (Sun et al. 2023, arXiv 2307.08621)
simple_gla   f_t = logsigmoid(w . x_t + b) / 16, learned (Yang et al. 2024, arXiv 2312.06635, with a scalar gate)

With `features=gaussian`, q and k are SOFT's Gaussian features of the projections; see `longmix.mixers.parts.landmarks`.
"""

import math
from typing import ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import COUNT, REAL, ModelShape, at_most
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.landmarks import GaussianFeatures
from longmix.mixers.parts.layout import Layout
from longmix.mixers.parts.linear import LinearMixer, LinearOptions
from longmix.mixers.parts.rotary import POSITIONS, Rotary, RotaryScalingOptions, ScalingKind, rotate
from longmix.recipe import Recipe, set_recipe

_LEARNED_DIVISOR = 16.0
"""A learned log decay is logsigmoid of a number around 0, divided by this: it begins at 0.96 a token."""


def alibi_decay(heads: int, layer_index: int, num_layers: int) -> Tensor:
    """-2^(-8 (h + 1) / H), times a factor that falls from 1 in the first layer to 1e-5 in the last: float32 [H]."""
    depth = 1 - layer_index / max(num_layers - 1, 1) + 1e-5
    return -depth * 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)


def retention_decay(heads: int, layer_index: int, num_layers: int) -> Tensor:
    """log(1 - 2^(-5 - h)): float32 [H]."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads).float())))


def no_decay(heads: int, layer_index: int, num_layers: int) -> Tensor:
    """0: float32 [H]."""
    return torch.zeros(heads)


DECAYS = {"alibi": alibi_decay, "retention": retention_decay, "none": no_decay, "learned": None}


class HeadDecayOptions(LinearOptions, RotaryScalingOptions, total=False):
    """The settings that the mixers of this kind share; see `HeadDecay`."""

    num_heads: int | None
    features: str | None
    landmarks: int
    radius: float


class HeadDecay(LinearMixer):
    """Linear attention whose decay depends on the head, and on the token only where it is learned.

    Args:
        shape, layer_index, options: see `LinearMixer`.
        decay: "alibi", "retention", "learned" or "none".
        num_heads: heads; None takes the model's.
        rotary_base, rotary_fraction, rotary_scaling, rotary_factor, rotary_original_length, rotary_options: the rotary
            positions, none by default; see `longmix.mixers.parts.rotary.Rotary.of`.
        activation: "silu" on queries and keys, or "none".
        output_gate: "silu" or "sigmoid".
        features: "gaussian" replaces queries and keys by Gaussian features of so many `landmarks`, at squared length
            `radius`; None leaves them.

    Raises:
        ConfigError: besides those of the base, an unknown word, positions that make no sense.
    """

    changeable: ClassVar = POSITIONS

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "alibi",
        num_heads: int | None = None,
        rotary_base: float | None = None,
        rotary_fraction: float = 1.0,
        rotary_scaling: ScalingKind | None = None,
        rotary_factor: float | None = None,
        rotary_original_length: int | None = None,
        rotary_options: dict[str, float] | None = None,
        activation: str = "none",
        output_gate: str = "silu",
        features: str | None = None,
        landmarks: int = 64,
        radius: float = 1.0,
        **options: Unpack[LinearOptions],
    ) -> None:
        heads = shape.num_heads if num_heads is None else num_heads
        super().__init__(shape, layer_index, num_heads=heads, **options)
        for name, word, words in (
            ("decay", decay, DECAYS),
            ("activation", activation, ("silu", "none")),
            ("output_gate", output_gate, ("silu", "sigmoid")),
        ):
            if word not in words:
                raise ConfigError(f"mixer.{name}={word} is unknown; use {', '.join(words)}.")
        self.rotary = Rotary.of(
            self.key_dim,
            f"mixer.key_factor={options.get('key_factor', 0.5)}",
            rotary_base=rotary_base,
            rotary_fraction=rotary_fraction,
            rotary_scaling=rotary_scaling,
            rotary_factor=rotary_factor,
            rotary_original_length=rotary_original_length,
            rotary_options=rotary_options,
        )
        self.activation, self.gate_activation = activation, output_gate
        at_most(COUNT, landmarks=landmarks)
        at_most(REAL, radius=radius)
        if features not in (None, "gaussian"):
            raise ConfigError(f"mixer.features={features} is unknown; use null or gaussian.")
        if landmarks < 1 or radius <= 0:
            name, value = ("landmarks", landmarks) if landmarks < 1 else ("radius", radius)
            raise ConfigError(f"mixer.{name}={value} must be positive.")
        self.features: GaussianFeatures | None = None
        if features is not None:
            self.features = GaussianFeatures(heads, self.key_dim, landmarks, radius, layer_index)
            self.state_dim = landmarks
        slopes = DECAYS[decay]
        self.decay: nn.Linear | None = None
        if slopes is None:
            self.decay = nn.Linear(self.d_model, self.num_heads)
            nn.init.normal_(self.decay.weight, std=self.d_model**-0.5)
            nn.init.zeros_(self.decay.bias)
            set_recipe(self.decay.weight, Recipe("scalar"))
        else:
            self.register_buffer("log_decay", slopes(self.num_heads, layer_index, shape.num_layers))
        for projection in (self.query, self.key, self.value, self.output_gate):
            nn.init.normal_(projection.weight, std=self.d_model**-0.5)
        nn.init.normal_(self.output.weight, std=self.d_model**-0.5 / math.sqrt(2 * shape.num_layers))

    log_decay: Tensor

    def gates(self, x: Tensor) -> tuple[Tensor, None]:
        """The log decay, in float32 or better; there is no input gate."""
        if self.decay is None:
            return self.log_decay.to(torch.promote_types(x.dtype, torch.float32)), None
        return F.logsigmoid(exact_linear(self.decay, x)) / _LEARNED_DIVISOR, None

    def activate(self, gate: Tensor) -> Tensor:
        """The output gate after its activation."""
        return F.silu(gate) if self.gate_activation == "silu" else gate.sigmoid()

    def query_and_key(self, x: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """Queries and keys, activated, and rotated if so configured."""
        query, key = super().query_and_key(x, layout)
        if self.activation == "silu":
            query, key = F.silu(query), F.silu(key)
        if layout is not None:
            query, key = (rotate(heads, layout.cosine, layout.sine) for heads in (query, key))
        if self.features is not None:
            whitening = self.features.whitening()
            query, key = (self.features(heads, whitening).to(heads.dtype) for heads in (query, key))
        return query, key

    def flops(self, length: int) -> int:
        """As the base says, and the features of queries and keys."""
        return super().flops(length) + (0 if self.features is None else 2 * self.features.flops(length))
