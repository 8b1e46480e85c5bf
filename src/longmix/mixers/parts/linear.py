"""What the mixers on scalar-gated linear attention share: projections, output gate, head-wise norm, recurrent state.

    C_t = exp(f_t) C_{t-1} + exp(i_t) k_t v_t^T,    y_t = W_o (gate(x_t) * norm(C_t^T q_t / sqrt(d)))

A subclass says what the decay f_t and the input gate i_t are.
"""

from typing import TypedDict

import torch
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.base import COUNT, FACTOR, MixerOutput, ModelShape, at_most, checked_sizes, divided
from longmix.mixers.parts.convolution import ShortConvolution, check_convolution
from longmix.mixers.parts.documents import continued_ids
from longmix.mixers.parts.exact import exact_linear, rounded_once
from longmix.mixers.parts.head_gates import head_router
from longmix.mixers.parts.layout import Layout, LayoutNeeds, layout_after
from longmix.mixers.parts.norms import NORMS, HeadwiseNorm, check_norm_eps
from longmix.mixers.parts.projections import weight_count
from longmix.mixers.parts.recurrent import Recurrence, RecurrentMixer, RecurrentState
from longmix.mixers.parts.recurrent_slices import DecayRecurrence, NormalizedRecurrence
from longmix.mixers.parts.rotary import Rotary
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.linear import LinearState, linear_attention


class LinearOptions(TypedDict, total=False):
    """The settings that all mixers on this engine share; see `LinearMixer`."""

    key_factor: float
    norm: str
    norm_eps: float
    normaliser: str | None
    convolution: int
    heads_shared: int
    heads_kept: int | None
    heads_balance: float


