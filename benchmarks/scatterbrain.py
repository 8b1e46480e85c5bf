"""How far Scatterbrain is from softmax attention, over its temperature: `python -m benchmarks.scatterbrain`.

Queries and keys are of length sqrt(R), so that scores are at most R: the larger R, the sharper the softmax, and the
noisier the features (their relative error is about sqrt(exp(2 R) / m)). Compared are the blocks alone, positive random
features for every key (Performer), and both (Scatterbrain), each normalised over what it sees. Two kinds of tokens:
independent ones, and neighbours that are alike, of which each keeps a share of the one before. Errors are of the
outputs, root mean square, relative to those of softmax attention, in float64; the median over draws of everything.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import results
from benchmarks.command import RESULTS, Parser, positive
from longmix.files import replace_text
from longmix.mixers.parts.features import FeatureMap, predicted_error
from longmix.reporting.plots import WIDTH, draw_curves, drawing, new_figure, save_figure
from longmix_kernels.attention import attention
from longmix_kernels.scatter import scatter_attention

RADII = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
KEPT = {"independent": 0.0, "neighbours alike": 0.95}
"""By kind of tokens: the share that a token keeps of the one before."""

COLUMNS = {
    "tokens": "tokens",
    "radius": "R",
    "method": "method",
    "features": "m",
    "error": "error",
    "low": "25 %",
    "high": "75 %",
    "predicted": "entry predicted",
}
FOOTNOTE = """\
error: of the outputs, relative RMS, median over draws. entry predicted: relative error of one weight between orthogonal
query and key, for independent projections."""


def drawn(kind: str, options: argparse.Namespace, seed: int) -> tuple[torch.Tensor, ...]:
    """Unit queries and keys, and normal values, [1, T, heads, dim]."""
    generator = torch.Generator().manual_seed(seed)
    size = 3, options.length, options.heads, options.dim
    fresh = torch.randn(size, generator=generator, dtype=torch.float64)
    # Queries follow keys: without that no attention would look at its neighbours.
    fresh[0] = fresh[0] + fresh[1] if KEPT[kind] else fresh[0]
    tokens, fresh_share = fresh.clone(), (1 - KEPT[kind] ** 2) ** 0.5
    for t in range(1, options.length):
        tokens[:, t] = KEPT[kind] * tokens[:, t - 1] + fresh_share * fresh[:, t]
    query, key, value = tokens.unsqueeze(1)
    return F.normalize(query, dim=-1), F.normalize(key, dim=-1), value


def errors(kind: str, radius: float, options: argparse.Namespace, seed: int) -> Iterator[tuple[str, int, float]]:
    """Method, number of features and error of each approximation, for one draw."""
    query, key, value = drawn(kind, options, seed)
    exact = attention(query, key, value, scale=radius)

    def error(output: torch.Tensor) -> float:
        return ((output - exact).norm() / exact.norm()).item()

    block, past = options.block, options.past_blocks
    scattered = functools.partial(scatter_attention, block_size=block, past_blocks=past, scale=radius)
    yield "local", 0, error(scattered(query, key, value).output)
    for count in options.features:
        favor = FeatureMap("favor", options.heads, options.dim, count, seed).double()
        logs = favor(radius**0.5 * query), favor(radius**0.5 * key)
        yield "performer", count, error(performer(*logs, value))
        yield "scatterbrain", count, error(scattered(query, key, value, *logs).output)


def performer(log_query: torch.Tensor, log_key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention with weights phi(q) . phi(k) for every key."""
    weights = torch.einsum("biha,bjha->bhij", log_query.exp(), log_key.exp()).tril()
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), value)


def measure(options: argparse.Namespace) -> list[results.Record]:
    """One record for each kind of tokens, radius and method."""
    records = []
    for kind in KEPT:
        for radius in options.radii:
            found: dict[tuple[str, int], list[float]] = {}
            for seed in range(options.draws):
                for method, count, error in errors(kind, radius, options, seed):
                    found.setdefault((method, count), []).append(error)
            for (method, count), values in found.items():
                low, middle, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
                predicted = predicted_error(radius, count) if count else None
                names = {"tokens": kind, "radius": radius, "method": method, "features": count}
                records.append(names | {"error": middle, "low": low, "high": high, "predicted": predicted})
    return records


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.scatterbrain", description="Errors of Scatterbrain over temperature.")
    add = parser.add_argument
    add("--radii", type=positive(float, 64), nargs="+", default=RADII, metavar="R")
    add("--features", type=positive(int), nargs="+", default=(64, 256), metavar="M", help="even numbers")
    add("--length", type=positive(int, 1 << 14), default=1024, metavar="T")
    add("--block", type=positive(int), default=64, help="tokens of a block; one past block is seen too")
    add("--dim", type=positive(int, 256), default=64)
    add("--heads", type=positive(int), default=4)
    add("--draws", type=positive(int), default=5)
    add("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    if any(count % 2 for count in options.features):
        parser.error(f"--features {options.features} has odd numbers; allowed are even ones")
    options.past_blocks = 1
    options.radii, options.features = sorted(set(options.radii)), sorted(set(options.features))
    parser.make_folder(options.out)
    return options


def draw(path: Path, records: Sequence[results.Record], title: str) -> None:
    """Draw error over R, a panel for each kind of tokens."""
    with drawing():
        figure, panels = new_figure(len(KEPT), width=WIDTH + 80, title=title)
        for panel, kind in zip(panels, KEPT, strict=True):
            curves: dict[str, tuple[list[float], list[float]]] = {}
            for record in records:
                if record["tokens"] == kind:
                    name = record["method"] + (f", m = {record['features']}" if record["features"] else "")
                    x, y = curves.setdefault(name, ([], []))
                    x.append(record["radius"])
                    y.append(record["error"])
            words: dict[str, Any] = {"x_label": "R, largest score", "y_label": "relative error of the output"}
            draw_curves(panel, curves, title=kind, log_x=True, log_y=True, **words)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, write and print."""
    options = parse(arguments)
    environment = results.environment(torch.device("cpu"), "fp64")
    records = measure(options)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    path = options.out / f"{results.file_stem('scatterbrain', environment)}.json"
    content = {"benchmark": "scatterbrain", "environment": environment, "settings": settings, "results": records}
    results.write_json(path, content)
    sizes = f"T = {options.length}, head dimension {options.dim}, blocks of {options.block}, one past block"
    sections = [f"Scatterbrain against softmax attention, {sizes}", results.text_table(records, COLUMNS), FOOTNOTE]
    text = "\n\n".join(sections) + "\n"
    replace_text(path.with_suffix(".txt"), text)
    draw(path.with_suffix(".png"), records, sizes)
    print(f"{text}\nwritten: {path}, .txt, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
