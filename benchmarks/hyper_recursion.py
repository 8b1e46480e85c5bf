"""How far causal forms of HyperAttention are from softmax attention: `python -m benchmarks.hyper_recursion`.

HyperAttention (Han et al. 2023, arXiv 2310.05869) makes its approximation causal by recursion: each half of a row by
itself, and the queries of the second half on the keys of the first without a mask, by sorted blocks and samples. Halves
of few tokens are exact. `mixer=hyper` has a window, buckets that are the hash itself, and samples instead, since ranks
among the queries of a half let later ones choose for earlier ones. Compared are both, and a window alone, at the
numbers of pairs that they compute. Tokens are those of `benchmarks.scatterbrain`. Errors are of the outputs, root mean
square, relative to those of softmax attention, in float64; means over draws of everything.

Leaves JSON, a Markdown table and a picture.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import results
from benchmarks.command import RESULTS, Parser, positive
from benchmarks.results import Record
from benchmarks.scatterbrain import KEPT
from benchmarks.scatterbrain import drawn as drawn_tokens
from longmix.mixers.flash import Flash
from longmix.mixers.hyper import Hyper
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.head_options import HeadOptions
from longmix.mixers.parts.metrics import Metric
from longmix.reporting.plots import draw_curves, drawing, new_figure
from longmix_kernels.attention import attention, merge

Function = Callable[[Tensor, Tensor, Tensor], Tensor]

METHODS = ("published recursion", "mixer=hyper", "window")
SIZES = (16, 32, 64, 128)
"""Tokens of a sorted block, and samples, of the recursion. With 2,048 tokens a query has about six times as many pairs,
in `mixer=hyper` a third each in its window, its bucket and samples."""

EXACT = 2
"""Halves of so many blocks are exact."""

PROJECTIONS = 7
"""Bits of the published hash."""


def recursive_attention(
    query: Tensor, key: Tensor, value: Tensor, *, block: int, samples: int, exact: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The published causal form, densely.

    Args:
        query: [B, T, Hq, D].
        key, value: [B, T, Hkv, D]; Hkv divides Hq.
        block: keys of a sorted block.
        samples: keys that are drawn for a half, with replacement.
        exact: rows of at most so many tokens are attended to exactly; at least 1.
        seed: of projections and samples.

    Returns:
        The output [B, T, Hq, D] and its logsumexp [B, T, Hq].
    """
    length = query.shape[1]
    if length <= exact:
        return attention(query, key, value, return_logsumexp=True)
    first, second = slice(0, length // 2), slice(length // 2, length)
    halved = partial(recursive_attention, block=block, samples=samples, exact=exact)
    before, own = (
        halved(query[:, half], key[:, half], value[:, half], seed=2 * seed + number)
        for number, half in enumerate((first, second), 1)
    )
    across = sampled_attention(query[:, second], key[:, first], value[:, first], block, samples, seed)
    after = merge([own, across])
    return torch.cat((before[0], after[0]), 1), torch.cat((before[1], after[1]), 1)


def sampled_attention(
    query: Tensor, key: Tensor, value: Tensor, block: int, samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Attention without a mask to the own sorted block, and to samples that stand for all other keys."""
    batch, keys, heads = key.shape[0], key.shape[1], query.shape[2]
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randn(key.shape[-1], PROJECTIONS, generator=generator, dtype=torch.float64).to(key)
    drawn = torch.randint(keys, (batch, samples, heads), generator=generator).to(key.device)
    key, value = (x.repeat_interleave(heads // x.shape[2], 2) for x in (key, value))
    count = max(1, keys // block)
    own, other = (blocks_of(x, planes, count).transpose(1, 2) for x in (query, key))  # [B, H, T]
    same = own.unsqueeze(-1) == other.unsqueeze(-2)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    index = drawn.transpose(1, 2).unsqueeze(2).expand(-1, -1, query.shape[1], -1)
    sampled = (scores.gather(-1, index) + math.log(keys / samples)).masked_fill(same.gather(-1, index), -torch.inf)
    every = torch.cat((scores.masked_fill(~same, -torch.inf), sampled), -1)
    values = torch.cat((value, value.gather(1, drawn.unsqueeze(-1).expand(-1, -1, -1, value.shape[-1]))), 1)
    return torch.einsum("bhij,bjhd->bihd", every.softmax(-1), values), every.logsumexp(-1).transpose(1, 2)


@torch.no_grad()
def blocks_of(x: Tensor, planes: Tensor, count: int) -> Tensor:
    """The block of each token [B, T, H] when a row is sorted by its hash and cut into `count` blocks of equal size.

    Neighbours in the order differ in one sign: the signs are the Gray code of the place.
    """
    digits = (x @ planes > 0).int().cumsum(-1) % 2
    place = (digits * 2 ** torch.arange(planes.shape[1] - 1, -1, -1, device=x.device)).sum(-1)
    rank = place.argsort(dim=1, stable=True).argsort(1)
    return rank * count // x.shape[1]


def recursive_pairs(length: int, block: int, samples: int, exact: int) -> int:
    """The pairs of a query and a key that `recursive_attention` needs, of each head."""
    if length <= exact:
        return length * (length + 1) // 2
    first, second = length // 2, length - length // 2
    parts = (recursive_pairs(half, block, samples, exact) for half in (first, second))
    return sum(parts) + second * (-(-first // max(1, first // block)) + samples)


class PublishedHyper(Flash):
    """The published recursion as a mixer, for audits and comparisons: it leaks, and takes whole rows of one document.

    Args:
        shape, layer_index, options: see `SoftmaxAttention`.
        block, samples, exact: see `recursive_attention`.
    """

    leaky = True

    def __init__(
        self,
        shape: ModelShape,
        layer_index: int,
        *,
        block: int = 256,
        samples: int = 256,
        exact: int = 4096,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(shape, layer_index, **options)
        self.published = partial(recursive_attention, block=block, samples=samples, exact=exact)

    def attend(self, rows: Rows) -> tuple[Tensor, dict[str, Metric]]:
        """Halve rows until they are short."""
        return self.published(rows.query, rows.key, rows.value)[0], {}


def approximations(length: int, size: int, heads: int, dim: int, seed: int) -> dict[str, tuple[int, Function]]:
    """By method: the pairs of a head, and the function of queries, keys and values."""
    hyper = Hyper(
        ModelShape(d_model=heads * dim, num_layers=1, num_heads=heads),
        0,
        window=2 * size,
        buckets=length // (4 * size),
        sample=4 * size / length,
        hash_seed=seed,
        sample_seed=seed,
    )
    hyper = hyper.eval().double()
    exact, window = EXACT * size, 6 * size

    def published(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return recursive_attention(query, key, value, block=size, samples=size, exact=exact, seed=seed)[0]

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        chosen = hyper.select(query.flatten(2), query, key, torch.arange(length)[None])
        rows = Rows(query, key, value, query_labels=chosen.query_labels, key_labels=chosen.key_labels)
        return hyper.attend(rows)[0]

    def windowed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, window=window)

    pairs = (
        recursive_pairs(length, size, size, exact),
        hyper.visible_pairs(length),
        window * length - window * (window - 1) // 2,
    )
    return dict(zip(METHODS, zip(pairs, (published, ours, windowed), strict=True), strict=True))


@torch.no_grad()
def measure(options: argparse.Namespace) -> Iterator[Record]:
    """A record for each kind of tokens, size and method."""
    for kind, size in itertools.product(KEPT, options.sizes):
        errors: dict[str, list[float]] = {method: [] for method in METHODS}
        pairs: dict[str, int] = {}
        for seed in range(options.seeds):
            query, key, value = drawn_tokens(kind, options, seed)
            factor = options.radius**0.5 * options.dim**0.25
            query, key = query * factor, key * factor
            exact = attention(query, key, value)
            for method, (count, function) in approximations(
                options.length, size, options.heads, options.dim, seed
            ).items():
                missed = function(query, key, value) - exact
                errors[method].append((missed.square().mean() / exact.square().mean()).sqrt().item())
                pairs[method] = count
        for method in METHODS:
            found = {"pairs": pairs[method] / options.length, "error": sum(errors[method]) / options.seeds}
            yield {"tokens": kind, "length": options.length, "size": size, "method": method, **found}


def table(records: Sequence[Record]) -> str:
    """Markdown: for each kind of tokens and method, pairs of a query and the error."""
    lines = [["tokens", "method", "pairs of a query: error"], ["---", "---", "---"]]
    for kind, method in itertools.product(KEPT, METHODS):
        own = [r for r in records if (r["tokens"], r["method"]) == (kind, method)]
        lines.append([kind, method, ", ".join(f"{r['pairs']:.0f}: {r['error']:.3f}" for r in own)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """The error over the pairs of a query, a panel for each kind of tokens."""
    figure, panels = new_figure(len(KEPT))
    for axes, kind in zip(panels, KEPT, strict=True):
        curves = {}
        for method in METHODS:
            own = [record for record in records if (record["tokens"], record["method"]) == (kind, method)]
            curves[method] = [record["pairs"] for record in own], [record["error"] for record in own]
        draw_curves(axes, curves, title=kind, x_label="pairs of a query", y_label="relative error", log_x=True)
        axes.set_ylim(bottom=0)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.hyper_recursion", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--length", type=positive(int), default=2048, help="tokens of a row")
    parser.add_argument("--radius", type=positive(float), default=8.0, help="largest score")
    parser.add_argument("--sizes", type=positive(int), nargs="+", default=list(SIZES), help="tokens of a sorted block")
    parser.add_argument("--heads", type=positive(int), default=2)
    parser.add_argument("--dim", type=positive(int), default=32, help="channels of a head")
    parser.add_argument("--seeds", type=positive(int), default=3, help="draws of everything")
    parser.add_argument("--name", default="hyper_recursion", help="of the files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    if 8 * max(options.sizes) > options.length:
        parser.error(f"--sizes {max(options.sizes)}: must be at most an eighth of --length {options.length}")
    parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    options = parse(arguments)
    return results.carry_out(options.name, options, lambda: measure(options), table, drawn, "fp64")


if __name__ == "__main__":
    sys.exit(main())
