"""The time mixing of RWKV-7 (Peng et al. 2025, arXiv 2503.14456, section 4).

With x^c = lerp(x_t, x_{t-1}, mu_c) for c in r, w, k, v, a, g, per head, sigma the sigmoid and lora a product of two
thin matrices,

    r = W_r x^r    k = W_k x^k    v = lerp(W_v x^v, v_first, sigma(v_0 + lora_v(x^v)))
    log w = -e^(-1/2) sigma(w_0 + lora_w(x^w))      decay: w lies in (0.545, 1)
    a = sigma(a_0 + lora_a(x^a))                    in-context learning rate
    kappa = normalised(k * k_k)                     removal key
    k~ = k * (1 + (a - 1) * k_a)                    replacement key

    S_t = diag(w) S_{t-1} - (a * kappa) (kappa^T S_{t-1}) + k~ v^T
    y_t = W_o (lora_g(x^g) * (norm(S_t^T r) + (r . (rho * k~)) v))

Notable: v_first is the value of the first such layer; transitions are no contractions, so that the size of states is
logged; the removal reads the state before its decay; every initial value is that of the authors' training code, not of
their table. `block=rwkv7` is what surrounds it.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.base import COUNT, MixerOutput, ModelShape, at_most, checked_sizes, divided
from longmix.mixers.parts.convolution import token_shift
from longmix.mixers.parts.documents import continued_ids
from longmix.mixers.parts.exact import rounded_once
from longmix.mixers.parts.norms import HeadwiseNorm, check_norm_eps
from longmix.mixers.parts.projections import weight_count
from longmix.mixers.parts.recomputed import recomputed
from longmix.mixers.parts.recurrent import RecurrentMixer, RecurrentState
from longmix.mixers.parts.recurrent_slices import DeltaRecurrence, widened
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.delta import delta_rule

DECAY_LIMIT = math.exp(-0.5)
"""Log decays lie between minus this and 0."""

RANK_FACTORS = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}
"""Factor of a rank: the rank is the multiple of 32 that is nearest to this times the root of the width."""

SHIFTS = {"query": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
"""The six mixtures of a token with the one before it: their names, and the power that begins their weights."""

_PLAIN = Recipe("scalar", weight_decay=False)


class LowRank(nn.Module):
    """x -> W_up activation(W_down x), zero at first.

    Args:
        width: of input and output.
        rank: between them.
        activation: "tanh", "sigmoid" or "none".
    """

    def __init__(self, width: int, rank: int, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1 * math.sqrt(max(1.0, rank / width)))
        for weight in (self.down.weight, self.up.weight):
            set_recipe(weight, _PLAIN)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.of_thin(self.down(x))

    def of_thin(self, thin: Tensor) -> Tensor:
        """[..., rank] of `down` -> [..., width]."""
        if self.activation != "none":
            thin = thin.tanh() if self.activation == "tanh" else thin.sigmoid()
        return self.up(thin)


class Terms(NamedTuple):
    """What the engine gets of each token, see `delta_rule`, and what is added to its normed output."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    read: Tensor
    write: Tensor
    bonus: Tensor


