"""The dynamical form of a layer: its matrix Phi, the size of its state, and how long it remembers.

Sieber et al. 2024 (arXiv 2405.15731) write attention, state space models and recurrent networks in one form, a linear
system whose coefficients follow from the tokens; for the layer's values v and outputs y, both [T, D],

    h_i = lam_i * h_{i-1} + b_i v_i,    y_i = c_i h_i,    so that    y = Phi v

with a state h of n entries for each of D channels, N = n D in all. `longmix.analysis.effective_attention` has the Phi
of any mixer that is linear in its values, so the form is checked against what the mixer computes, in float64. Where the
state is a cache, N counts its entries; the delta rule also moves its state by a matrix of rank one, which no lam shows.
Where a token makes several writes, y is the sum of a Phi for each, and what is said of Phi is of their sum.
"""

import copy
import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from longmix.analysis.attention_statistics import AttentionStatistics
from longmix.analysis.effective_attention import Mixing, engine_call, mixing
from longmix.analysis.states import gate_statistics
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.looked_into import EngineCall
from longmix.mixers.parts.recurrent import RecurrentMixer
from longmix.model.sharing import dictionaries_of

TOLERANCE = 1e-10
"""The largest difference, over the outputs' root mean square, that float64 rounding explains."""


@dataclass(frozen=True)
class DynamicalForm:
    """The form of one layer on one window, means over its heads.

    Attributes:
        state_size: n, entries of the state for each channel.
        state_entries: N, of all channels of the layer.
        error: largest difference between Phi v and the layer's output, over the root mean square of that.
        effective_rank, first_token_mass: of Phi, see `AttentionStatistics.summary`.
        decay_product: the largest product of lam over the window, of any head and channel; None without decays.
        half_life: tokens, mean over heads; None where nothing decays.
    """

    state_size: float
    state_entries: int
    error: float
    effective_rank: float
    first_token_mass: float
    decay_product: float | None
    half_life: float | None

    @property
    def holds(self) -> bool:
        """Whether Phi reproduces the output."""
        return self.error <= TOLERANCE


@torch.no_grad()
def dynamical_form(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> DynamicalForm:
    """The form of a mixer on what it is given, computed by a copy of it in float64.

    Args:
        mixer: one layer's, in evaluation mode.
        x: [1, T, D], its input.
        options: its other arguments, as `longmix.analysis.effective_attention.layer_inputs` gives them.

    Raises:
        ValueError: it is not known how the mixer mixes its values, see `mixing`.
    """
    exact = copy.deepcopy(mixer).double().eval()
    for dictionary in dictionaries_of(exact):  # matrices that layers share are no part of any mixer
        dictionary.double()
    inputs = x.double()
    given = {name: _exact(option) for name, option in options.items() if name != "layout"}
    found = mixing(exact, inputs, **given)
    matrix = found.matrix()
    statistics = AttentionStatistics()
    statistics.update(matrix, given.get("document_ids"))
    heads = statistics.summary()
    call = engine_call(exact, inputs, **given) if isinstance(mixer, RecurrentMixer) else None
    product, half_life = _memory(call)
    entries = state_entries(mixer, call, x.shape[1])
    return DynamicalForm(
        state_size=entries / (found.output.shape[2] * found.output.shape[3]),
        state_entries=entries,
        error=_error(found, matrix),
        effective_rank=fmean(_number(head["effective_rank"]) for head in heads),
        first_token_mass=fmean(_number(head["first_token_mass"]) for head in heads),
        decay_product=product,
        half_life=half_life,
    )


def state_entries(mixer: Mixer, call: EngineCall | None, length: int) -> int:
    """N after `length` tokens: entries of a recurrent layer's memory, else of what it keeps of the tokens."""
    if call is not None:
        return call.output.shape[2] * call.key.shape[-1] * call.output.shape[-1]
    return mixer.state_bytes(length) // next(mixer.parameters()).element_size()


def _memory(call: EngineCall | None) -> tuple[float | None, float | None]:
    """The largest product of decays, and the mean half-life of the heads that forget."""
    log_decay = None if call is None else call.options.get("log_decay")
    if call is None or log_decay is None:
        return None, None
    lives = [head["half_life"] for head in gate_statistics([call])]
    known = [life for life in lives if life is not None]
    whole = log_decay.double()
    total = whole * call.output.shape[1] if whole.dim() == 1 else whole.sum(1)  # a constant of each head, or by token
    return math.exp(total.max().item()), fmean(known) if known else None


def _error(found: Mixing, matrix: Tensor) -> float:
    writes, output, heads = found.writes, found.output, found.output.shape[2]
    matrices = [matrix] if writes == 1 else [found.matrix(write) for write in range(writes)]
    mixed = found.offset
    for own, value in zip(matrices, found.value.chunk(writes, 2), strict=True):
        shared = value.repeat_interleave(heads // value.shape[2], 2)
        mixed = mixed + (own @ shared.transpose(1, 2)).transpose(1, 2)
    scale = output.square().mean().sqrt().clamp(min=torch.finfo(output.dtype).tiny)
    return ((mixed - output).abs().max() / scale).item()


def _exact(option: Any) -> Any:
    return option.double() if isinstance(option, Tensor) and option.is_floating_point() else option


def _number(value: float | list[float]) -> float:
    assert not isinstance(value, list)
    return value
