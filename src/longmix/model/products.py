"""Products with a weight that keep no more for the backward pass than they must.

    W = sum_s c_s D_s,    y = x W^T + b

A weight of several matrices is formed in the forward pass and once more in the backward pass, so that no layer keeps
one. The input is kept as it is, or in 8 bits (`longmix.model.packing`); the output is the same in both cases.

    dD_s = c_s dW,    dc_s = <D_s, dW>,    dW = dy^T x,    dx = dy W
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.model.packing import Packed, restored


def combined(coefficients: Tensor | None, matrices: Sequence[Tensor]) -> Tensor:
    """sum_s c_s D_s for coefficients [S] and matrices [out, in]; the first matrix itself without coefficients."""
    if coefficients is None:
        return matrices[0]
    total = coefficients[0] * matrices[0]
    for number in range(1, len(matrices)):
        total = total + coefficients[number] * matrices[number]
    return total


def product(
    x: Tensor,
    bias: Tensor | None,
    coefficients: Tensor | None,
    matrices: Sequence[Tensor],
    packed: Packed | None = None,
) -> Tensor:
    """x W^T + b, [..., out], with the dtypes of `F.linear` under autocast and without.

    Args:
        x: [..., in].
        bias: [out], or None.
        coefficients, matrices: of the weight; see `combined`.
        packed: of x, which the backward pass then reads in its place.
    """
    codes, scale = (None, None) if packed is None else (packed.codes, packed.scale)
    result: Tensor = _Product.apply(x, bias, codes, scale, coefficients, *matrices)
    return result


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `F.linear` multiplies x."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def weight_gradient(output_gradient: Tensor, x: Tensor) -> Tensor:
    """dy^T x, [out, in], for [..., out] and [..., in]."""
    return output_gradient.flatten(0, -2).T @ x.flatten(0, -2)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor | None,
        scale: Tensor | None,
        coefficients: Tensor | None,
        *matrices: Tensor,
    ) -> Tensor:
        dtype = product_dtype(x)
        rounded = x.to(dtype)
        ctx.dtypes = x.dtype, dtype, None if bias is None else bias.dtype
        needs_x = any(ctx.needs_input_grad[4:])
        kept = (rounded, None) if codes is None else (codes, scale)
        ctx.save_for_backward(*(kept if needs_x else (None, None)), coefficients, *matrices)
        ctx.packs = codes is not None
        weight = combined(coefficients, matrices).to(dtype)
        return F.linear(rounded, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        kept, scale, coefficients, *matrices = ctx.saved_tensors
        given, dtype, bias_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        dx = (dy @ combined(coefficients, matrices).to(dtype)).to(given) if needs[0] else None
        dbias = dy.flatten(0, -2).sum(0).to(bias_dtype) if needs[1] else None
        if not any(needs[4:]):
            return dx, dbias, None, None, None, *(None for _ in matrices)
        x = restored(kept, scale, dtype) if ctx.packs else kept
        dweight = weight_gradient(dy, x).to(matrices[0].dtype)
        if coefficients is None:
            return dx, dbias, None, None, None, dweight
        dcoefficients = None
        if needs[4]:
            dcoefficients = torch.stack([(matrix * dweight).sum() for matrix in matrices]).to(coefficients.dtype)
        dmatrices = (coefficients[number] * dweight if needs[5 + number] else None for number in range(len(matrices)))
        return dx, dbias, None, None, dcoefficients, *dmatrices
