"""Mixers that see part of the keys, against plain torch code of the same maths: `python -m benchmarks.sparse_mixers`.

    sparsek         near blocks and the best of all keys before; plain: gates block after block, then dense attention
    combiner        own segment and one key for each before; plain: these keys behind the others, and a mask
    combiner_log    spans of 1, 2, 4, ... tokens; plain: the same, for each level
    dilated         heads whose windows have gaps; plain: a mask
    tensor          pairs of tokens in two windows; plain: attention with a mask for each distance
    parallax        all keys, weighed by a probe too; plain: dense matrices of weights and of the probe's products

Forward and backward pass of what stands between the projections, in turns, in float32. Plain code has matrices of all
pairs, ours does not.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import results, timing
from benchmarks.command import RESULTS, Parser, positive, progress
from longmix.files import replace_text
from longmix.mixers.combiner import Combiner
from longmix.mixers.combiner_log import CombinerLog
from longmix.mixers.parallax import Parallax, ProbeRows
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.kept_keys import LEAST_GATE
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.sparsek_operator import sparsek
from longmix.mixers.sliding_window import SlidingWindow
from longmix.mixers.sparsek import SparseK
from longmix.mixers.tensor import TensorAttention

COLUMNS = {
    "mixer": "mixer",
    "plain_ms": "plain, ms",
    "ours_ms": "ours, ms",
    "times": "times",
    "plain_mib": "plain, MiB",
    "ours_mib": "ours, MiB",
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


Plain = Callable[..., Tensor]
MIXERS: Mapping[str, tuple[Callable[[ModelShape], SoftmaxAttention], Plain]] = {
    "sparsek": (lambda shape: SparseK(shape, 0), plain_sparsek),
    "combiner": (lambda shape: Combiner(shape, 0), plain_combiner),
    "combiner_log": (lambda shape: CombinerLog(shape, 0), plain_combiner_log),
    "dilated": (lambda shape: SlidingWindow(shape, 0, window=64, dilation=[1, 16]), plain_dilated),
    "tensor": (lambda shape: TensorAttention(shape, 0, window_1=4), plain_tensor),
    "parallax": (lambda shape: Parallax(shape, 0), plain_parallax),
}
"""By name: a mixer for a shape, and plain code of it."""


def workload(
    mixer: SoftmaxAttention, plain: Plain, length: int, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], list[Tensor]]]:
    """Output and gradients of all inputs, by "plain" and "ours", from one random row."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(1, length, mixer.num_heads, *sizes, generator=generator, dtype=dtype)

    query, key, value = (drawn(mixer.head_dim).requires_grad_() for _ in range(3))
    more: list[Tensor] = []
    if isinstance(mixer, SparseK):
        more = [drawn().requires_grad_()]
    elif isinstance(mixer, Parallax):
        more = [drawn(mixer.head_dim).requires_grad_()]
    elif isinstance(mixer, TensorAttention):
        more = [drawn(2 * mixer.head_dim).requires_grad_()]
    tensors, grad = [query, key, value, *more], drawn(mixer.head_dim)

    def ours() -> Tensor:
        if isinstance(mixer, Parallax):
            return mixer.attend(ProbeRows(query, key, value, probe=more[0]))[0]
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
    add("--out", type=Path, default=RESULTS, help="folder for JSON and table")
    options = parser.parse_args(arguments)
    parser.make_folder(options.out)
    return options


def measure(options: argparse.Namespace) -> list[results.Record]:
    """One record for each mixer."""
    shape, records = ModelShape(options.heads * options.dim, 1, options.heads), []
    clock = timing.clock_for(torch.device("cpu"))
    with progress(len(options.mixers)) as (announce, finish):
        for name in options.mixers:
            make, plain = MIXERS[name]
            calls = workload(make(shape), plain, options.length)
            found = timing.measure(calls, clock, seconds=options.seconds, limit=options.limit, announce=announce)
            record: results.Record = {"mixer": name}
            for who, outcome in found.items():
                record[f"{who}_ms"] = None if outcome.median is None else 1e3 * outcome.median
                record[f"{who}_mib"] = None if outcome.peak_bytes is None else outcome.peak_bytes / 2**20
                record[f"{who}_note"] = outcome.note
            ours, theirs = found["ours"].call_seconds, found["plain"].call_seconds
            record["times"] = None if ours is None or theirs is None else theirs / ours
            records.append(record)
            finish(name)
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    options = parse(arguments)
    environment = results.environment(torch.device("cpu"), "fp32")
    records = measure(options)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    path = options.out / f"{results.file_stem('sparse_mixers', environment)}.json"
    content = {"benchmark": "sparse_mixers", "environment": environment, "settings": settings, "results": records}
    results.write_json(path, content)
    title = f"Forward and backward, one row of {options.length} tokens, {options.heads} heads of {options.dim}"
    text = f"{title}\n\n{results.text_table(records, COLUMNS)}\n"
    replace_text(path.with_suffix(".txt"), text)
    print(f"{text}\nwritten: {path}, .txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
