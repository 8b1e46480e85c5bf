"""Multiply queries with keys in codes, and weights with values in codes, without the numbers that the codes stand for.

Keys are coded by channel, x = (code * step + low) * scale with parameters of a group of tokens: they move to the query,

    q . x = (q * step * scale) . code + q . (low * scale)

Values are coded by token, with parameters of a group of channels: step and low move to the weight,

    sum_t w_t x_t = scale * (sum_t (w_t * step_t) code_t + sum_t w_t low_t)

Both are exact. Codes themselves are converted, since torch multiplies no bytes.
"""

import torch

from longmix_kernels.attention.segments import Codes, Segment, read, unpacked


def scores_of(rows: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Return the products [R, Hkv, N, S] of rows [R, Hkv, N, K] with the keys of a segment."""
    codes = segment.key_codes
    if codes is None:
        return torch.matmul(rows, segment.key.transpose(-1, -2))
    groups, slots = codes.step.shape[2], segment.slots
    if groups == slots or rows.shape[2] > slots // groups:  # more products with steps than there are numbers
        return torch.matmul(rows, read(segment.key, codes, rows.dtype).transpose(-1, -2))
    step, low = (_by_channel(x, groups, rows) for x in (codes.step, codes.low))
    if codes.scale is not None:
        scale = _by_channel(codes.scale, groups, rows)
        step, low = step * scale, low * scale
    numbers = unpacked(segment.key, codes.bits).to(rows.dtype).unflatten(2, (groups, -1))
    found = torch.matmul(rows.unsqueeze(2) * step.unsqueeze(3), numbers.transpose(-1, -2))  # [R, Hkv, groups, N, each]
    found = found + torch.matmul(low, rows.transpose(-1, -2)).unsqueeze(-1)
    return found.transpose(2, 3).flatten(3)


def output_of(weights: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Return the products [R, Hkv, N, V] of weights [R, Hkv, N, S] with the values of a segment."""
    codes, slots = segment.value_codes, segment.slots
    if codes is None:
        return torch.matmul(weights, segment.value)
    if codes.step.shape[2] != slots or codes.low.shape[2] != slots:
        return torch.matmul(weights, read(segment.value, codes, weights.dtype))
    blocks = 1 if codes.scale is None else codes.scale.shape[2]  # of tokens that share a scale
    width = codes.step.shape[3]  # groups of channels that share a step
    whole = unpacked(segment.value, codes.bits).unflatten(2, (blocks, -1)).unflatten(4, (width, -1)).transpose(3, 4)
    numbers = whole.to(weights.dtype, memory_format=torch.contiguous_format)  # [R, Hkv, blocks, width, tokens, each]
    weights = weights.unflatten(3, (blocks, -1)).transpose(2, 3)  # [R, Hkv, blocks, N, tokens]
    step, low = (
        x.to(weights.dtype).unflatten(2, (blocks, -1)).transpose(3, 4).unsqueeze(4) for x in (codes.step, codes.low)
    )  # [., ., blocks, width, 1, tokens]
    found = torch.matmul(weights.unsqueeze(3) * step, numbers)
    found = found + (weights.unsqueeze(3) * low).sum(-1, keepdim=True)
    found = found.transpose(3, 4).flatten(4)  # [R, Hkv, blocks, N, V]
    if codes.scale is None:
        return found.squeeze(2)
    return (found * codes.scale.to(found.dtype).unsqueeze(3)).sum(2)


def whole_groups(size: int, segment: Segment) -> int:
    """Return the largest number of slots up to `size` that splits no group of tokens with one parameter, or that group."""
    shared = 1
    for codes in (segment.key_codes, segment.value_codes):
        for x in () if codes is None else (codes.low, codes.step, codes.scale):
            if x is not None and x.shape[2] > 1:
                shared = max(shared, segment.slots // x.shape[2])
    return max(shared, size // shared * shared)


def _by_channel(x: torch.Tensor, groups: int, rows: torch.Tensor) -> torch.Tensor:
    """Return parameters [., ., groups, K] of every channel, in the dtype of the rows [., ., N, K]."""
    x = x.to(rows.dtype)
    if x.shape[3] not in (1, rows.shape[3]):
        x = x.repeat_interleave(rows.shape[3] // x.shape[3], 3)
    return x.expand(-1, -1, groups, rows.shape[3])
