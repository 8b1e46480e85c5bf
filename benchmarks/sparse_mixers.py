"""Mixers that see part of the keys, against plain torch code of the same maths: `python -m benchmarks.sparse_mixers`.

    sparsek         near blocks and the best of all keys before; plain: gates block after block, then dense attention
    combiner        own segment and one key for each before; plain: these keys behind the others, and a mask
    combiner_log    spans of 1, 2, 4, ... tokens; plain: the same, for each level
    dilated         heads whose windows have gaps; plain: a mask
    tensor          pairs of tokens in two windows; plain: attention with a mask for each distance
    parallax        all keys, weighed by a probe too; plain: dense matrices of weights and of the probe's products
    moba            own block and the best of those before; plain: a mask for each head
    nsa             compressed blocks, chosen blocks and a window; plain: dense matrices of all three, and masks

Forward and backward pass of what stands between the projections, in turns, in float32. Plain code has matrices of all
pairs, ours does not.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import results, timing
from benchmarks.arms import cell, markdown
from benchmarks.command import RESULTS, Parser, positive, progress
from benchmarks.results import Record
from longmix.mixers.combiner import Combiner
from longmix.mixers.combiner_log import CombinerLog
from longmix.mixers.moba import MoBA
from longmix.mixers.nsa import NSA, rounded
from longmix.mixers.parallax import Parallax, ProbeRows
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.kept_keys import LEAST_GATE
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.sparsek_operator import sparsek
from longmix.mixers.sliding_window import SlidingWindow
from longmix.mixers.sparsek import SparseK
from longmix.mixers.tensor import TensorAttention
from longmix.reporting.plots import decimal_axis_below, drawing, new_figure, set_title
from longmix.reporting.style import nth_style

COLUMNS = {
    "plain_ms": ("plain, ms", ",.0f"),
    "ours_ms": ("ours, ms", ",.0f"),
    "times": ("times as fast", ".1f"),
    "plain_mib": ("plain, MiB", ",.0f"),
    "ours_mib": ("ours, MiB", ",.0f"),
}


def dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention [B, T, H, d] to keys [B, S, H, d] with a bias [H or 1, T, S] of the scores, -inf for unseen keys."""
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", (scores + bias).softmax(-1), value)


def unseen(mask: Tensor) -> Tensor:
    """The bias of a mask."""
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)


