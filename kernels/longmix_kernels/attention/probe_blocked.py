"""Compute attention with a probe tile by tile, in memory linear in the length.

`probe_reference` has the equations, and `blocked` the tiles. Query and probe of a tile are stacked, so that one product
with the keys gives s and t, and one with the values both sums that make the output:

    O1 = P V    O2 = (P * t) V    o = O1 (1 + e) - O2

Backward, with w = 1 + e - t, g = dO V^T, b_i = dO_i . O1_i and delta_i = dO_i . o_i:

    h = P * (g - b)    dV = (P * w)^T dO    dS = w * h + P * (b - delta)    dQ = scale dS K    dR = -h K
    dK = scale dS^T Q - h^T R

Nothing flows through the logsumexp and e of a row: both are given by its output.
"""

from functools import reduce

import torch

from longmix_kernels.attention.blocked import Plan, add_to_keys, tile_keys, tile_rows
from longmix_kernels.attention.panels import MATMUL, PanelMath
from longmix_kernels.attention.permutation import put_rows, take_rows
from longmix_kernels.attention.probe_inputs import ProbeInputs, own_products

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def blocked_forward(call: ProbeInputs, math: PanelMath = MATMUL) -> tuple[torch.Tensor, ...]:
    """Return the output, that of softmax attention, the logsumexp, and the mean of r . k, as `reference_forward` does.

    Args:
        call: its pattern must have bounds.
        math: which tiles to take, all of which cut their segments; its functions are not used.
    """
    pattern, scale = call.inputs.pattern, call.inputs.scale
    own = own_products(call)
    exact = own.dtype
    query, probe, anchor = (
        take_rows(x, pattern.query_rows) for x in (call.inputs.query.to(exact), call.probe.to(exact), own)
    )
    key, value = (take_rows(x.to(exact), pattern.key_rows) for x in (call.inputs.key, call.inputs.value))
    plain = query.new_zeros(*query.shape[:-1], value.shape[-1])
    output = torch.zeros_like(plain)
    logsumexp, expected = query.new_full(query.shape[:-1], -torch.inf), query.new_zeros(query.shape[:-1])
    plan = Plan(pattern, query, key, math)

    for group in plan.groups():
        q, r, a, *results = (group.query_rows(x) for x in (query, probe, anchor, output, plain, logsumexp, expected))
        k, v = (group.key_rows(x).expand(-1, q.shape[1], -1, -1) for x in (key, value))
        for tile, turn in plan.turns(group):
            stacked = torch.cat([tile_rows(q, tile, turn) * scale, tile_rows(r, tile, turn)], -2)
            own_rows, parts = tile_rows(a, tile, turn).unsqueeze(-1), []
            for panel in tile.panels:
                mask, _ = plan.mask(group, tile, panel, turn)
                panel_k, panel_v = (tile_keys(x, tile, panel.keys, turn) for x in (k, v))
                parts.append(_panel_forward(stacked, own_rows, panel_k, panel_v, mask))
            sums, mean, lse = reduce(_merge, parts)
            first, second = sums.chunk(2, -2)
            found = torch.addcmul(first - second, first, mean.unsqueeze(-1)), first, lse, mean
            for all_rows, of_tile in zip(results, found, strict=True):
                tile_rows(all_rows, tile, turn).copy_(of_tile)
    expected = (put_rows(expected, pattern.query_rows) + own).masked_fill_(
        (logsumexp := put_rows(logsumexp, pattern.query_rows)).isneginf(), 0.0
    )
    output, plain = (put_rows(x.to(call.probe.dtype), pattern.query_rows) for x in (output, plain))
    return output, plain, logsumexp, expected


