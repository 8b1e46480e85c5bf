"""What the source papers claim of operators, timed on this machine: `python -m benchmarks.headlines`.

    recurrences  the mLSTM (TFLA) against attention, linear attention and a scalar decay as in SSD, over the length
    window       a window of neighbours against all keys, over its size
    bias         a bias of rank R in R columns of query and key (FlashBias) against a dense bias, over the length
    samples      a step of samples that share their prompt (bifurcated attention) against a copy for each, over samples

Calls of a point take turns, so that other work on the machine slows all of them. The first three are forward and
backward passes, the last a step without gradients. The same command runs on a CPU and on a CUDA device. The least time
of all repetitions counts, which other work disturbs least; `times` is how many times as fast as the first arm.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks import arms, results, timing
from benchmarks.command import DTYPES, Parser, positive, progress
from benchmarks.results import Record
from longmix.reporting.plots import draw_curves, drawing, new_figure
from longmix_kernels.attention import Segment, attention, bias_columns, decode_attention
from longmix_kernels.linear import linear_attention

Calls = Mapping[str, Callable[[], object]]

PARTS = {
    "recurrences": ("flash", "tokens"),
    "window": ("all keys", "keys of a window"),
    "bias": ("dense bias", "tokens"),
    "samples": ("a copy for each", "samples"),
}
"""By name: the arm that others are compared with, and what the points are."""

FORGET_BIAS = 3.0
"""Mean of the forget gates before the sigmoid: a token is remembered for some twenty more."""


class Inputs:
    """Random tensors of one shape [batch, length, heads, dim].

    Args:
        batch, length, heads, dim: the shape.
        device, dtype: of the tensors.
    """

    def __init__(self, batch: int, length: int, heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, self.device, self.dtype = (batch, length, heads), device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        self.query, self.key, self.value, self.grad = (self.drawn(dim) for _ in range(4))
        exact = torch.promote_types(dtype, torch.float32)
        self.gate, self.forget = self.drawn(dtype=exact), FORGET_BIAS + self.drawn(dtype=exact)

    def drawn(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers [batch, length, heads, *sizes], with a gradient."""
        options = {"generator": self.generator, "device": self.device, "dtype": dtype or self.dtype}
        return torch.randn(*self.sizes, *sizes, **options).requires_grad_()  # type: ignore[call-overload]

    def both(self, function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], list[Tensor]]:
        """A call of the forward and the backward pass, which gives the output and the gradients of `inputs`."""

        def call() -> list[Tensor]:
            output = function(*inputs)
            return [output.detach(), *torch.autograd.grad(output, inputs, self.grad.detach())]

        return call


def recurrences(of: Inputs) -> Calls:
    """Attention and the recurrences of the `linear` engine."""
    heads = of.sizes[2]
    keys = of.query, of.key, of.value
    nothing = torch.zeros(heads, device=of.device, dtype=of.gate.dtype)

    def mlstm(normalize: bool) -> Callable[..., Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, forget: Tensor) -> Tensor:
            log_input = gate if normalize else F.logsigmoid(gate)
            log_decay = F.logsigmoid(forget)
            return linear_attention(query, key, value, log_decay=log_decay, log_input=log_input, normalize=normalize)[0]

        return attend

    def decayed(query: Tensor, key: Tensor, value: Tensor, forget: Tensor) -> Tensor:
        return linear_attention(query, key, value, log_decay=F.logsigmoid(forget))[0]

    return {
        "flash": of.both(attention, *keys),
        "mLSTM, exp": of.both(mlstm(True), *keys, of.gate, of.forget),
        "mLSTM, sig": of.both(mlstm(False), *keys, of.gate, of.forget),
        "linear attention": of.both(lambda q, k, v: linear_attention(q, k, v, log_decay=nothing)[0], *keys),
        "scalar decay (SSD)": of.both(decayed, *keys, of.forget),
    }


def window(of: Inputs, size: int) -> Calls:
    """Attention to all keys before, and to the nearest."""
    keys = of.query, of.key, of.value
    return {
        "all keys": of.both(attention, *keys),
        "window": of.both(lambda q, k, v: attention(q, k, v, window=size), *keys),
    }


def bias(of: Inputs, rank: int) -> Calls:
    """Attention with the bias a_i . b_j of each head, as a dense tensor in torch's attention, and in columns."""
    factors = of.drawn(rank), of.drawn(rank)
    keys = of.query, of.key, of.value, *factors
    length = of.sizes[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=of.device).tril()

    def dense(query: Tensor, key: Tensor, value: Tensor, left: Tensor, right: Tensor) -> Tensor:
        added = torch.einsum("bihr,bjhr->bhij", left, right).masked_fill(~causal, -torch.inf)
        moved = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return F.scaled_dot_product_attention(*moved, attn_mask=added).transpose(1, 2)

    def columns(query: Tensor, key: Tensor, value: Tensor, left: Tensor, right: Tensor) -> Tensor:
        wide_query, wide_key, scale = bias_columns(query, key, left, right)
        return attention(wide_query, wide_key, value, scale=scale)

    return {"dense bias": of.both(dense, *keys), "columns": of.both(columns, *keys)}


