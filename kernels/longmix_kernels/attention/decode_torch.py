"""Compute decode attention with torch: for each segment two products, then a merge by the logsumexps.

The queries that share a key head are rows of one product, `[R, Hkv, (B / R) * G * T, K]`: torch's own kernels would
repeat the heads. So are the rows of the batch that share a segment. Half precision and codes are read in runs of
`RUN` slots, in float32, so that no second copy of a cache is made; see `decode_codes` for codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from longmix_kernels.attention.decode_codes import output_of, scores_of, whole_groups
from longmix_kernels.attention.segments import Segment

LARGE = 1 << 20
"""Numbers of a segment's keys from which rows that begin at different slots are read one by one on a CPU."""

STREAMED = 1 << 19
"""Numbers of a segment's keys from which a CPU reads them from memory, so that plain products beat torch's kernel."""

FEW = 8
"""Queries of a key head up to which keys times queries are read faster than queries times keys."""

RUN = 4096
"""Slots that are converted at once, or as many below it as whole groups of codes have."""


class Part(NamedTuple):
    """Attention to one set of keys, in float32 or better, rows being the queries of a key head.

    Attributes:
        output: [B, Hkv, G * T, V].
        logsumexp: [B, Hkv, G * T, 1]; -inf where nothing is seen.
        weights: [B, Hkv, G * T, S], which sum to 1 over this set; None where nobody asked.
    """

    output: torch.Tensor
    logsumexp: torch.Tensor
    weights: torch.Tensor | None


def torch_decode(
    query: torch.Tensor,
    segments: Sequence[Segment],
    new: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    return_logsumexp: bool,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor] | None]:
    """Compute decode attention; arguments and results as in `decode_attention`."""
    batch, length, heads, _ = query.shape
    key_heads = segments[0].key.shape[1] if new is None else new[0].shape[2]
    if not (return_logsumexp or return_weights) and _is_usual(query, segments, new):
        # rows of one kernel, which converts half precision as it reads
        key, value, seen = segments[0].key, segments[0].value, segments[0].visible()
        rows = query.view(batch, key_heads, -1, query.shape[-1])
        if _is_ragged(segments[0]):
            return _by_rows(rows * scale, segments[0]).reshape(batch, length, heads, -1), None, None
        if seen is None and _is_streamed(key, STREAMED):
            return _at_once(rows * scale, segments).reshape(batch, length, heads, -1), None, None
        mask = None if seen is None else seen.unsqueeze(2)
        output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
        return output.reshape(batch, length, heads, value.shape[-1]), None, None
    if not (return_logsumexp or return_weights) and _is_whole(query, segments, new):
        rows = (query * scale).view(batch, key_heads, -1, query.shape[-1])
        return _at_once(rows, segments).reshape(batch, length, heads, -1), None, None
    exact = torch.promote_types(query.dtype, torch.float32)
    # [B, Hkv, G * T, K]: the rows of a product are the queries of a key head
    rows = (query.to(exact) * scale).transpose(1, 2).reshape(batch, key_heads, -1, query.shape[-1])
    sets: list[list[tuple[Segment, torch.Tensor | None]]] = [[*_runs(each, exact, return_weights)] for each in segments]
    if new is not None:
        key, value = (x.transpose(1, 2).to(exact) for x in new)
        hidden = None
        if length > 1:
            hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
            hidden = hidden.repeat(rows.shape[2] // length, 1)
        sets.append([(Segment(key, value), hidden)])
    alone = sum(map(len, sets)) == 1 and not return_logsumexp
    parts = [[_attended(rows, *run, alone, return_weights) for run in each] for each in sets]
    flat = [part for each in parts for part in each]
    output, logsumexp = (flat[0].output, flat[0].logsumexp) if len(flat) == 1 else _merged(flat)
    output = output.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)
    weights = None
    if return_weights:
        shares = [[torch.exp(part.logsumexp - _finite(logsumexp)) for part in each] for each in parts]
        weights = [
            _joined([part.weights * share for part, share in zip(*each, strict=True)]).unflatten(2, (-1, length))  # type: ignore[operator]
            for each in zip(parts, shares, strict=True)
        ]
    if not return_logsumexp:
        return output.to(query.dtype), None, weights
    logsumexp = logsumexp.unflatten(2, (-1, length)).squeeze(-1).permute(0, 3, 1, 2).reshape(batch, length, heads)
    return output.to(query.dtype), logsumexp, weights


