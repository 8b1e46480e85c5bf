"""Errors, not times: softmax attention, local linear attention and one line, on a piecewise linear function.

    python -m benchmarks.lla                          # seconds on a CPU
    python -m benchmarks.lla --dims 4 8 16 --keys 64 256 --seeds 10

Keys and queries are random directions of length 2, the value of a key is a sum of absolute values of linear functions
of it, and a query is to tell its own value from those of the keys (the claim of arXiv 2510.01450). Each method has the
factor on scores and the ridge that fit it best. Errors are mean squares over the variance of the values, and means over
seeds. Leaves JSON, a Markdown table and a picture.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import results
from benchmarks.command import RESULTS, Parser, positive
from benchmarks.results import Record
from longmix.reporting.plots import draw_curves, drawing, new_figure
from longmix_kernels.attention.reference_lla import local_linear_attention

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
RIDGES = (0.01, 0.1, 1.0, 10.0)
NO_SLOPE, NO_WEIGHTS = 1e12, 1e-9
METHODS: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {
    "softmax attention": (SCALES, (NO_SLOPE,)),
    "local linear attention": (SCALES, RIDGES),
    "one line": ((NO_WEIGHTS,), RIDGES),
}
"""The factors on scores and the ridges of each method; all are local linear attention at one end of them."""

QUERIES = 64
CORNERS = 2
"""The linear functions in a value, for each dimension."""


def task(dim: int, keys: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys [keys, dim] and their values [keys], queries [QUERIES, dim] and theirs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(keys + QUERIES, dim, generator=generator, dtype=torch.float64)
    points = 2 * points / points.norm(dim=-1, keepdim=True)
    corners = torch.randn(CORNERS * dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    values = (points @ corners.T).abs().sum(-1)
    return points[:keys], values[:keys], points[keys:], values[keys:]


def error(found: Tensor, wanted: Tensor) -> float:
    """The mean square of what is missed, over the variance of what is wanted."""
    return ((found - wanted).square().mean() / wanted.var(correction=0)).item()


def answers(keys: Tensor, values: Tensor, queries: Tensor, scale: float, ridge: float) -> Tensor:
    """What each query, which comes after all keys, is answered: [QUERIES]."""
    rows = [x.expand(len(queries), -1, -1).unsqueeze(2) for x in (keys, values.unsqueeze(-1))]
    return local_linear_attention(queries[:, None, None], *rows, ridge=ridge, scale=scale)[0].flatten()


def measure(options: argparse.Namespace) -> Iterator[Record]:
    """A record for each size and method: its least error, and where that was."""
    for dim, keys in itertools.product(options.dims, options.keys):
        tasks = [task(dim, keys, seed) for seed in range(options.seeds)]
        for method, settings in METHODS.items():
            errors = {
                (scale, ridge): sum(error(answers(k, v, q, scale, ridge), w) for k, v, q, w in tasks) / len(tasks)
                for scale, ridge in itertools.product(*settings)
            }
            best = min(errors, key=errors.__getitem__)
            found = {"error": errors[best], "scale": best[0], "ridge": best[1]}
            yield {"dim": dim, "keys": keys, "method": method, "seeds": options.seeds, **found}


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each size, the least error of each method."""
    lines = [["channels", "keys", *METHODS], ["---:"] * (2 + len(METHODS))]
    for dim, keys in dict.fromkeys((record["dim"], record["keys"]) for record in records):
        own = {r["method"]: r["error"] for r in records if (r["dim"], r["keys"]) == (dim, keys)}
        lines.append([str(dim), str(keys), *(f"{own[method]:.3f}" for method in METHODS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@drawing()
def drawn(records: Sequence[Record]) -> Figure:
    """The least error over the number of keys, a panel for each number of channels."""
    dims = list(dict.fromkeys(record["dim"] for record in records))
    figure, panels = new_figure(len(dims))
    for axes, dim in zip(panels, dims, strict=True):
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for record in (record for record in records if record["dim"] == dim):
            x, y = curves.setdefault(record["method"], ([], []))
            x.append(record["keys"])
            y.append(record["error"])
        label = "squared error / variance"
        draw_curves(axes, curves, title=f"{dim} channels", x_label="keys", y_label=label, log_x=True)
        axes.set_ylim(bottom=0)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="python -m benchmarks.lla", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dims", type=positive(int), nargs="+", default=[4, 8], help="channels of keys")
    parser.add_argument("--keys", type=positive(int), nargs="+", default=[32, 64, 128, 256], help="keys of a row")
    parser.add_argument("--seeds", type=positive(int), default=10, help="functions, keys and queries of each size")
    parser.add_argument("--name", default="lla", help="of the files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    options = parse(arguments)
    return results.carry_out(options.name, options, lambda: measure(options), table, drawn, "fp64")


if __name__ == "__main__":
    sys.exit(main())
