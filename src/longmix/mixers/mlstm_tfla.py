"""The mLSTM of xLSTM 7B on tiled flash linear attention (Beck et al. 2025, arXiv 2503.13427 and 2503.14376).

    i_t, f_t = softcap(W_i x_t + b_i), softcap(W_f x_t + b_f)          softcap(x) = 15 tanh(x / 15)
    exp:  C_t = sigma(f_t) C_{t-1} + exp(i_t) k_t v_t^T,    read_t = C_t^T q_t / max(|n_t . q_t|, 1)
    sig:  C_t = sigma(f_t) C_{t-1} + sigma(i_t) k_t v_t^T,  read_t = C_t^T q_t
    y_t = W_o (sigma(W_og x_t) * norm(read_t))

Notable: the sigmoid gate needs neither normaliser nor running maximum, is faster and learns as well (2503.14376); the
initial input bias of -10 keeps reads so small at first that the epsilon of the norm after them is part of the model.
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.mixers.parts.base import REAL, ModelShape, at_most
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.linear import LinearMixer, LinearOptions
from longmix.recipe import Recipe, set_recipe


class MLSTMTFLA(LinearMixer):
    """mLSTM with sigmoid or exponential input gate.

    Args:
        shape, layer_index, options: see `LinearMixer`.
        gate: "sig" or "exp".
        num_heads: heads; None takes the published sizes: one for every 512 channels, and at least 4.
        gate_cap: pre-activations of both gates stay within plus and minus this.
        input_bias: initial bias of the input gate.
        forget_bias: initial biases of the forget gate, of the first and the last head; those between are spread evenly.

    Raises:
        ConfigError: besides those of the base, an unknown gate, a cap that is not positive, other than two biases.
    """

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        gate: str = "sig",
        num_heads: int | None = None,
        gate_cap: float = 15.0,
        input_bias: float = -10.0,
        forget_bias: tuple[float, float] = (3.0, 6.0),
        **options: Unpack[LinearOptions],
    ) -> None:
        at_most(REAL, gate_cap=gate_cap, input_bias=input_bias)
        for bias in forget_bias:
            at_most(REAL, forget_bias=bias)
        heads = max(4, shape.d_model // 512) if num_heads is None else num_heads
        super().__init__(shape, layer_index, num_heads=heads, normalize=gate == "exp", **options)
        if gate not in ("sig", "exp"):
            raise ConfigError(f"mixer.gate={gate} is unknown; use sig or exp.")
        if gate_cap <= 0:
            raise ConfigError(f"mixer.gate_cap={gate_cap} must be positive.")
        if len(forget_bias) != 2:
            raise ConfigError(f"mixer.forget_bias={list(forget_bias)} must be two numbers, of the first and last head.")
        self.gate_cap = gate_cap
        self.input_gate = nn.Linear(self.d_model, self.num_heads)
        self.forget_gate = nn.Linear(self.d_model, self.num_heads)

        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=math.sqrt(2 / (5 * self.d_model)))
        nn.init.normal_(self.output.weight, std=2 / (shape.num_layers * math.sqrt(self.d_model)))
        for projection in (self.output_gate, self.input_gate, self.forget_gate):
            nn.init.zeros_(projection.weight)
        nn.init.constant_(self.input_gate.bias, input_bias)
        with torch.no_grad():
            self.forget_gate.bias.copy_(torch.linspace(*forget_bias, self.num_heads))
        for projection in (self.input_gate, self.forget_gate):
            set_recipe(projection.weight, Recipe("scalar"))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay and log input gate, soft-capped and in float32 throughout."""
        input_gate, forget_gate = (self._capped(projection, x) for projection in (self.input_gate, self.forget_gate))
        return F.logsigmoid(forget_gate), input_gate if self.normalize else F.logsigmoid(input_gate)

    def _capped(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return self.gate_cap * (exact_linear(projection, x) / self.gate_cap).tanh()