def _is_usual(query: torch.Tensor, segments: Sequence[Segment], new: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
    """Say whether one query of each head reads one segment of its own row, heads as wide as values.

    Rows that read parts of it go on a CPU only, where torch's kernel gives 0 to a row that sees nothing.
    """
    if new is not None or len(segments) != 1 or query.shape[1] > 1:
        return False
    one = segments[0]
    whole = one.index is None and (query.device.type == "cpu" or (one.count is None and one.first is None))
    alike = one.key.dtype == one.value.dtype == query.dtype and one.key.shape == one.value.shape
    return whole and alike and one.rows == len(query)


def _is_whole(query: torch.Tensor, segments: Sequence[Segment], new: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
    """Say whether one query of each head reads all numbers of all segments, which need no conversion."""
    if new is not None or query.shape[1] > 1 or query.dtype not in (torch.float32, torch.float64):
        return False
    parts = [(each.count, each.first, each.seen, each.index, each.key_codes, each.value_codes) for each in segments]
    if any(each is not None for part in parts for each in part):
        return False
    return all(each.key.dtype == each.value.dtype == query.dtype for each in segments)


def _at_once(rows: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Attend from scaled queries [B, Hkv, G, K] to all of some segments, in one softmax: [B, Hkv, G, V]."""
    batch, _, count, _ = rows.shape
    shares = [batch // each.rows for each in segments]
    scores = []
    for segment, shared in zip(segments, shares, strict=True):
        found = _scores(_together(rows, shared), segment.key)
        scores.append(_apart(found, shared, count))
    weights = torch.cat(scores, -1).softmax(-1).split([each.slots for each in segments], -1)
    output: torch.Tensor | None = None
    for segment, shared, part in zip(segments, shares, weights, strict=True):
        found = _apart(torch.matmul(_together(part, shared), segment.value), shared, count)
        output = found if output is None else output + found
    assert output is not None
    return output


def _scores(rows: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Products of rows [R, Hkv, N, K] and keys [R, Hkv, S, K]: [R, Hkv, N, S], in the order that is read faster."""
    if rows.shape[2] <= FEW and _is_streamed(key, STREAMED):
        return torch.matmul(key, rows.transpose(-1, -2)).transpose(-1, -2).contiguous()
    return torch.matmul(rows, key.transpose(-1, -2))


def _is_streamed(key: torch.Tensor, least: int) -> bool:
    """Say whether a CPU reads these keys, `least` numbers or more, from memory, as numbers that plain products take."""
    exact = key.dtype in (torch.float32, torch.float64) and key.device.type == "cpu"
    return exact and key.numel() >= least and not torch.compiler.is_compiling()


def _is_ragged(segment: Segment) -> bool:
    """Say whether rows of a large segment on a CPU begin at slots of their own; what is before is not worth reading."""
    return segment.first is not None and segment.count is None and _is_streamed(segment.key, LARGE)


def _by_rows(rows: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Attend from scaled queries [B, Hkv, G, K] to a segment, each row from its first slot on: [B, Hkv, G, V]."""
    assert segment.first is not None
    found = []
    for row, first in enumerate(segment.first.clamp(min=0).expand(len(rows)).tolist()):
        key, value = segment.key[row, :, first:], segment.value[row, :, first:]
        weights = torch.matmul(rows[row], key.transpose(-1, -2)).softmax(-1)
        found.append(torch.matmul(weights, value))
    return torch.stack(found)


def _runs(segment: Segment, dtype: torch.dtype, with_weights: bool) -> Iterator[tuple[Segment, None]]:
    """Yield a segment in the dtype, codes left as they are, in runs of `RUN` slots where it has to be converted.

    What an index names is copied, unless the index has room for most slots: it then hides the others.
    """
    coded = segment.key_codes is not None or segment.value_codes is not None
    converted = coded or segment.key.dtype != dtype
    if segment.index is not None and (with_weights or converted or 2 * segment.index.shape[2] <= segment.slots):
        segment = segment.gathered()
        coded, converted = False, segment.key.dtype != dtype
    if not converted:
        yield segment, None
        return
    for run in segment.slices(whole_groups(RUN, segment)):
        key = run.key if run.key_codes is not None else run.key.to(dtype)
        value = run.value if run.value_codes is not None else run.value.to(dtype)
        yield replace(run, key=key, value=value), None


def _attended(
    rows: torch.Tensor, segment: Segment, hidden: torch.Tensor | None, alone: bool, with_weights: bool
) -> Part:
    """Attend from rows [B, Hkv, G * T, K] to a segment of numbers or codes.

    Args:
        rows: the queries, scaled.
        segment: what they read.
        hidden: bool [G * T, S], what they do not see of it; None for nothing.
        alone: whether nothing else is read, so that nobody needs a logsumexp.
        with_weights: whether to return the weights.
    """
    batch, _, count, _ = rows.shape
    shared = batch // segment.rows
    scores = scores_of(_together(rows, shared), segment)
    visible = segment.visible() if segment.index is None else segment.named()
    if visible is not None:
        visible = visible.expand(batch, -1, -1).unflatten(0, (segment.rows, shared)).transpose(1, 2).unsqueeze(3)
        scores = scores.unflatten(2, (shared, count)).masked_fill(~visible, -torch.inf).flatten(2, 3)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if alone and visible is None:
        weights, logsumexp = scores.softmax(-1), scores.new_zeros(()).expand(*scores.shape[:3], 1)
        output = output_of(weights, segment)
    elif segment.slots == 0:
        weights, logsumexp = scores, scores.new_full((*scores.shape[:3], 1), -torch.inf)
        output = output_of(weights, segment)
    else:  # one exponential for each score; the largest is 1, so that a sum below it is of nothing
        largest = _finite(scores.amax(-1, keepdim=True))
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        logsumexp, total = largest + total.log(), total.clamp(min=1)
        output = output_of(weights, segment) / total
        if with_weights:
            weights = weights / total
    part = Part(output, logsumexp, weights if with_weights else None)
    apart = [None if x is None else _apart(x, shared, count) for x in part]
    return Part(*apart)  # type: ignore[arg-type]


def _joined(runs: list[torch.Tensor]) -> torch.Tensor:
    """Return the weights of a set of keys from those of its runs."""
    return runs[0] if len(runs) == 1 else torch.cat(runs, -1)


def _together(rows: torch.Tensor, shared: int) -> torch.Tensor:
    """Return [R, Hkv, shared * count, .] of rows [R * shared, Hkv, count, .], of which so many read one segment."""
    return rows if shared == 1 else rows.unflatten(0, (-1, shared)).transpose(1, 2).flatten(2, 3)


def _apart(x: torch.Tensor, shared: int, count: int) -> torch.Tensor:
    """Return [R * shared, Hkv, count, .] of rows [R, Hkv, shared * count, .] that read one segment."""
    return x if shared == 1 else x.unflatten(2, (shared, count)).transpose(1, 2).flatten(0, 1)


def _merged(parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and logsumexp over all sets of keys."""
    stacked = torch.cat([part.logsumexp for part in parts], -1)
    logsumexp = stacked.logsumexp(-1, keepdim=True)
    shares = (stacked - _finite(logsumexp)).exp().split(1, -1)
    output = parts[0].output * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        output = output + part.output * share
    return output, logsumexp


def _finite(logsumexp: torch.Tensor) -> torch.Tensor:
    """Return 0 for rows that see nothing, whose logsumexp is -inf."""
    return logsumexp.masked_fill(logsumexp.isneginf(), 0.0)
