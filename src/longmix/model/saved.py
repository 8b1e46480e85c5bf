"""Layers that keep activations in 8 bits for the backward pass; what they return is the same as without.

    linear layers    the input; layers with the same one share its codes
    RMSNorm          the input; the reciprocal of its root mean square stays exact
    SwiGLU           gate and up; silu and the product are computed again

What engines and attention keep stays exact, as do LayerNorm, states, and inputs of fewer than
`longmix.model.packing.LEAST_NUMBERS` numbers.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.mixers.parts.base import MixerOutput
from longmix.mixers.parts.exact import rounded_once
from longmix.mixers.parts.head_options import HeadNorm
from longmix.mixers.parts.rms_norm import RMSNorm
from longmix.model.blocks import SwiGLU
from longmix.model.packing import Packed, packed, packed_once, restored
from longmix.model.products import product, product_dtype, weight_gradient
from longmix.model.sharing import SharedLinear

SavedActivations = Literal["exact", "int8"]
"""The words of `model.saved_activations`."""


def save_in_int8(blocks: nn.Module) -> None:
    """Let the layers within keep activations in 8 bits.

    A layer gets another class and stays the object that it is, so that whoever holds it holds the same one, and its
    weights keep their names and recipes.
    """
    for layer in blocks.modules():
        if isinstance(layer, SharedLinear):
            layer.packs = True
        elif type(layer) in CLASSES:
            layer.__class__ = CLASSES[type(layer)]


class Int8Linear(nn.Linear):
    """A linear layer that keeps its input in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        codes = packed_once(x) if self.training and torch.is_grad_enabled() else None
        return super().forward(x) if codes is None else product(x, self.bias, None, [self.weight], codes)


class Int8RMSNorm(RMSNorm):
    """RMSNorm over the last axis that keeps its input in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return _normed(self, x, self.weight, super().forward)


class Int8HeadNorm(HeadNorm):
    """`HeadNorm` that keeps its input in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., head_dim] -> [..., head_dim]."""
        return _normed(self, x, self.weight.to(x.dtype), super().forward)


def _normed(norm: nn.RMSNorm, x: Tensor, weight: Tensor, exactly: Any) -> Tensor:
    codes = packed(x) if norm.training and torch.is_grad_enabled() else None
    if codes is None:
        result: Tensor = exactly(x)
        return result
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    result = _RMSNorm.apply(x, weight, codes.codes, codes.scale, eps)
    return result


class Int8SwiGLU(SwiGLU):
    """A SwiGLU that keeps gate and up in 8 bits, and neither silu nor the product."""

    def forward(self, x: Tensor, *, state: Any = None, document_ids: Tensor | None = None) -> MixerOutput:
        """Mix the channels of each token of `x` [B, T, D]."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        x = rounded_once(x)
        gate, up = self.gate(x), self.up(x)
        codes = packed(gate), packed(up)
        if codes[0] is None or codes[1] is None:
            return MixerOutput(self.down(F.silu(gate) * up))
        return MixerOutput(gated_product(gate, up, codes[0], codes[1], self.down.weight))


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Int8Linear,
    RMSNorm: Int8RMSNorm,
    nn.RMSNorm: Int8RMSNorm,
    HeadNorm: Int8HeadNorm,
    SwiGLU: Int8SwiGLU,
}
"""The class that keeps 8 bits, of each that keeps its input as it is."""


def gated_product(gate: Tensor, up: Tensor, gate_codes: Packed, up_codes: Packed, weight: Tensor) -> Tensor:
    """(silu(gate) * up) W^T, [..., out], for gate and up [..., hidden] whose codes the backward pass reads."""
    pieces = gate_codes.codes, gate_codes.scale, up_codes.codes, up_codes.scale
    result: Tensor = _GatedProduct.apply(gate, up, *pieces, weight)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        factor = x.to(exact).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(codes, scale, factor, weight)
        ctx.dtype = x.dtype
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, factor, weight = ctx.saved_tensors
        normed = restored(codes, scale, factor.dtype) * factor
        dy = gradients[0].to(factor.dtype)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dweight, None, None, None
        dnormed = dy * weight.to(factor.dtype)
        mean = (dnormed * normed).mean(-1, keepdim=True)
        return ((dnormed - normed * mean) * factor).to(ctx.dtype), dweight, None, None, None


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        gate_codes: Tensor,
        gate_scale: Tensor,
        up_codes: Tensor,
        up_scale: Tensor,
        weight: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(gate_codes, gate_scale, up_codes, up_scale, weight)
        hidden = F.silu(gate) * up
        ctx.dtypes = gate.dtype, product_dtype(hidden)
        return F.linear(hidden.to(ctx.dtypes[1]), weight.to(ctx.dtypes[1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate_codes, gate_scale, up_codes, up_scale, weight = ctx.saved_tensors
        given, dtype = ctx.dtypes
        (dy,) = gradients
        gate, up = restored(gate_codes, gate_scale, given), restored(up_codes, up_scale, given)
        silu = F.silu(gate)
        dweight = None
        if ctx.needs_input_grad[6]:
            dweight = weight_gradient(dy, (silu * up).to(dtype)).to(weight.dtype)
        dhidden = (dy @ weight.to(dtype)).to(given)
        dup = dhidden * silu
        dgate = torch.ops.aten.silu_backward(dhidden.mul_(up), gate)
        return dgate, dup, None, None, None, None, dweight
