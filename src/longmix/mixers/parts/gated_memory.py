"""The delta rule as it is gated in DeltaNet, gated DeltaNet and Kimi Delta Attention; and GLA, which has only the gate.

With q, k, v = silu(convolution(W x)), q and k scaled to length 1, and write strengths beta = sigma(W_beta x), per head

    S_t = (1 - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T       what is held at k_t moves towards v_t
    y_t = W_o (gate(x_t) * norm(S_t^T q_t / sqrt(d)))

deltanet        g = 0, no gate (Yang et al. 2024, arXiv 2406.06484)
gated_deltanet  g = -A softplus(w . x + b), one number per head; gate = silu(W_g x) (Yang et al. 2024, arXiv 2412.06464)
kda             g = -A softplus(W_up W_down x + b), one per channel of k; gate = sigma(W_gup W_gdown x) (Kimi Team 2025,
                arXiv 2510.26692)
gla             g = logsigmoid(W_up W_down x + b) / 16; S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T with q, k, v = W x as
                they are; gate = silu(W_g x) (Yang et al. 2023, arXiv 2312.06635)

Notable: with beta in (0, 1) no transition has an eigenvalue outside [0, 1]. `negative_eigenvalues` doubles beta, so
that what is held at k may turn its sign: parity can then be tracked at any length (Grazzi et al. 2024, arXiv
2411.12537).
With `num_value_heads` several heads of values share the queries and keys of one head, and have decays and strengths of
their own, as in Qwen3-Next. With n `householders` a token makes n writes one after the other, each with a key, a value
and a strength of its own; the state decays before the first, and is read after the last (see `gated_deltaproduct`).

Published codes differ in how their projections begin; here they do as in this project's other linear attention. The
norm has weights for each head unless `shared_norm` makes it theirs.
"""

import math
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.base import COUNT, FACTOR, MixerOutput, ModelShape, at_most, checked_sizes, divided
from longmix.mixers.parts.convolution import ShortConvolution, check_convolution
from longmix.mixers.parts.documents import continued_ids
from longmix.mixers.parts.exact import exact_linear, rounded_once
from longmix.mixers.parts.head_gates import head_router
from longmix.mixers.parts.householders import delta_product
from longmix.mixers.parts.log_decay import SIGMOID_RANK, LogDecay
from longmix.mixers.parts.norms import HeadwiseNorm, check_norm_eps
from longmix.mixers.parts.projections import weight_count
from longmix.mixers.parts.recomputed import recomputed
from longmix.mixers.parts.recurrent import Recurrence, RecurrentMixer, RecurrentState
from longmix.mixers.parts.recurrent_slices import DecayRecurrence, DeltaRecurrence, widened
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.delta import delta_rule

DECAYS = ("none", "head", "channel", "sigmoid")
GATES = ("none", "silu", "sigmoid", "low_rank")

UNIT_EPS = 1e-6
"""Added to the squared length by which a query or key is normalised, as in flash-linear-attention."""

KEY_DIM, LEAST_HEADS = 128, 4
"""By default, a head has keys this wide, and there are at least so many heads: the published sizes."""

MOST_HOUSEHOLDERS = 64
"""Far more writes of a token than anybody has tried."""


