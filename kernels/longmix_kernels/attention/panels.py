"""Compute softmax attention of one panel: a block of query rows against a run of keys.

There are two implementations with one interface. `FLASH` is torch's own CPU kernel, which keeps a panel's scores in
cache. `MATMUL` is written in torch operations and runs on any device. Tensors are [X, Y, rows or keys, D] with one D
for all; X and Y are batch and head axes, in either order.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from longmix_kernels.attention.tiling import TileSizes

Tensors = tuple[torch.Tensor, ...]


class PanelMath(NamedTuple):
    """The functions that compute a panel, and the tiles that suit them.

    Attributes:
        forward: (query, key, value, scale, causal, mask) -> output, logsumexp [X, Y, rows]. A row that sees nothing in
            this panel has output 0 and any finite logsumexp.
        backward: (grad_output, output, logsumexp, query, key, value, scale, causal, mask) -> gradients of query, key
            and value. `output` and `logsumexp` are those of the complete rows, finite throughout.
        sizes: the tiles that suit the implementation, found by measurement.
    """

    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]
    sizes: TileSizes

    def sizes_for(self, heads: int) -> TileSizes:
        """Return the sizes of tiles for panels of so many heads.

        With fewer heads than threads no segment stays whole, since threads can share the rows of tiles only.
        """
        return self.sizes if heads >= torch.get_num_threads() else replace(self.sizes, whole_rows=None)


def panel_math(device: torch.device) -> PanelMath:
    """Return the faster of the implementations that run on a device."""
    return FLASH if device.type == "cpu" else MATMUL


def _flash_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> Tensors:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )


def _flash_backward(
    grad_output: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
) -> Tensors:
    fold = _row_folds(query) if not causal else 1
    if fold > 1:
        grad_output, query, output = (x[0].unflatten(1, (fold, -1)) for x in (grad_output, query, output))
        logsumexp = logsumexp[0].unflatten(1, (fold, -1))
        key, value = (x.transpose(0, 1).expand(-1, fold, -1, -1) for x in (key, value))
        if mask is not None:
            mask = (mask if mask.dim() == 2 else mask[0]).unflatten(-2, (fold, -1))
            mask = mask if mask.dim() == 4 else mask[None]
    grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_output, query, key, value, output, logsumexp, 0.0, causal, attn_mask=mask, scale=scale
    )
    if fold > 1:
        return grad_query.flatten(1, 2)[None], grad_key.sum(1)[None], grad_value.sum(1)[None]
    return grad_query, grad_key, grad_value


def _row_folds(query: torch.Tensor) -> int:
    """Return into how many heads to fold the rows of a panel, since torch's backward works on one head per thread."""
    outer, heads, rows, _ = query.shape
    folds = -(-torch.get_num_threads() // heads) if outer == 1 else 1
    return folds if rows % folds == 0 else 1


def _matmul_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> Tensors:
    scores = _scores(query, key, scale, causal, mask)
    highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(highest).exp_()
    # The highest score alone contributes 1, so only a row that sees nothing is below 1.
    total = weights.sum(-1, keepdim=True).clamp_(min=1.0)
    return weights @ value / total, (highest + total.log()).squeeze(-1)


def _matmul_backward(
    grad_output: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
) -> Tensors:
    weights = _scores(query, key, scale, causal, mask).sub_(logsumexp.unsqueeze(-1)).exp_()
    delta = (grad_output * output).sum(-1, keepdim=True)
    grad_value = weights.mT @ grad_output
    grad_scores = (grad_output @ value.mT).sub_(delta).mul_(weights).mul_(scale)
    return grad_scores @ key, grad_scores.mT @ query, grad_value


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> torch.Tensor:
    scores = (query @ key.mT).mul_(scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        return scores.masked_fill_(later, -torch.inf)
    return scores if mask is None else scores.add_(mask)


FLASH = PanelMath(
    _flash_forward,
    _flash_backward,
    TileSizes(rows=128, masked_keys=2048, full_keys=None, whole_rows=1024, repeated_keys=8192),
)
MATMUL = PanelMath(
    _matmul_forward,
    _matmul_backward,
    TileSizes(rows=128, masked_keys=1024, full_keys=1024, whole_rows=None, repeated_keys=2048),
)