def plain_sparsek(mixer: SparseK, query: Tensor, key: Tensor, value: Tensor, score: Tensor) -> Tensor:
    """Block after block: choose among the candidates, and write log p into a matrix."""
    length, size, past = query.shape[1], mixer.block, mixer.past_blocks
    row = torch.arange(length)
    block = row // size
    near = (row[:, None] >= row) & (block[:, None] - block <= past)
    rows = []
    for u in score[0].unbind(-1):
        kept, biases = row[:0], []
        for number in range(-(-length // size)):
            bias = unseen(near[number * size : (number + 1) * size]).to(u.dtype)
            leaving = number - past - 1
            if leaving >= 0:
                candidates = torch.cat((row[leaving * size : (leaving + 1) * size], kept))
                gates = sparsek(u[candidates], mixer.keep)
                best = u[candidates].topk(min(mixer.keep, len(candidates))).indices
                kept = candidates[best]
                bias = bias.index_copy(1, kept, gates[best].clamp(min=LEAST_GATE).log().expand(len(bias), -1))
            biases.append(bias)
        rows.append(torch.cat(biases))
    return dense(query, key, value, torch.stack(rows))


def spans(query: Tensor, key: Tensor, value: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Key and value of each whole span."""
    q, k, v = (x[:, : x.shape[1] // size * size].unflatten(1, (-1, size)) for x in (query, key, value))
    weight = (q.amax(2, keepdim=True) * k).sum(-1, keepdim=True).mul(query.shape[-1] ** -0.5).softmax(2)
    return k.amax(2), (weight * v).sum(2)


def plain_combiner(mixer: Combiner, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All keys and those of the segments."""
    row = torch.arange(query.shape[1])
    number = row // mixer.block
    more = spans(query, key, value, mixer.block)
    own = (row[:, None] >= row) & (number[:, None] == number)
    mask = torch.cat((own, number[:, None] > torch.arange(more[0].shape[1])), 1)
    return dense(query, torch.cat((key, more[0]), 1), torch.cat((value, more[1]), 1), unseen(mask)[None])


def plain_combiner_log(mixer: CombinerLog, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All keys and those of all spans."""
    row, size = torch.arange(query.shape[1]), 1
    keys, values, masks = [key], [value], [row[:, None] == row]
    while size < len(row):
        more = spans(query, key, value, size)
        number = row // size
        masks.append((number[:, None] - 1 == torch.arange(more[0].shape[1])) & (number % 2 == 1)[:, None])
        keys, values, size = [*keys, more[0]], [*values, more[1]], size * 2
    return dense(query, torch.cat(keys, 1), torch.cat(values, 1), unseen(torch.cat(masks, 1))[None])


def plain_dilated(mixer: SlidingWindow, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A mask for each head."""
    row = torch.arange(query.shape[1])
    distance = row[:, None] - row
    gaps = torch.tensor(mixer.dilation)[:, None, None]
    mask = (distance >= 0) & (distance % gaps == 0) & (distance < mixer.window * gaps)
    return dense(query, key, value, unseen(mask))


def plain_tensor(mixer: TensorAttention, query: Tensor, key: Tensor, value: Tensor, first: Tensor) -> Tensor:
    """Scores of all distances beside each other."""
    row = torch.arange(query.shape[1])
    distance = row[:, None] - row
    bias = unseen((distance >= 0) & (distance < mixer.window_2))
    first_key, first_value = first.split(mixer.head_dim, -1)
    scores = []
    for offset in range(mixer.window_1):
        own = query * first_key.roll(offset, 1)
        found = torch.einsum("bihd,bjhd->bhij", own, key) * mixer.head_dim**-0.5 + bias
        scores.append(found.masked_fill((row < offset)[:, None], -torch.inf))
    weights = torch.cat(scores, -1).softmax(-1).unflatten(-1, (mixer.window_1, -1))
    mixed = [torch.einsum("bhij,bjhd->bihd", weights[..., a, :], value) for a in range(mixer.window_1)]
    return sum((part * first_value.roll(a, 1) for a, part in enumerate(mixed)), torch.zeros_like(query))


def plain_parallax(mixer: Parallax, query: Tensor, key: Tensor, value: Tensor, probe: Tensor) -> Tensor:
    """Attention whose weights are multiplied with 1 + e - t, t the probe's products and e their mean under them."""
    query, key, value, probe = (x.transpose(1, 2) for x in (query, key, value, probe))
    length = query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu_(1)
    weights = (query @ key.mT * mixer.head_dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    products = probe @ key.mT
    mean = (weights * products).sum(-1, keepdim=True)
    return ((weights * (1 + mean - products)) @ value).transpose(1, 2)


def chosen(scores: Tensor, allowed: Tensor, keep: int, size: int) -> Tensor:
    """The keys [H, T, T] in the `keep` blocks of `size` tokens with the highest scores [H, T, N] of those allowed.

    Of equal scores the earlier block wins.
    """
    hidden = scores.masked_fill(~allowed, -torch.inf)
    best = torch.sort(hidden, dim=-1, descending=True, stable=True).indices[..., :keep]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & allowed
    mask = mask.repeat_interleave(size, -1)
    return torch.nn.functional.pad(mask, (0, mask.shape[1] - mask.shape[2]))


def plain_moba(mixer: MoBA, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores of the mean keys of whole blocks, and a mask for each head."""
    length, size = query.shape[1], mixer.block
    row = torch.arange(length)
    number = row // size
    means = key.detach()[0, : length // size * size].unflatten(0, (-1, size)).mean(1)
    scores = torch.einsum("ihd,bhd->hib", query.detach()[0], means)
    past = chosen(scores, number[:, None] > torch.arange(len(means)), mixer.top_k - 1, size)
    own = (row[:, None] >= row) & (number[:, None] == number)
    return dense(query, key, value, unseen(own | past))


def plain_nsa(mixer: NSA, query: Tensor, key: Tensor, value: Tensor, gates: Tensor) -> Tensor:
    """Weights of all compressed blocks, a mask for each head of chosen blocks, and one of the window."""
    length, size, stride = query.shape[1], mixer.compress_block, mixer.compress_stride
    (raw, query), keys, values = query.chunk(2, 2), key.chunk(3, 2), value.chunk(3, 2)
    coarse_key, coarse_value = (x[0].unfold(1, size, stride).movedim(-1, 2) for x in (keys, values))
    coarse_key = mixer.compressed_norm(mixer.compress_key(coarse_key))
    row, begin = torch.arange(length), torch.arange(coarse_key.shape[1]) * stride
    ended = row[:, None] >= begin + size - 1
    some = ended.any(1, keepdim=True)
    scores = torch.einsum("bihd,bnhd->bhin", raw, coarse_key) * mixer.head_dim**-0.5
    weights = scores.masked_fill(some & ~ended, -torch.inf).softmax(-1) * some
    coarse = torch.einsum("bhin,bnhd->bihd", weights, mixer.compress_value(coarse_value))

    place, blocks = torch.arange(0, length, stride), length // mixer.block
    inside = (place >= begin[:, None]) & (place < begin[:, None] + size)
    together = inside.to(weights.dtype) @ (place[:, None] // mixer.block == torch.arange(blocks)).to(weights.dtype)
    importance = rounded(weights.detach()[0] @ together).index_fill(-1, row[: min(1, blocks)], torch.inf)
    number, distance = row // mixer.block, row[:, None] - row
    allowed = number[:, None] - torch.arange(blocks) >= mixer.local
    far = chosen(importance, allowed, mixer.blocks - mixer.local, mixer.block)
    near = (distance >= 0) & (number[:, None] - number < mixer.local)
    window = (distance >= 0) & (distance < mixer.window)
    parts = coarse, *(dense(query, keys[n], values[n], unseen(m)) for n, m in ((1, near | far), (2, window[None])))
    return torch.stack(parts, -1).mul(gates.unsqueeze(-2)).sum(-1)


Plain = Callable[..., Tensor]
MIXERS: Mapping[str, tuple[Callable[[ModelShape], SoftmaxAttention], Plain]] = {
    "sparsek": (lambda shape: SparseK(shape, 0), plain_sparsek),
    "combiner": (lambda shape: Combiner(shape, 0), plain_combiner),
    "combiner_log": (lambda shape: CombinerLog(shape, 0), plain_combiner_log),
    "dilated": (lambda shape: SlidingWindow(shape, 0, window=64, dilation=[1, 16]), plain_dilated),
    "tensor": (lambda shape: TensorAttention(shape, 0, window_1=4), plain_tensor),
    "parallax": (lambda shape: Parallax(shape, 0), plain_parallax),
    "moba": (lambda shape: MoBA(shape, 0), plain_moba),
    "nsa": (lambda shape: NSA(shape, 0), plain_nsa),
}
"""By name: a mixer for a shape, and plain code of it."""


def workload(
    mixer: SoftmaxAttention, plain: Plain, length: int, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], list[Tensor]]]:
    """Output and gradients of all inputs, by "plain" and "ours", from one random row."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int, parts: int = 1) -> Tensor:
        return torch.randn(1, length, parts * mixer.num_heads, *sizes, generator=generator, dtype=dtype)

    parts = (2, 3, 3) if isinstance(mixer, NSA) else (1, 1, 1)
    query, key, value = (drawn(mixer.head_dim, parts=count).requires_grad_() for count in parts)
    more: list[Tensor] = []
    if isinstance(mixer, SparseK):
        more = [drawn().requires_grad_()]
    elif isinstance(mixer, Parallax):
        more = [drawn(mixer.head_dim).requires_grad_()]
    elif isinstance(mixer, TensorAttention):
        more = [drawn(2 * mixer.head_dim).requires_grad_()]
    elif isinstance(mixer, NSA):
        more = [drawn(3).sigmoid().requires_grad_()]
    tensors, grad = [query, key, value, *more], drawn(mixer.head_dim)

    def ours() -> Tensor:
        if isinstance(mixer, Parallax):
            return mixer.attend(ProbeRows(query, key, value, probe=more[0]))[0]
        if isinstance(mixer, NSA):
            return mixer.attend(Rows(query, key, value, query_labels=more[0]))[0]
        rows = Rows(query, key, value, key_labels=more[0]) if more else mixer.rows(query, key, value, None)
        return mixer.attend(rows)[0]

    def both(forward: Callable[[], Tensor]) -> list[Tensor]:
        output = forward()
        return [output.detach(), *torch.autograd.grad(output, tensors, grad)]

    return {"plain": lambda: both(lambda: plain(mixer, *tensors)), "ours": lambda: both(ours)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.sparse_mixers", description="Mixers against plain torch code.")
    add = parser.add_argument
    add("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS), metavar="NAME", help="default: all")
    add("--length", type=positive(int, 1 << 15), default=8192, metavar="T")
    add("--heads", type=positive(int, 64), default=2)
    add("--dim", type=positive(int, 256), default=64)
    add("--seconds", type=positive(float), default=10.0, help="how long each is timed")
    add("--limit", type=positive(float), default=600.0, help="most seconds of a call")
    add("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    parser.make_folder(options.out)
    return options


def measure(options: argparse.Namespace) -> list[Record]:
    """One record for each mixer."""
    shape, records = ModelShape(options.heads * options.dim, 1, options.heads), []
    clock = timing.clock_for(torch.device("cpu"))
    with progress(len(options.mixers)) as (announce, finish):
        for name in options.mixers:
            make, plain = MIXERS[name]
            calls = workload(make(shape), plain, options.length)
            found = timing.measure(calls, clock, seconds=options.seconds, limit=options.limit, announce=announce)
            record: Record = {"mixer": name, "length": options.length}
            for who, outcome in found.items():
                record[f"{who}_ms"] = None if outcome.median is None else 1e3 * outcome.median
                record[f"{who}_mib"] = None if outcome.peak_bytes is None else outcome.peak_bytes / 2**20
                record[f"{who}_note"] = outcome.note
            ours, theirs = found["ours"].call_seconds, found["plain"].call_seconds
            record["times"] = None if ours is None or theirs is None else theirs / ours
            records.append(record)
            finish(name)
    return records


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each mixer."""
    heads = ["mixer", *(head for head, _ in COLUMNS.values())]
    lines = [
        [f"`{record['mixer']}`", *(cell(record[key], form) for key, (_, form) in COLUMNS.items())] for record in records
    ]
    return markdown([heads, *lines], 1)


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """Bars of time and memory, plain code beside ours."""
    figure, panels = new_figure(2, title=f"Forward and backward pass of {records[0]['length']:,} tokens")
    places = range(len(records))
    for axes, (unit, title) in zip(panels, {"ms": "time, ms", "mib": "memory, MiB"}.items(), strict=True):
        for number, who in enumerate(("plain", "ours")):
            widths = [record[f"{who}_{unit}"] or 0 for record in records]
            bars = [place + 0.4 * (number - 0.5) for place in places]
            axes.barh(bars, widths, height=0.36, label=who, color=nth_style(1 - number).light)
        axes.set_yticks(places, [record["mixer"] for record in records])
        axes.invert_yaxis()
        values = [record[f"{who}_{unit}"] or 1.0 for record in records for who in ("plain", "ours")]
        ends = min(min(values) / 2, max(values) / 1000), 2 * max(values)  # powers of ten, whose labels have room
        decimal_axis_below(axes, ends)
        axes.set_xlim(*ends)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        set_title(axes, title)
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    options = parse(arguments)
    return results.carry_out("sparse_mixers", options, lambda: measure(options), table, drawn)


if __name__ == "__main__":
    sys.exit(main())
