"""The layers of RWKV-7 around its time mixing (Peng et al. 2025, arXiv 2503.14456, section 4 and appendix).

    k_t = lerp(x_t, x_{t-1}, mu),    y_t = W_2 relu(W_1 k_t)^2

Notable: LayerNorm with bias, also on the embeddings, which therefore may begin as small as 1e-4; what ends a branch
begins at zero; embedding and head take weight decay.
"""

import math

import torch
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.base import Mixer, MixerOutput, ModelShape, checked_sizes
from longmix.mixers.parts.convolution import token_shift
from longmix.mixers.parts.documents import continued_ids
from longmix.mixers.parts.recurrent import RecurrentMixer, RecurrentState
from longmix.recipe import Recipe, set_recipe


class RWKVBlocks:
    """A `longmix.model.blocks.BlockStyle`: LayerNorm, and channel mixing with a token shift.

    Args:
        channel_factor: inner width of the channel mixing over that of the model, 4 as published; None makes it as large
            as the SwiGLU that it stands for, so that models of one `mlp_hidden` have about as many weights.

    Raises:
        ConfigError: a factor that is not positive.
    """

    def __init__(self, channel_factor: float | None = None) -> None:
        if channel_factor is not None and channel_factor <= 0:
            raise ConfigError(f"model.block.channel_factor={channel_factor} must be positive, or null.")
        self.channel_factor = channel_factor

    def norm(self, shape: ModelShape) -> nn.Module:
        """The norm before each branch and before the head."""
        return nn.LayerNorm(shape.d_model, eps=shape.norm_eps)

    def embedding_norm(self, shape: ModelShape) -> nn.Module:
        """A LayerNorm of the embeddings."""
        return self.norm(shape)

    def channel_mixer(self, shape: ModelShape, layer_index: int, hidden: int) -> Mixer:
        """Two matrices of 3/2 the width instead of three, unless `channel_factor` says how wide they are."""
        # This is never 2 modulo 3, as 4 d_model is at 2048 and at half of all powers of two: hence the factor.
        width = 3 * hidden // 2 if self.channel_factor is None else round(self.channel_factor * shape.d_model)
        return ChannelMix(shape, layer_index, max(1, width))

    def begin(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        """Uniform embeddings, and an orthogonal head; a shared matrix begins as the head."""
        vocabulary, width = head.weight.shape
        nn.init.uniform_(embedding.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(head.weight, gain=0.5 * math.sqrt(max(1.0, vocabulary / width)))
        for weight in (embedding.weight, head.weight):
            set_recipe(weight, Recipe(role="embedding"))


class ChannelMix(RecurrentMixer):
    """RWKV-7's channel mixing. The head of this file has the equations.

    Args:
        shape: sizes of the model.
        layer_index: which layer this is, from 0.
        hidden: inner width.
    """

    past = 1

    def __init__(self, shape: ModelShape, layer_index: int, hidden: int) -> None:
        super().__init__()
        self.recent_channels = shape.d_model
        channels = torch.arange(shape.d_model) / shape.d_model
        self.shift = nn.Parameter(1 - channels ** ((1 - layer_index / shape.num_layers) ** 4))
        self.key = nn.Linear(shape.d_model, hidden, bias=False)
        self.value = nn.Linear(hidden, shape.d_model, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    @property
    def closing_weight(self) -> Tensor:
        """The weight of the last product, whose result is the output."""
        return self.value.weight

    def forward(
        self, x: Tensor, *, state: RecurrentState | Slices | None = None, document_ids: Tensor | None = None
    ) -> MixerOutput:
        """Mix the channels of each token of `x` [B, T, D] with those of the token before it."""
        ids = continued_ids(document_ids, state, *checked_sizes(x, self.recent_channels, document_ids, state))
        recent = self.recent(x, state, ids)
        mixed = x + (token_shift(x, *recent) - x) * self.shift.to(x.dtype)
        hidden = self.key(mixed).relu().square()
        return MixerOutput(self.value(hidden), self.next_state(None, recent, x, state, document_ids))

    def zeros(self, batch: int) -> None:
        """The empty state: channel mixing remembers only the token before."""

    def flops(self, length: int) -> int:
        """Floating-point operations of one forward pass over one row, projections included."""
        return 2 * length * (self.key.weight.numel() + self.value.weight.numel())
