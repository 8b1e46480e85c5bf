"""The language model around the mixers: embedding, pre-norm blocks, head.

Notable: RMSNorm before each branch and before the head; SwiGLU of three separate matrices; an untied head by default;
no positions here, since only some mixers want them; the loss is computed in slices (`model.head`). The model knows
nothing of devices, precision, compilation or parallelism.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longmix.errors import ConfigError
from longmix.mixers.base import Mixer, MixerOutput, ModelShape
from longmix.model.head import token_losses
from longmix.recipe import Recipe, set_recipe

MixerFactory = Callable[[ModelShape, int], Mixer]
"""Builds the mixer of one layer from the model's shape and the layer's index."""


@dataclass
class ModelOutput:
    """What the model returns.

    Attributes:
        hidden: [B, T, D], normalised; `LanguageModel.logits` turns it into scores.
        token_losses: float32 [B, T] in nats when targets were given, else empty.
        state: one entry per layer when a state was passed in.
        losses: auxiliary losses summed over the layers, by name.
        metrics: the mixers' metrics as `layer_<index>/<name>`.
    """

    hidden: Tensor
    token_losses: Tensor
    state: list[Any] | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x), Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, shape: ModelShape, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.d_model, hidden, bias=False)
        self.up = nn.Linear(shape.d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, shape.d_model, bias=False)
        nn.init.normal_(self.gate.weight, std=shape.d_model**-0.5)
        nn.init.normal_(self.up.weight, std=shape.d_model**-0.5)
        nn.init.normal_(self.down.weight, std=hidden**-0.5 / math.sqrt(2 * shape.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def flops(self, length: int) -> int:
        """Forward floating-point operations over one row of `length` tokens."""
        return 2 * length * (self.gate.weight.numel() + self.up.weight.numel() + self.down.weight.numel())


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ModelShape, mixer: Mixer, mlp_hidden: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.mlp = SwiGLU(shape, mlp_hidden)

    def forward(self, x: Tensor, state: Any, document_ids: Tensor | None) -> MixerOutput:
        """The mixer's output with `y` replaced by the block's output [B, T, D]."""
        mixed = self.mixer(self.mixer_norm(x), state=state, document_ids=document_ids)
        x = x + mixed.y
        x = x + self.mlp(self.mlp_norm(x))
        return MixerOutput(y=x, state=mixed.state, losses=mixed.losses, metrics=mixed.metrics)

    def flops(self, length: int) -> int:
        """Forward floating-point operations over one row of `length` tokens."""
        return self.mixer.flops(length) + self.mlp.flops(length)


class LanguageModel(nn.Module):
    """A decoder-only language model whose layers mix the sequence as the factory says.

    Args:
        mixer_factory: builds each layer's mixer.
        vocab_size: token ids are 0 .. vocab_size - 1.
        d_model: width of the residual stream.
        num_layers: number of blocks.
        num_heads: heads that a mixer takes unless its own settings say otherwise.
        mlp_hidden: inner width of the SwiGLU.
        tie_head: let the head share the embedding matrix.
        norm_eps: epsilon of every RMSNorm.
        activation_checkpointing: "block" keeps each block's input for the backward pass and computes the rest again.

    Raises:
        ConfigError: a size below 1, or heads that do not divide; the message names the key.
    """

    def __init__(
        self,
        mixer_factory: MixerFactory,
        vocab_size: int,
        *,
        d_model: int,
        num_layers: int,
        num_heads: int,
        mlp_hidden: int,
        tie_head: bool = False,
        norm_eps: float = 1e-6,
        activation_checkpointing: Literal["none", "block"] = "none",
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "mlp_hidden": mlp_hidden}
        for key, size in sizes.items():
            if size < 1:
                raise ConfigError(f"model.{key}={size} must be at least 1.")
        if norm_eps <= 0:
            raise ConfigError(f"model.norm_eps={norm_eps} must be above 0.")
        self.shape = ModelShape(d_model, num_layers, num_heads, norm_eps)
        self.vocab_size = vocab_size
        self.activation_checkpointing = activation_checkpointing
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            Block(self.shape, mixer_factory(self.shape, index), mlp_hidden) for index in range(num_layers)
        )
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=d_model**-0.5)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5 if tie_head else 1.0)
        if tie_head:
            self.head.weight = self.embedding.weight
        set_recipe(self.embedding.weight, Recipe(role="embedding", weight_decay=False))
        set_recipe(self.head.weight, Recipe(role="embedding", weight_decay=False))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        state: Sequence[Any] | None = None,
        document_ids: Tensor | None = None,
    ) -> ModelOutput:
        """Run `tokens` int64 [B, T]; with `targets` int64 [B, T] the losses come along.

        Args:
            tokens: ids.
            targets: the token each position is to predict; `head.IGNORE_INDEX` for none.
            state: one entry per layer, from `init_state` or an earlier output, to continue after earlier tokens.
            document_ids: int32 [B, T], non-decreasing along T; None means every row is one document.
        """
        x = self.embedding(tokens)
        output = ModelOutput(hidden=x, token_losses=x.new_empty(0), state=None if state is None else [])
        for index, block in enumerate(self.blocks):
            layer_state = None if state is None else state[index]
            if self.activation_checkpointing == "block" and torch.is_grad_enabled():
                result = checkpoint(block, x, layer_state, document_ids, use_reentrant=False)
            else:
                result = block(x, layer_state, document_ids)
            x = result.y
            if output.state is not None:
                output.state.append(result.state)
            for name, loss in result.losses.items():
                output.losses[name] = output.losses.get(name, 0.0) + loss
            output.metrics |= {f"layer_{index}/{name}": value for name, value in result.metrics.items()}
        output.hidden = self.norm(x)
        if targets is not None:
            output.token_losses = token_losses(output.hidden, self.head.weight, targets)
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, float32 or better: [..., D] -> [..., V]."""
        scores = self.head(hidden)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def mixers(self) -> list[Mixer]:
        """The mixer of every layer, first to last."""
        return [cast(Block, block).mixer for block in self.blocks]

    def init_state(self, batch: int) -> list[Any]:
        """Every layer's state before the first token, for `batch` rows."""
        return [mixer.init_state(batch) for mixer in self.mixers()]

    def state_bytes(self, length: int) -> int:
        """Bytes of state one row holds after `length` tokens."""
        return sum(mixer.state_bytes(length) for mixer in self.mixers())

    def flops(self, length: int) -> int:
        """Forward floating-point operations over one row of `length` tokens: matrix products and the mixers' own.

        A training step costs three times as much; norms, activations and rotations are not counted.
        """
        layers = sum(block.flops(length) for block in self.blocks if isinstance(block, Block))
        return layers + 2 * length * self.head.weight.numel()

    def parameter_counts(self) -> dict[str, int]:
        """Exact counts: `total`, `embedding` (a tied head counts once, here) and the rest, `non_embedding`."""
        total = sum(parameter.numel() for parameter in self.parameters())
        embedding = self.embedding.weight.numel()
        return {"total": total, "embedding": embedding, "non_embedding": total - embedding}