@torch.no_grad()
def samples(of: Inputs, count: int) -> Calls:
    """A step of `count` rows after one prompt of the length of `of`, whose batch is 1."""
    _, _, heads = of.sizes
    key, value = (x.detach().transpose(1, 2).contiguous() for x in (of.key, of.value))
    query, *new = (x[:, :1].detach().expand(count, -1, -1, -1).contiguous() for x in (of.query, of.key, of.value))
    key_copies, value_copies = (x.expand(count, heads, -1, -1).contiguous() for x in (key, value))
    copies = Segment(key_copies, value_copies)
    shared = Segment(key, value)
    fresh = new[0], new[1]
    return {
        "a copy for each": lambda: decode_attention(query, [copies], new=fresh)[0],
        "shared": lambda: decode_attention(query, [shared], new=fresh)[0],
    }


def points(options: argparse.Namespace) -> Iterable[tuple[str, int, Callable[[], Calls]]]:
    """Part, point and what makes its calls, in the order of measuring."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]

    def inputs(length: int) -> Inputs:
        return Inputs(1, length, options.heads, options.dim, device, dtype)

    for part in options.parts:
        if part == "recurrences":
            yield from ((part, length, lambda n=length: recurrences(inputs(n))) for length in options.lengths)
        elif part == "window":
            sizes = [size for size in options.windows if size < options.length]
            yield from ((part, size, lambda n=size: window(inputs(options.length), n)) for size in sizes)
        elif part == "bias":
            yield from ((part, n, lambda n=n: bias(inputs(n), options.rank)) for n in options.lengths)
        else:
            yield from ((part, n, lambda n=n: samples(inputs(options.length), n)) for n in options.samples)


def measure(options: argparse.Namespace) -> list[Record]:
    """A record for each arm at each point."""
    clock = timing.clock_for(torch.device(options.device))
    every, records = list(points(options)), []
    with progress(len(every)) as (announce, finish):
        for part, point, make in every:
            announce(f"{part}, {point}")
            found = timing.measure(make(), clock, seconds=options.seconds, limit=options.limit, announce=announce)
            base = least(found[PARTS[part][0]])
            for arm, outcome in found.items():
                record: Record = {"part": part, "point": point, "arm": arm, "note": outcome.note}
                own = least(outcome)
                record["least_ms"] = None if own is None else 1e3 * own
                record["median_ms"] = None if outcome.median is None else 1e3 * outcome.median
                record["times"] = None if own is None or base is None else base / own
                record["peak_mib"] = None if outcome.peak_bytes is None else outcome.peak_bytes / 2**20
                records.append(record)
            finish(f"{part}, {point}")
    return records


def least(outcome: timing.Outcome) -> float | None:
    """The least seconds of a call's repetitions, or of its only one."""
    return min(outcome.seconds, default=outcome.call_seconds)


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each arm at each point."""
    lines = [["part", "arm", "at", "ms", "times as fast", "peak MiB"]]
    for record in records:
        first = record["arm"] == PARTS[record["part"]][0]
        lines.append(
            [
                *(record["part"], record["arm"], f"{record['point']:,} {PARTS[record['part']][1]}"),
                arms.cell(record["least_ms"], ",.2f"),
                "" if first else arms.cell(record["times"], ".2f"),
                arms.cell(record["peak_mib"], ",.1f"),
            ]
        )
    return arms.markdown(lines, 3)


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """A panel for each part: how many times as fast as its first arm."""
    parts = list(dict.fromkeys(record["part"] for record in records))
    figure, panels = new_figure(len(parts), title="Times as fast as the first of each part")
    for axes, part in zip(panels, parts, strict=True):
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for record in (record for record in records if record["part"] == part and record["times"] is not None):
            xs, ys = curves.setdefault(record["arm"], ([], []))
            xs.append(record["point"])
            ys.append(record["times"])
        words = {"title": part, "x_label": PARTS[part][1], "y_label": f"over {PARTS[part][0]}"}
        draw_curves(axes, curves, log_x=True, **words)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.headlines", description="What papers claim of operators, timed here.")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    add("--lengths", type=positive(int, 1 << 20), nargs="+", default=[1024, 2048, 4096, 8192], metavar="T")
    add("--length", type=positive(int, 1 << 20), default=4096, help="tokens of a row, or of the prompt")
    add("--windows", type=positive(int), nargs="+", default=[64, 256, 1024], metavar="W")
    add("--samples", type=positive(int), nargs="+", default=[1, 4, 16, 32], metavar="N")
    add("--rank", type=positive(int, 128), default=8, help="of the bias")
    add("--heads", type=positive(int), default=4)
    add("--dim", type=positive(int, 256), default=64, help="channels of a head")
    parser.add_shared()
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.parts = options.parts or list(PARTS)
    parser.check_shared(options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    options = parse(arguments)
    environment = results.environment(torch.device(options.device), options.dtype)
    results.leave("headlines", environment, options, measure(options), table, drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