class RWKV7(RecurrentMixer):
    """RWKV-7's time mixing. The head of this file has the equations.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0.
        head_dim: channels of a head.
        decay_rank, rate_rank, value_rank, gate_rank: ranks of the thin matrices; None takes `default_rank`. Released
            checkpoints have others.
        norm_eps: added to the variance of a head; 1e-5 times the 64 channels of a head as published.

    Raises:
        ConfigError: heads that do not divide, a rank below 1.
    """

    small: ClassVar = {"head_dim": 16}

    value_residual = True
    past = 1

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        head_dim: int = 64,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float = 64e-5,
    ) -> None:
        super().__init__()
        check_norm_eps(norm_eps)
        at_most(COUNT, decay_rank=decay_rank, rate_rank=rate_rank, value_rank=value_rank, gate_rank=gate_rank)
        width = self.recent_channels = shape.d_model
        self.head_dim = head_dim
        self.num_heads = divided(width, head_dim, "model.d_model", "mixer.head_dim")
        given = {"decay": decay_rank, "rate": rate_rank, "value": value_rank, "gate": gate_rank}
        ranks = {name: default_rank(name, width) if rank is None else rank for name, rank in given.items()}
        for name, rank in ranks.items():
            if rank < 1:
                raise ConfigError(f"mixer.{name}_rank={rank} must be at least 1.")

        self.shifts = _vector(torch.empty(len(SHIFTS), width))
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.decay, self.decay_base = LowRank(width, ranks["decay"], "tanh"), _vector(torch.empty(width))
        self.rate, self.rate_base = LowRank(width, ranks["rate"]), _vector(torch.empty(width))
        self.gate = LowRank(width, ranks["gate"], "sigmoid")
        self.value_mix, self.value_base = None, None
        if layer_index > 0:
            self.value_mix, self.value_base = LowRank(width, ranks["value"]), _vector(torch.empty(width))
        self.removal_scale, self.replacement_scale = _vector(torch.empty(width)), _vector(torch.empty(width))
        self.bonus = _vector(torch.empty(width))
        self.head_norm = HeadwiseNorm(self.num_heads, head_dim, "layer", norm_eps, bias=True)
        set_recipe(self.decay_base, Recipe("scalar", learning_rate_multiplier=2.0, weight_decay=False))
        self._begin(layer_index, shape.num_layers)

    @torch.no_grad()
    def _begin(self, layer: int, layers: int) -> None:
        """Set the initial values of the authors' training code, without its division by 0 for a single layer."""
        width = self.recent_channels
        channel, place = torch.arange(width) / width, torch.arange(width) / max(width - 1, 1)
        depth, rest = layer / max(layers - 1, 1), 1 - layer / layers
        middle = (self.head_dim - 1) / 2
        within = (torch.arange(width) % self.head_dim - middle) / max(middle, 0.5)
        bend, tilt = within * within.abs(), place - 0.5
        self.shifts.copy_(torch.stack([1 - channel ** (power * rest) for power in SHIFTS.values()]))
        self.decay_base.copy_(-5.5 + 6 * place ** (1 + depth**0.3) + 2.5 * bend)
        self.rate_base.copy_(-0.19 + 0.3 * bend + 0.4 * tilt)
        if self.value_base is not None:
            self.value_base.copy_(0.73 - 0.4 * tilt)
        self.removal_scale.copy_(0.71 - 0.1 * tilt)
        self.replacement_scale.fill_(1.02)
        self.bonus.fill_(-0.04)
        self.head_norm.weight.fill_(((1 + layer) / layers) ** 0.7)
        nn.init.orthogonal_(self.query.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        x: Tensor,
        *,
        state: RecurrentState | Slices | None = None,
        document_ids: Tensor | None = None,
        value_residual: Tensor | None = None,
    ) -> MixerOutput:
        """Mix `x` [B, T, D] along T; `value_residual` [B, T, D] is what the first layer returned as that."""
        batch, length = checked_sizes(x, self.recent_channels, document_ids, state, (RecurrentState, Slices))
        ids = continued_ids(document_ids, state, batch, length)
        recent = self.recent(x, state, ids)
        change = token_shift(x, *recent) - x
        of_query, of_decay, of_key, of_value, of_rate, of_gate = (
            x + change * shift for shift in self.shifts.to(x.dtype).unbind()
        )
        of_value = rounded_once(of_value)
        query, key, value = self.query(of_query), self.key(of_key), self.value(of_value)
        given = value if value_residual is None else value_residual
        thin = self.decay.down(of_decay), self.rate.down(of_rate)
        mix = None if self.value_mix is None else self.value_mix.down(of_value)
        made, gate = (query, key, value, given, *thin, mix), self.gate.down(of_gate)
        terms = self._terms(*made) if self.shows_terms(state) else None

        def run(initial: Tensor | None, ids: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
            if terms is not None:
                return self._engine(terms, initial, ids, before)
            # In one piece, so that what lies between engine and gate is not kept either.
            return recomputed(self._read, *made, gate, initial, ids, before)

        gated, carried = self.run_engine(run, DeltaRecurrence(), state, document_ids, batch)
        if terms is not None:
            gated = recomputed(self._gated, self.recall(gated, terms.query), terms.bonus, gate)
        after = self.next_state(carried, recent, x, state, document_ids)
        metrics = self.state_metrics(carried, state, length)
        return MixerOutput(self.output(gated), after, metrics=metrics, value_residual=given)

    def _terms(
        self, query: Tensor, key: Tensor, value: Tensor, given: Tensor, decay: Tensor, rate: Tensor, mix: Tensor | None
    ) -> Terms:
        """What the engine gets, of the projections [B, T, D] and of what is thin of the low-rank ones."""
        if self.value_mix is not None and self.value_base is not None and mix is not None:
            share = (self.value_base + self.value_mix.of_thin(mix)).sigmoid().to(value.dtype)
            value = value + (given - value) * share
        rate = (self.rate_base + self.rate.of_thin(rate)).sigmoid()
        removal = F.normalize(self._heads(key * self.removal_scale), dim=-1, eps=1e-12)
        replacement = key * (1 + (rate - 1) * self.replacement_scale)
        query, key, value = (self._heads(part.to(value.dtype)) for part in (query, replacement, value))
        log_decay = self._heads(self._log_decay(self.decay.of_thin(decay)))
        read, write = -removal.to(value.dtype), (removal * self._heads(rate)).to(value.dtype)
        bonus = (query * key * self._heads(self.bonus)).sum(-1, keepdim=True) * value
        return Terms(query, key, value, log_decay, read, write, bonus)

    def _engine(
        self, terms: Terms, initial: Tensor | None, ids: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output [B, T, H, head_dim] and final state of the engine."""
        return self.call_engine(
            delta_rule,
            terms.query,
            terms.key,
            widened(terms.value, initial),
            log_decay=terms.log_decay,
            low_rank_read=terms.read,
            low_rank_write=terms.write,
            scale=1.0,
            initial_state=initial,
            carried_state=before,
            document_ids=ids,
            min_log_decay=-DECAY_LIMIT,
        )

    def _read(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """What is read [B, T, D], normed and gated, and the final state.

        Args:
            arguments: what `_terms` gets, then what is thin of the gate, and initial state, document ids and carried
                state of the engine.
        """
        *made, gate, initial, ids, before = arguments
        terms = self._terms(*made)
        found, carried = self._engine(terms, initial, ids, before)
        return self._gated(found, terms.bonus, gate), carried

    def _gated(self, found: Tensor, bonus: Tensor, gate: Tensor) -> Tensor:
        """Norm what was read [B, T, H, head_dim], add the bonus, and gate both, to [B, T, D]."""
        return (self.head_norm(found) + bonus.to(found.dtype)).flatten(2) * self.gate.of_thin(gate)

    def log_decay(self, x: Tensor) -> Tensor:
        """log w of x [B, T, D], in float32 or better."""
        return self._log_decay(self.decay(x))

    def _log_decay(self, raised: Tensor) -> Tensor:
        exact = torch.promote_types(raised.dtype, torch.float32)
        return -DECAY_LIMIT * (self.decay_base.to(exact) + raised.to(exact)).sigmoid()

    def zeros(self, batch: int) -> Tensor:
        """The empty memory for `batch` rows: keys by values. The authors' code has values by keys."""
        exact = torch.promote_types(self.shifts.dtype, torch.float32)
        return self.shifts.new_zeros(batch, self.num_heads, self.head_dim, self.head_dim, dtype=exact)

    def flops(self, length: int) -> int:
        """Projections, and per head and token two readings of the state and two updates of 2 head_dim^2 each."""
        weights = weight_count(self.modules())
        return 2 * length * weights + 8 * length * self.recent_channels * self.head_dim

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))


def default_rank(name: str, width: int) -> int:
    """Rank of a thin matrix of a model `width` wide, as in the authors' training code."""
    return max(32, 32 * round(RANK_FACTORS[name] * math.sqrt(width) / 32))


def _vector(values: Tensor) -> nn.Parameter:
    """A parameter without weight decay that the optimizer does not treat as a matrix."""
    parameter = nn.Parameter(values)
    set_recipe(parameter, _PLAIN)
    return parameter
