"""One layer of the language model, and its style: norms, channel mixing, initial embeddings.

Most mixers are compared inside the same style, `Standard`. RWKV-7 is published with another (`model.rwkv_blocks`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.caches.cache import CacheKind
from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.base import Mixer, MixerOutput, ModelShape
from longmix.mixers.parts.calls import applied, call_of
from longmix.mixers.parts.exact import rounded_once
from longmix.mixers.parts.layout import Layout
from longmix.mixers.parts.rms_norm import RMSNorm
from longmix.mixers.parts.states import check_state, mixer_state
from longmix.mixers.parts.whole_rows import over_whole_rows, takes_slices
from longmix.model.recomputing import keeping_products
from longmix.recipe import Recipe, set_recipe


class BlockStyle(Protocol):
    """The style of the layers around the mixers."""

    def norm(self, shape: ModelShape) -> nn.Module:
        """The norm before each branch and before the head."""
        ...

    def embedding_norm(self, shape: ModelShape) -> nn.Module:
        """What is applied to token embeddings before the first layer."""
        ...

    def channel_mixer(self, shape: ModelShape, layer_index: int, hidden: int) -> Mixer:
        """The second branch of a layer, with about as many weights as a SwiGLU of `hidden`."""
        ...

    def begin(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        """Initialise both and attach their recipes; they may share one matrix."""
        ...


class Standard:
    """RMSNorm, SwiGLU, and embeddings of size 1."""

    def norm(self, shape: ModelShape) -> nn.Module:
        """The norm before each branch and before the head."""
        return RMSNorm(shape.d_model, eps=shape.norm_eps)

    def embedding_norm(self, shape: ModelShape) -> nn.Module:
        """The identity: embeddings have no norm."""
        return nn.Identity()

    def channel_mixer(self, shape: ModelShape, layer_index: int, hidden: int) -> Mixer:
        """A SwiGLU of `hidden` channels."""
        return SwiGLU(shape, hidden)

    def begin(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        """Initialise embedding and head, and attach their recipes."""
        shared = embedding.weight is head.weight
        small = embedding.embedding_dim**-0.5
        nn.init.normal_(head.weight, std=small)
        nn.init.normal_(embedding.weight, std=small if shared else 1.0)
        for weight in (embedding.weight, head.weight):
            set_recipe(weight, Recipe(role="embedding", weight_decay=False))


class SwiGLU(Mixer):
    """W_down (silu(W_gate x) * W_up x), Shazeer 2020, arXiv 2002.05202; it mixes channels and remembers no token."""

    sliced = True
    carries_in_slices = True

    def __init__(self, shape: ModelShape, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.d_model, hidden, bias=False)
        self.up = nn.Linear(shape.d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, shape.d_model, bias=False)
        nn.init.normal_(self.gate.weight, std=shape.d_model**-0.5)
        nn.init.normal_(self.up.weight, std=shape.d_model**-0.5)
        nn.init.normal_(self.down.weight, std=hidden**-0.5 / math.sqrt(2 * shape.num_layers))

    @property
    def closing_weight(self) -> Tensor:
        """The weight of the last product, whose result is the output."""
        return self.down.weight

    def forward(self, x: Tensor, *, state: Any = None, document_ids: Tensor | None = None) -> MixerOutput:
        """Mix the channels of each token of `x` [B, T, D]."""
        x = rounded_once(x)
        hidden = F.silu(applied(self.gate, x)) * applied(self.up, x)
        return MixerOutput(applied(self.down, hidden))

    def init_state(self, batch: int) -> None:
        """The empty state: channels are mixed token by token."""

    def state_bytes(self, length: int) -> int:
        """Bytes of state that one row holds after `length` tokens."""
        return 0

    def flops(self, length: int) -> int:
        """Floating-point operations of one forward pass over one row, projections included."""
        return 2 * length * (self.gate.weight.numel() + self.up.weight.numel() + self.down.weight.numel())


def called(
    mixer: Mixer,
    x: Tensor,
    state: Any,
    document_ids: Tensor | None,
    layout: Layout | None = None,
    **shared: Tensor | None,
) -> MixerOutput:
    """Call a mixer and check its output. A mixer without support for slices gets whole rows.

    Args:
        mixer: any.
        x, state, document_ids: see `Mixer.forward`.
        layout: where the mixer's `layout_needs` ask for one.
        shared: tensors [B, T, ...] that the mixer takes besides, or None.

    Raises:
        ConfigError: it is no `MixerOutput`, or `y` has another shape than x.
    """
    if isinstance(state, Slices) and not takes_slices(mixer, state.carried is not None):
        output = over_whole_rows(mixer, x, state, **shared)
    else:
        made = {} if layout is None else {"layout": layout}
        output = call_of(mixer)(x, state=state, document_ids=document_ids, **made, **shared)
    name = type(mixer).__name__
    if not isinstance(output, MixerOutput):
        raise ConfigError(f"{name}.forward returned a {type(output).__name__}; it must return MixerOutput(y, state).")
    if output.y.shape != x.shape:
        raise ConfigError(f"{name}.forward returned y of shape {list(output.y.shape)}; x has {list(x.shape)}.")
    return output


@mixer_state()
@dataclass
class BlockState:
    """The states of both branches of a layer."""

    mixer: Any
    channel_mixer: Any


class Block(nn.Module):
    """x + mixer(norm(x)), then x + channel_mixer(norm(x)); training zeroes the share `dropout` of both branches."""

    observer: Callable[[Tensor, Tensor], None] | None = None
    """Called in each pass with the mixer's input and output, both [B, T, D]; None for nobody."""

    def __init__(
        self,
        shape: ModelShape,
        style: BlockStyle,
        mixer: Mixer,
        layer_index: int,
        hidden: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.mixer_norm = style.norm(shape)
        self.mixer = mixer
        self.mlp_norm = style.norm(shape)
        self.mlp = style.channel_mixer(shape, layer_index, hidden)

    def forward(
        self,
        x: Tensor,
        state: BlockState | None,
        document_ids: Tensor | None,
        value_residual: Tensor | None,
        layout: Layout | None = None,
        selective: bool = False,
    ) -> MixerOutput:
        """The mixer's output with `y` replaced by the block's output [B, T, D], and `state` by a `BlockState`.

        Args:
            x: [B, T, D].
            state, document_ids: see `Mixer.forward`.
            value_residual: what the first layer with a value residual gave; None before it.
            layout: what the mixer's `layout_needs` ask for; None where it makes that itself.
            selective: keep only what is dear for the backward pass, see `longmix.model.recomputing`.
        """
        inputs = x, state, document_ids, value_residual, layout
        if selective and torch.is_grad_enabled():
            closing = getattr(self.mlp, "closing_weight", None)
            mixed, y, mlp_state = keeping_products(self._mixed, x.shape[-1], closing, *inputs)
        else:
            mixed, y, mlp_state = self._mixed(*inputs)
        return MixerOutput(
            y=y,
            state=None if state is None else BlockState(mixed.state, mlp_state),
            losses=mixed.losses,
            metrics=mixed.metrics,
            value_residual=mixed.value_residual,
        )

    def _mixed(
        self,
        x: Tensor,
        state: BlockState | None,
        document_ids: Tensor | None,
        value_residual: Tensor | None,
        layout: Layout | None,
    ) -> tuple[MixerOutput, Tensor, Any]:
        """The mixer's output, the block's output, and the state of the channel mixer."""
        mixer_state, mlp_state = (None, None) if state is None else (state.mixer, state.channel_mixer)
        normed = applied(self.mixer_norm, x)
        mixed = self._called(normed, mixer_state, document_ids, value_residual, layout)
        if self.observer is not None:
            self.observer(normed, mixed.y)
        x = x + self._dropped(mixed.y)
        channels = called(self.mlp, applied(self.mlp_norm, x), mlp_state, document_ids)
        return mixed, x + self._dropped(channels.y), channels.state

    def mix(
        self,
        normed: Tensor,
        state: Any,
        document_ids: Tensor | None,
        value_residual: Tensor | None,
        layout: Layout | None = None,
    ) -> MixerOutput:
        """The mixer's output alone, for its input [B, T, D] behind the norm.

        Args:
            normed: what the mixer is given.
            state: the mixer's own; see `Mixer.forward`.
            document_ids, value_residual, layout: see `forward`.
        """
        return self._called(normed, state, document_ids, value_residual, layout)

    def _called(
        self,
        normed: Tensor,
        state: Any,
        document_ids: Tensor | None,
        value_residual: Tensor | None,
        layout: Layout | None,
    ) -> MixerOutput:
        """`mix`, for passes inside `forward`: FSDP takes `mix` for a pass of its own, with its own exchanges."""
        shared = {"value_residual": value_residual} if self.mixer.value_residual else {}
        return called(self.mixer, normed, state, document_ids, layout, **shared)

    def _dropped(self, branch: Tensor) -> Tensor:
        return branch if self.dropout is None else self.dropout(branch)

    def init_state(self, batch: int) -> BlockState:
        """The state before the first token, for `batch` rows.

        Raises:
            ConfigError: a branch's state cannot be forked, saved or counted.
        """
        states = [branch.init_state(batch) for branch in (self.mixer, self.mlp)]
        for branch, state in zip((self.mixer, self.mlp), states, strict=True):
            check_state(state, type(branch).__name__, batch)
        return BlockState(*states)

    def decoding_state(self, batch: int, kind: CacheKind) -> BlockState:
        """The state before the first token of `batch` rows of generated text; `Mixer.decoding_state`."""
        begun = self.init_state(batch)
        return BlockState(self.mixer.decoding_state(batch, kind), begun.channel_mixer)

    def state_between_documents(self, batch: int) -> BlockState:
        """The state that training carries at first, for `batch` rows; None for a branch whose state would grow."""
        return BlockState(
            *(
                branch.state_between_documents(batch) if branch.state_is_bounded() else None
                for branch in (self.mixer, self.mlp)
            )
        )

    def slice_state(self, slices: Slices, before: BlockState | None = None) -> BlockState:
        """The state before this process's slice, of rows that begin anew or go on from the state `before` them."""
        if before is None:
            return BlockState(slices, slices)
        states = before.mixer, before.channel_mixer
        return BlockState(*(slices if state is None else slices.carrying(state) for state in states))

    def state_bytes(self, length: int) -> int:
        """Bytes of state that one row holds after `length` tokens."""
        return self.mixer.state_bytes(length) + self.mlp.state_bytes(length)

    def flops(self, length: int) -> int:
        """Forward floating-point operations over one row of `length` tokens."""
        return self.mixer.flops(length) + self.mlp.flops(length)
