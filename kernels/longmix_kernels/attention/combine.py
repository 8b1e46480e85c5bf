"""Merge attention over several sets of keys, and add low-rank biases as more columns of query and key."""

import functools
from collections.abc import Sequence

import torch


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over disjoint sets of keys into attention over all of them, exactly and differentiably.

    With outputs o_p and logsumexps L_p: L = log sum_p exp(L_p), o = sum_p exp(L_p - L) o_p. A key that is in two sets
    counts twice.

    Args:
        parts: output [B, T, H, Dv] and logsumexp [B, T, H] of each set, as `attention` returns them.

    Returns:
        The output over all sets, in the dtype of the first one, and the logsumexp over all sets. A row that sees
        nothing in any set has 0 and -inf.
    """
    outputs, logsumexps = zip(*parts, strict=True)
    stacked = torch.stack(logsumexps)
    empty = stacked.isneginf().all(0)
    highest = stacked.detach().amax(0).masked_fill(empty, 0.0)
    shares = (stacked - highest).exp()
    total = shares.sum(0).masked_fill(empty, 1.0)
    shares = (shares / total).unsqueeze(-1)
    output = functools.reduce(torch.add, (share * part for share, part in zip(shares, outputs, strict=True)))
    return output.to(outputs[0].dtype), (highest + total.log()).masked_fill(empty, -torch.inf)


def bias_columns(
    query: torch.Tensor,
    key: torch.Tensor,
    bias_query: torch.Tensor,
    bias_key: torch.Tensor,
    *,
    scale: float | None = None,
    balanced: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Add the bias `bias_query . bias_key` to every score by widening query and key (FlashBias, arXiv 2505.12044).

    A bias of rank R costs R columns, and 4 R in half precision. There each factor is the sum of two numbers of the
    dtype, which in bfloat16 represent every whole number up to 131072, so that positions stay exact. The result is
    differentiable in all four tensors.

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D].
        bias_query: [B or 1, Tq, Hq or 1, R], best in float32.
        bias_key: [B or 1, Tk, Hkv or 1, R], likewise.
        scale: the factor on the scores without the bias, D ** -0.5 by default.
        balanced: whether float16 factors are brought to a like size, which depends on what is in them. Keys of several
            calls go together only without.

    Returns:
        Query and key with the added columns, and the scale to call `attention` with.

    Raises:
        ValueError: the factors do not fit each other, or query and key.
    """
    for name, bias, of in (("bias_query", bias_query, query), ("bias_key", bias_key, key)):
        sizes = bias.dim() == 4 and all(n in (1, m) for n, m in zip(bias.shape[::2], of.shape[::2], strict=True))
        if bias.dim() != 4 or bias.shape[1] != of.shape[1] or bias.shape[3] != bias_query.shape[3] or not sizes:
            allowed = f"[{of.shape[0]} or 1, {of.shape[1]}, {of.shape[2]} or 1, R]"
            raise ValueError(f"{name} has shape {list(bias.shape)}; allowed is {allowed}, one R for both")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias_query = bias_query / scale
    factor = _balance(bias_query, bias_key) if balanced and query.dtype == torch.float16 else 1.0
    query_digits, key_digits = _digits(bias_query * factor, query.dtype), _digits(bias_key / factor, key.dtype)
    pairs = [(a, b) for a in query_digits for b in key_digits]
    columns = (torch.cat([pair[side] for pair in pairs], -1) for side in (0, 1))
    wide = [
        torch.cat([x, column.expand(*x.shape[:3], -1)], -1) for x, column in zip((query, key), columns, strict=True)
    ]
    return wide[0], wide[1], scale


def _balance(bias_query: torch.Tensor, bias_key: torch.Tensor) -> torch.Tensor:
    """Return the power of two that makes both factors about equally large.

    float16 ends at 65504, so products such as 65536 * 4 need factors of like size.
    """
    query_size, key_size = (x.detach().abs().amax().clamp(min=1e-30) for x in (bias_query, bias_key))
    return (key_size / query_size).log2().mul(0.5).round().exp2()


def _digits(x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return one or two tensors of a dtype that add up to x; the whole gradient goes through the first.

    Two are needed for a dtype of two bytes.
    """
    first = x.to(dtype)
    if dtype.itemsize > 2:
        return [first]
    return [first, (x - first.to(x.dtype)).to(dtype)]
