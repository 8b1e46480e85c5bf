"""The quasi-LSTM: an LSTM whose gates see only the input, with one number of state per channel.

    h_t = f_t h_{t-1} + sigmoid(W_i x_t) W_v x_t,    y_t = W_o (sigmoid(W_g x_t) * h_t)

sigmoid   f_t = sigmoid(W_f x_t + b) (Stanic et al. 2023, arXiv 2309.11197)
reversed  f_t = sigmoid(-(W_f x_t + b))^a = exp(-a softplus(W_f x_t + b)), a learned per channel: the decay of S6, with
          which a quasi-LSTM remembers better (Sieber et al. 2024, arXiv 2405.15731)

Notable: no state is smaller, d_model numbers a layer. It is the case n = 1 of the state expansion n by which that paper
orders recurrences; mixers with matrices as states have larger n. Both kinds begin by forgetting 0.1 % to 10 % a token.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.channel_scan import channel_scan
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.log_decay import RATES, STEPS
from longmix.mixers.parts.memory import MemoryMixer, Terms
from longmix.mixers.parts.metrics import Metric, RootMeanSquare
from longmix.mixers.parts.projections import weight_count
from longmix.mixers.parts.recurrent import is_step
from longmix.recipe import Recipe, set_recipe
from longmix_kernels.linear import LinearState

DECAYS = ("sigmoid", "reversed")


class QLSTM(MemoryMixer):
    """A quasi-LSTM. The head of this file has the equations; each channel is a head with a state of one number.

    Args:
        shape: sizes of the model around the mixer.
        layer_index: which layer this is, from 0.
        decay: "sigmoid" or "reversed".

    Raises:
        ConfigError: an unknown decay.
    """

    engine = staticmethod(channel_scan)
    projections = ("value",)
    scale = 1.0
    key_dim = value_dim = 1

    def __init__(self, shape: ModelShape, layer_index: int, *, decay: str = "sigmoid") -> None:
        super().__init__()
        if decay not in DECAYS:
            raise ConfigError(f"mixer.decay={decay} is unknown; use sigmoid or reversed.")
        width = self.d_model = self.num_heads = shape.d_model
        self.value, self.forget, self.input, self.gate = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.output = nn.Linear(width, width, bias=False)
        self.convolve(0, width)
        step = torch.empty(width).uniform_(math.log(STEPS[0]), math.log(STEPS[1])).exp()
        self.log_rate: nn.Parameter | None = None
        if decay == "reversed":
            self.log_rate = nn.Parameter(torch.empty(width).uniform_(*RATES).log())
            step = step / self.log_rate.detach().exp()
            self.forget_bias = nn.Parameter(step + (-torch.expm1(-step)).log())
        else:
            self.forget_bias = nn.Parameter((-step).log1p() - step.log())
        for layer in (self.value, self.forget, self.input, self.gate):
            nn.init.normal_(layer.weight, std=width**-0.5)
        nn.init.normal_(self.output.weight, std=width**-0.5 / math.sqrt(2 * shape.num_layers))
        for layer in (self.forget, self.input):
            set_recipe(layer.weight, Recipe("scalar"))

    def gates(self, x: Tensor) -> Tensor:
        """Log decay and log input gate of each channel, [B, T, 2 D]."""
        forget, taken = exact_linear(self.forget, x) + self.forget_bias, exact_linear(self.input, x)
        if self.log_rate is None:
            return torch.cat([F.logsigmoid(forget), F.logsigmoid(taken)], -1)
        return torch.cat([-self.log_rate.exp() * F.softplus(forget), F.logsigmoid(taken)], -1)

    def terms(self, mixed: Tensor, gates: Tensor) -> Terms:
        """Each channel's value and gates; queries and keys are 1."""
        log_decay, log_input = gates.chunk(2, -1)
        value = mixed.unsqueeze(-1)
        ones = value.new_ones(()).expand(value.shape)
        return Terms(ones, ones, value, log_decay, log_input)

    def leave(self, read: Tensor, x: Tensor) -> Tensor:
        """Times the output gate."""
        return self.gate(x).sigmoid() * read.flatten(2)

    def state_metrics(self, carried: LinearState, state: Any, length: int) -> dict[str, Metric]:
        """Root mean square of the state at the end of the rows, of all channels together; none of a step."""
        if is_step(state, length):
            return {}
        return {"state_rms": RootMeanSquare.of(carried.memory.detach()).in_last_slice(state)}

    def flops(self, length: int) -> int:
        """Projections; what goes channel by channel is no product of matrices."""
        return 2 * length * weight_count(self.children())