def blocked_backward(
    call: ProbeInputs,
    grad_output: torch.Tensor,
    output: torch.Tensor,
    plain: torch.Tensor,
    logsumexp: torch.Tensor,
    expected: torch.Tensor,
    math: PanelMath = MATMUL,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of probe, query, key and value, in their shapes and dtypes.

    Args:
        call, math: as in `blocked_forward`.
        grad_output: [B, Tq, Hq, Dv].
        output, plain, logsumexp, expected: what the forward returned.
    """
    pattern, scale, dtype = call.inputs.pattern, call.inputs.scale, call.probe.dtype
    exact = logsumexp.dtype
    logsumexp = logsumexp.masked_fill(logsumexp.isneginf(), torch.inf)  # a row that sees nothing weighs nothing
    grad_output = grad_output.to(exact)
    base = (grad_output * plain).sum(-1)
    rest = base - (grad_output * output).sum(-1)
    query, probe, grad_output, *vectors = (
        take_rows(x, pattern.query_rows)
        for x in (call.inputs.query.to(exact), call.probe.to(exact), grad_output, logsumexp, 1 + expected, base, rest)
    )
    key, value = (take_rows(x.to(exact), pattern.key_rows) for x in (call.inputs.key, call.inputs.value))
    grad_query, grad_probe, grad_key, grad_value = (x.new_zeros(x.shape) for x in (query, probe, key, value))
    plan = Plan(pattern, query, key, math)

    for group in plan.groups():
        q, r, do, grad_q, grad_r, *numbers = (
            group.query_rows(x) for x in (query, probe, grad_output, grad_query, grad_probe, *vectors)
        )
        grad_k, grad_v = group.key_rows(grad_key), group.key_rows(grad_value)
        k, v = (group.key_rows(x).expand(-1, q.shape[1], -1, -1) for x in (key, value))
        for tile, turn in plan.turns(group):
            minus_r = -tile_rows(r, tile, turn)
            stacked = torch.cat([minus_r, tile_rows(q, tile, turn) * scale, minus_r], -2)
            rows = tuple(tile_rows(x, tile, turn).unsqueeze(-1) for x in numbers)
            do_rows = tile_rows(do, tile, turn)
            for panel in tile.panels:
                mask, _ = plan.mask(group, tile, panel, turn)
                panel_k, panel_v = (tile_keys(x, tile, panel.keys, turn) for x in (k, v))
                parts = _panel_backward(stacked, do_rows, rows, panel_k, panel_v, mask)
                tile_rows(grad_q, tile, turn).add_(parts[0], alpha=scale)
                tile_rows(grad_r, tile, turn).sub_(parts[1])
                add_to_keys(grad_k, parts[2], tile, panel.keys, turn)
                add_to_keys(grad_v, parts[3], tile, panel.keys, turn)
    return (
        *(put_rows(x.to(dtype), pattern.query_rows).contiguous() for x in (grad_probe, grad_query)),
        *(put_rows(x.to(dtype), pattern.key_rows).contiguous() for x in (grad_key, grad_value)),
    )


def _panel_forward(
    stacked: torch.Tensor, anchor: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> Part:
    """Return O1 above O2 [X, Y, 2 rows, Dv], e and the logsumexp [X, Y, rows] of a panel.

    Args:
        stacked: scale * query above the probe, [X, Y, 2 rows, D].
        anchor: [X, Y, rows, 1], what is subtracted from r . k.
        key, value: [X, Y, keys, D or Dv].
        mask: added to the scores, or None.
    """
    both = stacked @ key.mT
    scores, products = both.chunk(2, -2)
    if mask is not None:
        scores.add_(mask)
    highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    products.sub_(anchor).mul_(weights)
    divisor = total.clamp(min=torch.finfo(total.dtype).tiny)
    mean = products.sum(-1, keepdim=True).div_(divisor)
    sums = (both @ value).div_(torch.cat([divisor, divisor], -2))
    return sums, mean.squeeze(-1), (highest + total.log()).squeeze(-1)


def _merge(first: Part, second: Part) -> Part:
    """Return what two disjoint sets of keys are together; a row that sees neither has 0 and a logsumexp of -inf."""
    total = torch.logaddexp(first[2], second[2])
    share = torch.sigmoid(second[2] - first[2]).masked_fill_(total.isneginf(), 0.0)
    of_sums = torch.cat([share, share], -1).unsqueeze(-1)
    return first[0].lerp_(second[0], of_sums), first[1].lerp_(second[1], share), total


def _panel_backward(
    stacked: torch.Tensor,
    grad_output: torch.Tensor,
    numbers: tuple[torch.Tensor, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a panel's dS K and h K [X, Y, rows, D], and its gradients of keys and values.

    Args:
        stacked: -probe above scale * query above -probe, [X, Y, 3 rows, D].
        grad_output: [X, Y, rows, Dv].
        numbers: L, 1 + e, b and b - delta of the complete rows, each [X, Y, rows, 1].
        key, value: [X, Y, keys, D or Dv].
        mask: added to the scores, or None.
    """
    rows = grad_output.shape[-2]
    logsumexp, level, base, rest = numbers
    three = key.new_empty(*stacked.shape[:-1], key.shape[-2])
    factor, weights, change = three.chunk(3, -2)
    torch.matmul(stacked[..., : 2 * rows, :], key.mT, out=three[..., : 2 * rows, :])
    torch.matmul(grad_output, value.mT, out=change)
    factor.add_(level)
    if mask is not None:
        weights.add_(mask)
    weights.sub_(logsumexp).exp_()
    change.sub_(base).mul_(weights)
    grad_value = (weights * factor).mT @ grad_output
    weights.mul_(rest).addcmul_(factor, change)
    scores_and_change = three[..., rows:, :]
    of_rows = scores_and_change @ key
    grad_key = scores_and_change.mT @ stacked[..., rows:, :]
    return of_rows[..., :rows, :], of_rows[..., rows:, :], grad_key, grad_value
