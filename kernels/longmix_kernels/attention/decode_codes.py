"""Multiply queries with keys in codes, and weights with values in codes, without the numbers that the codes stand for.

Keys are coded by channel, x = (code * step + low) * scale with parameters of a group of tokens: they move to the query,

    q . x = (q * step * scale) . code + q . (low * scale)

Values are coded by token, with parameters of a group of channels: step and low move to the weight,

    sum_t w_t x_t = scale * (sum_t (w_t * step_t) code_t + sum_t w_t low_t)

Both are exact. Codes themselves are converted, since torch multiplies no bytes.
"""

from collections.abc import Iterator

import torch

from longmix_kernels.attention.segments import Segment, read


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
    found = torch.matmul(low, rows.transpose(-1, -2)).unsqueeze(-1)  # [R, Hkv, groups, N, 1]
    each = 8 // codes.bits
    for number, part in enumerate(_channels(segment.key, codes.bits)):
        folded = rows[..., number::each].contiguous().unsqueeze(2) * step[..., number::each].unsqueeze(3)
        numbers = part.to(rows.dtype).unflatten(2, (groups, -1))
        found = found + torch.matmul(folded, numbers.transpose(-1, -2))
    return found.transpose(2, 3).flatten(3)


def output_of(weights: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Return the products [R, Hkv, N, V] of weights [R, Hkv, N, S] with the values of a segment."""
    codes, slots = segment.value_codes, segment.slots
    if codes is None:
        return torch.matmul(weights, segment.value)
    each, width = 8 // codes.bits, codes.step.shape[3]  # channels of a byte, and groups of channels that share a step
    if codes.step.shape[2] != slots or codes.low.shape[2] != slots or segment.value.shape[3] % width:
        return torch.matmul(weights, read(segment.value, codes, weights.dtype))
    blocks = 1 if codes.scale is None else codes.scale.shape[2]  # of tokens that share a scale
    weights = weights.unflatten(3, (blocks, -1)).transpose(2, 3).unsqueeze(3)  # [R, Hkv, blocks, 1, N, tokens]
    ordered = (x.unflatten(2, (blocks, -1)).transpose(3, 4).unsqueeze(4) for x in (codes.step, codes.low))
    step, low = (x.to(weights.dtype, memory_format=torch.contiguous_format) for x in ordered)
    # both are [., ., blocks, width, 1, tokens]
    folded, parts = weights * step, []
    for part in _channels(segment.value, codes.bits):
        part = part.unflatten(2, (blocks, -1)).unflatten(4, (width, -1)).transpose(3, 4)
        parts.append(torch.matmul(folded, part.to(weights.dtype, memory_format=torch.contiguous_format)))
    found = torch.stack(parts, -1).flatten(5) if each > 1 else parts[0]  # [R, Hkv, blocks, width, N, V / width]
    found = found + (weights * low).sum(-1, keepdim=True)
    found = found.transpose(3, 4).flatten(4)  # [R, Hkv, blocks, N, V]
    if codes.scale is None:
        return found.squeeze(2)
    return (found * codes.scale.to(found.dtype).unsqueeze(3)).sum(2)


def _channels(x: torch.Tensor, bits: int) -> Iterator[torch.Tensor]:
    """Yield the codes of every 8 / bits-th channel, from the first on, then from the second on, and so forth.

    Bytes stay apart, since to interleave their codes would take longer than to multiply with them.
    """
    if bits == 8:
        yield x
        return
    for shift in range(0, 8, bits):
        yield (x >> shift) & (2**bits - 1)


def whole_groups(size: int, segment: Segment) -> int:
    """Return the largest number of slots up to `size` that splits no group of tokens with one step, or that group."""
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