class LinearMixer(RecurrentMixer):
    """Base of the mixers on the `linear` engine; a subclass defines `gates` and initialises its own weights.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0.
        num_heads: heads, each with its own state.
        normalize: divide by the normaliser, as mLSTM's exponential gate needs.
        key_factor: width of queries and keys as a share of the model's; values are as wide as the model.
        norm, norm_eps: head-wise norm of what is read from the state: "rms", "layer" or "none".
        normaliser: "exponential" divides what each head reads by exp(w . x_t), w learned (Sieber et al. 2024, arXiv
            2405.15731); None does not. The norm would divide it out again, so that it must be "none".
        convolution: tokens that a short convolution mixes for queries, keys and gates; 0 for none.
        heads_shared, heads_kept, heads_balance: a mixture of heads, see `longmix.mixers.parts.head_gates.HeadRouter`,
            on what the head-wise norm returns; none with `heads_kept` None.

    Raises:
        ConfigError: heads that do not divide, an unknown norm or normaliser, a normaliser that the norm divides out, a
            convolution of fewer than 2 tokens, a number out of range.
    """

    rotary: Rotary | None = None

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        num_heads: int,
        normalize: bool = False,
        key_factor: float = 0.5,
        norm: str = "rms",
        norm_eps: float = 1e-6,
        normaliser: str | None = None,
        convolution: int = 0,
        heads_shared: int = 0,
        heads_kept: int | None = None,
        heads_balance: float = 0.01,
    ) -> None:
        super().__init__()
        check_norm_eps(norm_eps)
        at_most(COUNT, convolution=convolution)
        if not 0 < key_factor <= FACTOR:
            raise ConfigError(f"mixer.key_factor={key_factor} must be positive and at most {FACTOR}.")
        self.d_model, self.num_heads, self.normalize = shape.d_model, num_heads, normalize
        self.value_dim = divided(shape.d_model, num_heads, "model.d_model", "mixer.num_heads")
        key_width = round(key_factor * shape.d_model)
        if key_width < 1:
            raise ConfigError(
                f"mixer.key_factor={key_factor} of model.d_model={shape.d_model} must be at least a channel."
            )
        self.key_dim = divided(key_width, num_heads, "mixer.key_factor * model.d_model", "mixer.num_heads")
        self.state_dim = self.key_dim
        check_convolution(convolution)
        if norm not in (*NORMS, "none"):
            raise ConfigError(f"mixer.norm={norm} is unknown; use rms, layer or none.")
        if normaliser not in (None, "exponential"):
            raise ConfigError(f"mixer.normaliser={normaliser} is unknown; use null or exponential.")
        if normaliser == "exponential" and norm != "none":
            raise ConfigError(
                f"mixer.normaliser=exponential scales what each head reads, which mixer.norm={norm} divides out again; "
                "use mixer.norm=none."
            )
        self.query = nn.Linear(self.d_model, key_width, bias=False)
        self.key = nn.Linear(self.d_model, key_width, bias=False)
        self.value = nn.Linear(self.d_model, self.d_model, bias=False)
        self.output_gate = nn.Linear(self.d_model, self.d_model, bias=False)
        self.output = nn.Linear(self.d_model, self.d_model, bias=False)
        self.head_norm = None if norm == "none" else HeadwiseNorm(num_heads, self.value_dim, norm, norm_eps)
        self.normaliser: nn.Linear | None = None
        if normaliser == "exponential":
            self.normaliser = nn.Linear(self.d_model, num_heads, bias=False)
            nn.init.zeros_(self.normaliser.weight)
            set_recipe(self.normaliser.weight, Recipe("scalar"))
        self.convolution = ShortConvolution(self.d_model, convolution) if convolution else None
        self.past, self.recent_channels = max(convolution - 1, 0), shape.d_model
        self.head_router = head_router(
            self.d_model, num_heads, heads_shared, heads_kept, heads_balance, shape.num_layers
        )

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log decay [B, T, H] or [H], and log input gate [B, T, H] or None, in float32 or better, of x [B, T, D]."""
        raise NotImplementedError

    def activate(self, gate: Tensor) -> Tensor:
        """Activation of the output gate."""
        return gate.sigmoid()

    def layout_needs(self) -> LayoutNeeds | None:
        """The rotation, if there is one."""
        return None if self.rotary is None else LayoutNeeds(self.rotary)

    def query_and_key(self, x: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """Query and key [B, T, H, state_dim] of x [B, T, D]; with a `rotary` the layout of its tokens is given."""
        return self.query(x).unflatten(-1, (self.num_heads, -1)), self.key(x).unflatten(-1, (self.num_heads, -1))

    def forward(
        self,
        x: Tensor,
        *,
        state: RecurrentState | Slices | None = None,
        document_ids: Tensor | None = None,
        layout: Layout | None = None,
    ) -> MixerOutput:
        """Mix `x` [B, T, D] along T, from the beginning or after a state; see `SoftmaxAttention` for `layout`."""
        batch, length = checked_sizes(x, self.d_model, document_ids, state, (RecurrentState, Slices))
        ids = continued_ids(document_ids, state, batch, length)
        need = self.layout_needs()
        if need is not None and (layout is None or isinstance(state, RecurrentState)):
            layout = layout_after(need, state, document_ids, length, x.device)
        recent = self.recent(x, state, ids)
        mixed = x if self.convolution is None else self.convolution(x, *recent)
        rounded = rounded_once(x)
        query, key = self.query_and_key(rounded if mixed is x else rounded_once(mixed), layout)
        value = self.value(rounded).unflatten(-1, (self.num_heads, -1))
        log_decay, log_input = self.gates(mixed)

        def run(
            initial: LinearState | None, ids: Tensor | None, before: LinearState | None
        ) -> tuple[Tensor, LinearState]:
            return self.call_engine(
                linear_attention,
                query,
                key,
                value,
                log_decay=log_decay,
                log_input=log_input,
                normalize=self.normalize,
                initial_state=initial,
                carried_state=before,
                document_ids=ids,
            )

        recurrence: Recurrence = DecayRecurrence(query, log_decay, self.state_dim**-0.5)
        if self.normalize and log_input is not None:
            recurrence = NormalizedRecurrence(key, value, log_decay, log_input)
        read, carried = self.run_engine(run, recurrence, state, document_ids, batch)
        heads, losses, metrics = self.routed(self.normed(self.recall(read, query), x), x, state)
        gated = self.activate(self.output_gate(rounded)) * heads.flatten(2)
        after = self.next_state(carried, recent, x, state, document_ids)
        return MixerOutput(self.output(gated), after, losses, self.state_metrics(carried, state, length) | metrics)

    def normed(self, read: Tensor, x: Tensor) -> Tensor:
        """The read [B, T, H, value_dim] of tokens x [B, T, D] after the normaliser and the head-wise norm."""
        if self.normaliser is not None:
            return (read * (-exact_linear(self.normaliser, x)).exp().unsqueeze(-1)).to(read.dtype)
        return read if self.head_norm is None else self.head_norm(read)

    def zeros(self, batch: int) -> LinearState:
        """The empty memory, for `batch` rows."""
        weight = self.value.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.num_heads, self.state_dim, self.value_dim, dtype=exact)
        if not self.normalize:
            return LinearState(memory)
        return LinearState(memory, memory.new_zeros(memory.shape[:3]), memory.new_zeros(memory.shape[:2]))

    def flops(self, length: int) -> int:
        """Projections, and per head and token one update and one reading of the state, 2 state_dim * value_dim each."""
        weights = weight_count(self.children())
        convolved = sum(part.flops(length) for part in (self.convolution, self.head_router) if part is not None)
        return 2 * length * weights + convolved + 4 * length * self.num_heads * self.state_dim * self.value_dim