class Terms(NamedTuple):
    """What the engine gets of each token, for every head of values; see `delta_rule`.

    With n householders there are n times as many keys, values, reads and writes, the heads of the first one first.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    read: Tensor | None = None
    write: Tensor | None = None

    def rounded(self, dtype: torch.dtype) -> "Terms":
        """All of them in a dtype but the decay."""
        parts = {name: part for name, part in self._asdict().items() if name != "log_decay" and part is not None}
        return self._replace(**{name: part.to(dtype) for name, part in parts.items()})


class MemoryOptions(TypedDict, total=False):
    """The settings that all mixers of this kind share; see `GatedMemory`."""

    num_heads: int | None
    num_value_heads: int | None
    decay_rank: int | None
    gate_rank: int | None
    norm_eps: float
    shared_norm: bool
    heads_shared: int
    heads_kept: int | None
    heads_balance: float


class GatedMemoryOptions(MemoryOptions, total=False):
    """The same, and the width of values where it has the usual default."""

    value_factor: float


class DeltaOptions(GatedMemoryOptions, total=False):
    """The same of mixers whose writes replace."""

    negative_eigenvalues: bool


class GatedMemory(RecurrentMixer):
    """A matrix memory with decays and, as an option, the delta rule. The head of this file has the equations.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0.
        decay: "none", "head", "channel" or "sigmoid", see `LogDecay`.
        output_gate: "none", "silu", "sigmoid", or "low_rank", which is a sigmoid of a product of two thin matrices.
        delta: replace what the state holds at a key, with unit queries and keys; else add to it.
        num_heads: heads of queries and keys; None takes one for every 128 channels of keys, and at least 4.
        num_value_heads: heads of values, each with its own state, decay and strength; a multiple of `num_heads`, whose
            queries and keys they share. None takes as many as those.
        key_factor, value_factor: width of queries and keys, and of values, over that of the model.
        convolution: tokens that a short convolution mixes, of queries, keys and values; 0 for none, nor its SiLU.
        decay_rank, gate_rank: of the thin matrices; None takes the values of a head, and 16 for a "sigmoid" decay.
        norm_eps: of the head-wise norm of what is read from the state.
        shared_norm: let all heads share the weights of that norm, as published models do.
        negative_eigenvalues: let write strengths reach 2 instead of 1.
        householders: writes that a token makes one after the other.
        heads_shared, heads_kept, heads_balance: a mixture of the heads of values, see
            `longmix.mixers.parts.head_gates.HeadRouter`; none with `heads_kept` None.

    Raises:
        ConfigError: an unknown word, heads that do not divide, a factor that is not positive, a convolution of 1 token,
            a rank below 1 or of no thin matrix; negative eigenvalues or several householders where writes add.
    """

    decays_of_keys = False
    """Whether heads of values that share a key share its decay too."""

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        decay: str = "head",
        output_gate: str = "silu",
        delta: bool = True,
        num_heads: int | None = None,
        num_value_heads: int | None = None,
        key_factor: float = 1.0,
        value_factor: float = 1.0,
        convolution: int = 4,
        decay_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float = 1e-5,
        shared_norm: bool = False,
        negative_eigenvalues: bool = False,
        householders: int = 1,
        heads_shared: int = 0,
        heads_kept: int | None = None,
        heads_balance: float = 0.01,
    ) -> None:
        super().__init__()
        check_norm_eps(norm_eps)
        at_most(COUNT, convolution=convolution, decay_rank=decay_rank, gate_rank=gate_rank)
        at_most(FACTOR, key_factor=key_factor, value_factor=value_factor)
        for name, word, words in (("decay", decay, DECAYS), ("output_gate", output_gate, GATES)):
            if word not in words:
                raise ConfigError(f"mixer.{name}={word} is unknown; use {', '.join(words[:-1])} or {words[-1]}.")
        for name, rank, word, thin in (
            ("decay_rank", decay_rank, decay, "channel or sigmoid"),
            ("gate_rank", gate_rank, output_gate, "low_rank"),
        ):
            if rank is not None and rank < 1:
                raise ConfigError(f"mixer.{name}={rank} must be at least 1, or null.")
            if rank is not None and word not in thin.split(" or "):
                raise ConfigError(f"mixer.{name}={rank} is the rank of {thin}, not of {word}; use null.")
        for name, factor in (("key_factor", key_factor), ("value_factor", value_factor)):
            if factor <= 0:
                raise ConfigError(f"mixer.{name}={factor} must be positive.")
        check_convolution(convolution)
        if not 1 <= householders <= MOST_HOUSEHOLDERS:
            raise ConfigError(f"mixer.householders={householders} must be from 1 to {MOST_HOUSEHOLDERS}.")
        if negative_eigenvalues and not delta:
            raise ConfigError(
                "mixer.negative_eigenvalues=true needs mixer.delta=true: a write that adds removes nothing."
            )
        if householders > 1 and not delta:
            raise ConfigError(
                f"mixer.householders={householders} needs mixer.delta=true: adding writes reflect nothing."
            )
        width = shape.d_model
        key_width, value_width = round(key_factor * width), round(value_factor * width)
        for name, factor, size in (("key", key_factor, key_width), ("value", value_factor, value_width)):
            if size < 1:
                raise ConfigError(f"mixer.{name}_factor={factor} of model.d_model={width} is less than one channel.")
        heads = max(LEAST_HEADS, key_width // KEY_DIM) if num_heads is None else num_heads
        self.key_dim = divided(key_width, heads, "mixer.key_factor * model.d_model", "mixer.num_heads")
        value_heads, value_key = heads, "mixer.num_heads"
        if num_value_heads is not None:
            value_heads, value_key = num_value_heads, "mixer.num_value_heads"
            if value_heads < heads or value_heads % heads:
                raise ConfigError(
                    f"mixer.num_value_heads={value_heads} must be a multiple of mixer.num_heads={heads}, or null."
                )
        self.value_dim = divided(value_width, value_heads, "mixer.value_factor * model.d_model", value_key)
        self.num_heads, self.num_value_heads, self.householders = heads, value_heads, householders
        self.output_gate, self.delta, self.negative_eigenvalues = output_gate, delta, negative_eigenvalues

        self.query = nn.Linear(width, key_width, bias=False)
        self.key = nn.Linear(width, householders * key_width, bias=False)
        self.value = nn.Linear(width, householders * value_width, bias=False)
        self.strength = nn.Linear(width, householders * value_heads, bias=False) if delta else None
        rank = decay_rank or (SIGMOID_RANK if decay == "sigmoid" else self.value_dim)
        decaying = heads if self.decays_of_keys else value_heads
        self.decay = None if decay == "none" else LogDecay(width, decaying, self.key_dim, decay, rank)
        self.gate: nn.Module | None = None
        if output_gate in ("silu", "sigmoid"):
            self.gate = nn.Linear(width, value_width, bias=False)
        elif output_gate == "low_rank":
            rank = gate_rank or self.value_dim
            self.gate = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, value_width, bias=False))
        self.head_norm = HeadwiseNorm(value_heads, self.value_dim, "rms", norm_eps, shared=shared_norm)
        self.output = nn.Linear(value_width, width, bias=False)
        self.past = max(convolution - 1, 0)
        self.recent_channels = key_width + householders * (key_width + value_width)
        self.convolution = ShortConvolution(self.recent_channels, convolution) if convolution else None

        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.output.weight, std=value_width**-0.5 / math.sqrt(2 * shape.num_layers))
        if self.strength is not None:
            set_recipe(self.strength.weight, Recipe("scalar"))
        self.head_router = head_router(width, value_heads, heads_shared, heads_kept, heads_balance, shape.num_layers)

    def forward(
        self, x: Tensor, *, state: RecurrentState | Slices | None = None, document_ids: Tensor | None = None
    ) -> MixerOutput:
        """Mix `x` [B, T, D] along T, from the beginning or continuing from a state."""
        batch, length = checked_sizes(x, self.query.in_features, document_ids, state, (RecurrentState, Slices))
        ids = continued_ids(document_ids, state, batch, length)
        rounded = rounded_once(x)
        projected = torch.cat([layer(rounded) for layer in (self.query, self.key, self.value)], -1)
        recent = self.recent(projected, state, ids)
        thin = None if self.decay is None else self.decay.thin(x)
        made = projected, *recent, thin, self._strengths(x, rounded)
        terms = self._terms(*made) if self.shows_terms(state) else None

        def run(initial: Tensor | None, ids: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
            if terms is not None:
                return self._engine(terms, initial, ids, before)
            return recomputed(self._read, *made, initial, ids, before)

        recurrence: Recurrence = DeltaRecurrence()
        if terms is not None and not self.delta:
            recurrence = DecayRecurrence(terms.query, terms.log_decay, self.key_dim**-0.5)
        found, carried = self.run_engine(run, recurrence, state, document_ids, batch)
        if terms is not None:
            found = self.recall(found, terms.query)
        mixed = recomputed(self._gated, found, None if self.gate is None else self.gate(rounded))
        mixed, losses, metrics = self.routed(mixed.unflatten(-1, (self.num_value_heads, -1)), x, state)
        after = self.next_state(carried, recent, projected, state, document_ids)
        metrics |= self.state_metrics(carried, state, length)
        return MixerOutput(self.output(mixed.flatten(2)), after, losses, metrics)

    def _strengths(self, x: Tensor, rounded: Tensor) -> Tensor | None:
        """What write strengths are made of, [B, T, .]; None where writes add.

        Args:
            x: the input.
            rounded: the same in the dtype of wide products.
        """
        return None if self.strength is None else exact_linear(self.strength, x)

    def _terms(
        self, projected: Tensor, before: Tensor, ids: Tensor | None, thin: Tensor | None, strength: Tensor | None
    ) -> Terms:
        """What the engine gets, of the projections [B, T, queries + keys + values] and what came `before` them."""
        mixed = projected if self.convolution is None else self.convolution(projected, before, ids)
        query, key, value = self._heads(mixed)
        log_decay = self._no_decay(projected) if self.decay is None or thin is None else self.decay.of_thin(thin)
        if self.decays_of_keys:
            log_decay = self._shared(log_decay)
        if strength is None:
            return Terms(self._shared(query), self._shared(key), value, log_decay)
        heads = self.num_heads, self.householders * self.num_heads
        query, key = unit(mixed[..., : sum(heads) * self.key_dim].unflatten(-1, (-1, self.key_dim))).split(heads, 2)
        terms = self._replacing(query, key, value, log_decay, strength)
        return terms.rounded(value.dtype)

    def _replacing(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor) -> Terms:
        """What the engine gets where writes replace, in any dtype.

        Args:
            query, key: [B, T, H, key_dim] of length 1, in float32 or better.
            value: [B, T, Hv, value_dim].
            log_decay: [B, T, Hv] or [B, T, Hv, key_dim].
            strength: what `_strengths` returned.
        """
        query, write = self._shared(query), self._shared(key)
        key = write * self._gates(strength).unsqueeze(-1)
        return Terms(query, key, value, log_decay, -self._kept(log_decay) * key, write)

    def _gates(self, strength: Tensor) -> Tensor:
        """Strengths from 0 to 1, or to 2 if eigenvalues may be negative."""
        return 2.0 * strength.sigmoid() if self.negative_eigenvalues else strength.sigmoid()

    def _kept(self, log_decay: Tensor) -> Tensor:
        """How much each write keeps of the state, [B, T, n Hv, 1 or key_dim]: only the first one lets it decay."""
        kept = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
        if self.householders > 1:
            kept = F.pad(kept, (0, 0, 0, (self.householders - 1) * self.num_value_heads))
        return kept.exp()

    def _shared(self, x: Tensor) -> Tensor:
        """Repeat what heads of keys have, [B, T, H, ...], for the heads of values that share them."""
        groups = self.num_value_heads // self.num_heads
        return x if groups == 1 else x.repeat_interleave(groups, 2)

    def log_decay(self, x: Tensor) -> Tensor:
        """Log decay of x [B, T, D], one per head [B, T, H] or channel [B, T, H, key_dim], in float32 or better."""
        return self._no_decay(x) if self.decay is None else self.decay(x)

    def _no_decay(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        heads = self.num_heads if self.decays_of_keys else self.num_value_heads
        return x.new_zeros(*x.shape[:2], heads, dtype=exact)

    def _engine(
        self, terms: Terms, initial: Tensor | None, ids: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output [B, T, H, value_dim] and final state of the engine."""
        several = {"householders": self.householders} if self.householders > 1 else {}
        return self.call_engine(
            delta_product if several else delta_rule,
            terms.query,
            terms.key,
            widened(terms.value, initial),
            log_decay=terms.log_decay,
            low_rank_read=terms.read,
            low_rank_write=terms.write,
            scale=self.key_dim**-0.5,
            initial_state=initial,
            carried_state=before,
            document_ids=ids,
            **several,
        )

    def _read(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The same of what `_terms` gets, then the initial state, document ids and carried state of the engine."""
        *made, initial, ids, before = arguments
        return self._engine(self._terms(*made), initial, ids, before)

    def _gated(self, found: Tensor, gate: Tensor | None) -> Tensor:
        """Norm and gate what was read [B, T, H, value_dim], to [B, T, values]."""
        mixed = self.head_norm(found).flatten(2)
        if gate is None:
            return mixed
        return mixed * (F.silu(gate) if self.output_gate == "silu" else gate.sigmoid())

    def zeros(self, batch: int) -> Tensor:
        """The empty memory, for `batch` rows."""
        weight = self.value.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        return weight.new_zeros(batch, self.num_value_heads, self.key_dim, self.value_dim, dtype=exact)

    def flops(self, length: int) -> int:
        """Projections, and per head and write a reading and an update of the state, twice each with the delta rule.

        Each of them takes 2 key_dim * value_dim.
        """
        weights = weight_count(self.modules())
        convolved = 0 if self.convolution is None else self.convolution.flops(length)
        products = 4 * self.householders if self.delta else 2
        entries = self.num_value_heads * self.key_dim * self.value_dim
        return 2 * length * weights + convolved + 2 * products * length * entries

    def _heads(self, mixed: Tensor) -> list[Tensor]:
        """Split [B, T, queries + keys + values] into these, each [B, T, heads, .]."""
        keys, values = self.householders * self.num_heads, self.householders * self.num_value_heads
        sizes = (self.num_heads, self.key_dim), (keys, self.key_dim), (values, self.value_dim)
        parts = mixed.split([heads * dim for heads, dim in sizes], -1)
        return [part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]


def unit(x: Tensor) -> Tensor:
    """[..., K] at length 1 along K, in float32 or better."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return exact * (exact.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt()
