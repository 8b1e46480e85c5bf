"""What mixers share whose memory decays and is written to, on the engine that suits their decay.

    S_t = diag(a_t) S_{t-1} + e_t k_t v_t^T,    read_t = s S_t^T q_t

The decay a_t is one number per head (the `linear` engine, which also has the input gate e_t), or one per channel of the
keys (the `delta` engine without its delta rule). A subclass makes the terms of its projections and gates, and says what
becomes of the read.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.mixers.parts.base import COUNT, MixerOutput, at_most, checked_sizes
from longmix.mixers.parts.convolution import ShortConvolution, check_convolution
from longmix.mixers.parts.documents import continued_ids
from longmix.mixers.parts.exact import rounded_once
from longmix.mixers.parts.projections import weight_count
from longmix.mixers.parts.recomputed import recomputed
from longmix.mixers.parts.recurrent import RecurrentMixer, RecurrentState
from longmix.mixers.parts.recurrent_slices import DecayRecurrence
from longmix.mixers.parts.wavelet import CausalWavelet
from longmix_kernels.delta import delta_rule
from longmix_kernels.linear import LinearState, linear_attention


class Terms(NamedTuple):
    """What the engine gets of each token.

    Attributes:
        query, key: [B, T, H, key_dim].
        value: [B, T, H, value_dim].
        log_decay: [B, T, H], or [B, T, H, key_dim] with `channel_decay`, in float32 or better, as `log_input`.
        log_input: [B, T, H], or None for 0; only without `channel_decay`.
        options: further arguments of the engine by name, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    log_input: Tensor | None = None
    options: dict[str, Any] | None = None


class MemoryMixer(RecurrentMixer):
    """Base of mixers with a decaying memory. A subclass sets the attributes and defines `gates`, `terms`, `leave`.

    Attributes:
        d_model: width of the model.
        num_heads, key_dim, value_dim: sizes of the memory.
        scale: factor on the queries.
        channel_decay: whether each channel of the keys has a decay of its own.
        engine: what is called; see `call_engine`.
        projections: names of the layers whose outputs, one beside the other, a short convolution may mix.
        plain: names of further such layers, which it does not mix; their outputs come after them.
        convolution: the short convolution, or what else is called as one; None for none.
        output: the last projection.
    """

    d_model: int
    num_heads: int
    key_dim: int
    value_dim: int
    scale: float
    channel_decay = False
    engine: Any = staticmethod(linear_attention)
    projections: tuple[str, ...] = ("query", "key", "value")
    plain: tuple[str, ...] = ()
    convolution: ShortConvolution | CausalWavelet | None
    output: nn.Linear

    def convolve(self, size: int, channels: int, bias: bool = False) -> None:
        """Set the short convolution of `size` tokens over the channels that `projections` make.

        Raises:
            ConfigError: a convolution of fewer than 2 tokens that is not 0, or out of range.
        """
        at_most(COUNT, convolution=size)
        check_convolution(size)
        self.past, self.recent_channels = max(size - 1, 0), channels
        self.convolution = ShortConvolution(channels, size, bias) if size else None

    def gates(self, x: Tensor) -> Tensor:
        """What decays and input gates are made of, in float32 or better, of the input x [B, T, D]."""
        raise NotImplementedError

    def terms(self, mixed: Tensor, gates: Tensor) -> Terms:
        """The engine's terms, of the projections [B, T, .] after the convolution, the plain ones, and of `gates`."""
        raise NotImplementedError

    def leave(self, read: Tensor, x: Tensor) -> Tensor:
        """What the last projection is given, of the read [B, T, H, value_dim] and the mixer's input."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, *, state: RecurrentState | Slices | None = None, document_ids: Tensor | None = None
    ) -> MixerOutput:
        """Mix `x` [B, T, D] along T, from the beginning or continuing from a state."""
        batch, length = checked_sizes(x, self.d_model, document_ids, state, (RecurrentState, Slices))
        ids = continued_ids(document_ids, state, batch, length)
        rounded = rounded_once(x)
        projected = torch.cat([self.get_submodule(name)(rounded) for name in self.projections], -1)
        plain = [self.get_submodule(name)(rounded) for name in self.plain]
        recent = self.recent(projected, state, ids)
        made = projected, *recent, self.gates(x), *plain
        terms = self._terms(*made) if self.shows_terms(state) else None

        def run(initial: Any, ids: Tensor | None, before: Any) -> tuple[Tensor, Any]:
            if terms is not None:
                return self._call(terms, initial, ids, before)
            return recomputed(self._read, *made, initial, ids, before)

        recurrence = None if terms is None else DecayRecurrence(terms.query, terms.log_decay, self.scale)
        read, carried = self.run_engine(run, recurrence, state, document_ids, batch)
        if terms is not None:
            read = self.recall(read, terms.query)
        left = recomputed(self.leave, read, rounded)
        left, losses, metrics = self.routed(left.unflatten(-1, (self.num_heads, -1)), x, state)
        after = self.next_state(carried, recent, projected, state, document_ids)
        metrics |= self.state_metrics(carried, state, length)
        return MixerOutput(self.output(left.flatten(2)), after, losses, metrics)

    def _terms(self, projected: Tensor, before: Tensor, ids: Tensor | None, gates: Tensor, *plain: Tensor) -> Terms:
        mixed = projected if self.convolution is None else self.convolution(projected, before, ids)
        return self.terms(torch.cat([mixed, *plain], -1) if plain else mixed, gates)

    def _read(self, *arguments: Any) -> tuple[Tensor, Any]:
        *made, initial, ids, before = arguments
        return self._call(self._terms(*made), initial, ids, before)

    def _call(self, terms: Terms, initial: Any, ids: Tensor | None, before: Any) -> tuple[Tensor, Any]:
        """Output [B, T, H, value_dim] and final state of the engine."""
        gates = {} if self.channel_decay else {"log_input": terms.log_input}
        return self.call_engine(
            self.engine,
            terms.query,
            terms.key,
            terms.value,
            log_decay=terms.log_decay,
            scale=self.scale,
            initial_state=initial,
            carried_state=before,
            document_ids=ids,
            **gates,
            **(terms.options or {}),
        )

    def zeros(self, batch: int) -> LinearState | Tensor:
        """The empty memory, for `batch` rows."""
        weight = self.output.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.num_heads, self.key_dim, self.value_dim, dtype=exact)
        return memory if self.channel_decay else LinearState(memory)

    def flops(self, length: int) -> int:
        """Projections, convolution, and per head and token one update and one reading, 2 key_dim * value_dim each."""
        weights = weight_count(self.children())
        convolved = sum(part.flops(length) for part in (self.convolution, self.head_router) if part is not None)
        return 2 * length * weights + convolved + 4 * length * self.num_heads * self.key_dim * self.value_dim


class ChannelMemory(MemoryMixer):
    """The same with a decay for each channel of the keys."""

    channel_decay = True
    engine = staticmethod(delta_rule)
