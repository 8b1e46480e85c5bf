"""What the benchmarks of recurrences with a matrix state share: shapes and options, units, and what is written."""

import argparse
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import results, timing
from benchmarks.command import DTYPES, Parser, positive
from benchmarks.comparison import PASSES, Comparison, Provider, carry_out
from longmix.files import replace_text

CPU_BATCH = 2
SEED = 0

COLUMNS = {
    "pass": "pass",
    "length": "T",
    "provider": "provider",
    "median_ms": "ms",
    "least_ms": "min",
    "low_ms": "25 %",
    "high_ms": "75 %",
    "repetitions": "n",
    "us_per_token": "us/token",
    "tflops": "TFLOP/s",
    "moved_gb": "moved GB",
    "of_roofline": "of roofline",
    "peak_gb": "peak GB",
}
"""Titles of the columns that both have."""

Sizes = Mapping[str, Mapping[str, int]]
"""Heads, key_dim and value_dim by device."""


@dataclass(frozen=True)
class StateShape:
    """What is computed: [batch, length, heads, dim] of keys and values, of a dtype on a device."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def dim(self) -> int:
        """Columns of a head of the output."""
        return self.value_dim

    def drawn(self) -> Callable[..., torch.Tensor]:
        """Return `normal(*columns, dtype=...)`: numbers for each token and head, the same for all shapes like this."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        size = self.batch, self.length, self.heads

        def normal(*columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*size, *columns, generator=generator, dtype=dtype, device=self.device)

        return normal


Shape = TypeVar("Shape", bound=StateShape)


def add_sizes(parser: Parser, sizes: Sizes, most: int, cuda_tokens: int, families: Sequence[str]) -> None:
    """Add what every such benchmark can be asked for.

    Args:
        parser: to add it to.
        sizes: the usual ones.
        most: the largest head dimension.
        cuda_tokens: tokens of all sequences on CUDA.
        families: names of providers.
    """
    add, of_device = parser.add_argument, " and ".join(f"{{{name}}} on {name}" for name in sizes)

    def default(name: str) -> str:
        return "default: " + of_device.format(**{device: own[name] for device, own in sizes.items()})

    add("--lengths", type=positive(int, 1 << 20), nargs="+", metavar="T")
    add("--heads", type=positive(int), help=default("heads"))
    add("--key-dim", type=positive(int, most), metavar="D", help=default("key_dim"))
    add("--value-dim", type=positive(int, most), metavar="D", help=default("value_dim"))
    add("--batch", type=positive(int), help=f"default: {cuda_tokens} / T on cuda and {CPU_BATCH} on cpu")
    add("--passes", nargs="+", choices=PASSES, default=PASSES)
    add("--providers", nargs="+", choices=families, default=families, metavar="NAME", help=", ".join(families))


def read(parser: Parser, arguments: Sequence[str] | None, sizes: Sizes) -> argparse.Namespace:
    """Read the command line and fill in the usual sizes; exits with 2 and one line if something is not allowed."""
    parser.add_shared()
    options = parser.parse_args(arguments)
    parser.check_shared(options)
    for name, size in sizes[options.device].items():
        setattr(options, name, getattr(options, name) or size)
    return options


def shapes(options: argparse.Namespace, make: Callable[..., Shape], cuda_tokens: int) -> Iterator[Shape]:
    """The shapes to compare, short ones first: they predict how long the others take."""
    for length in options.lengths:
        batch = options.batch or (max(1, cuda_tokens // length) if options.device == "cuda" else CPU_BATCH)
        sizes = options.heads, options.key_dim, options.value_dim
        yield make(batch, length, *sizes, DTYPES[options.dtype], torch.device(options.device))


def package_missing(module: str) -> str:
    """Why a module cannot be imported; empty if it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"is not installed ({error})"
    return ""


def completed(
    records: Sequence[results.Record], families: Mapping[str, str], key_dim: int, best_of: Sequence[str]
) -> list[results.Record]:
    """Return the records with what follows from times, and one more for the fastest of each family in `best_of`.

    Args:
        records: as measured.
        families: by the name of a provider.
        key_dim: of the run.
        best_of: families whose chunk sizes are summed up by the fastest.
    """
    found = [dict(record, family=families[record["provider"]], key_dim=key_dim) for record in records]
    for family in best_of:
        for direction, length in dict.fromkeys((r["pass"], r["length"]) for r in found):
            here = [r for r in found if (r["pass"], r["length"], r["family"]) == (direction, length, family)]
            measured = [r for r in here if r["median_ms"] is not None]
            if best := min(measured, key=lambda r: r["median_ms"], default=None):
                found.append(best | {"provider": family, "note": f"the time of {best['provider']}"})
    for record in found:
        took, peak = record["median_ms"], record["peak_mib"]
        record["us_per_token"] = None if took is None else took * 1e3 / record["tokens"]
        record["peak_gb"] = None if peak is None else peak * 2**20 / 1e9
    return found


def in_order(
    records: Sequence[results.Record], families: Mapping[str, str], order: Sequence[str]
) -> list[results.Record]:
    """Sort by pass, length, family as in `order`, and provider."""
    numbers = {name: number for number, name in enumerate(families)}

    def key(record: results.Record) -> tuple[int, ...]:
        ranks = PASSES.index(record["pass"]), record["length"], order.index(record["family"])
        return *ranks, numbers.get(record["provider"], -1)

    return sorted(records, key=key)


@dataclass(frozen=True)
class Publication:
    """How a run is written.

    Attributes:
        name: of the benchmark, in files.
        title: of the table.
        columns: keys of records and their titles in the table.
        notes: what stands below it.
        complete: records as measured, families by provider and key_dim -> the records that are written.
        draw: writes a picture, of path, records, title and settings.
        bars: what has to be reached on a device.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    notes: Sequence[str]
    complete: Callable[[Sequence[results.Record], Mapping[str, str], int], list[results.Record]]
    draw: Callable[[Path, Sequence[results.Record], str, Mapping[str, Any]], None]
    bars: Callable[[str], Sequence[results.Bar | results.FlatBar]]

    def carry_out(
        self,
        every: Mapping[str, Sequence[Provider]],
        order: Sequence[str],
        shapes: Iterator[StateShape],
        options: argparse.Namespace,
        packages: Sequence[str],
    ) -> int:
        """Measure, write and print; 1 if nothing could be measured.

        Args:
            every: providers by family.
            order: families.
            shapes: to compare.
            options: of the command line.
            packages: whose versions are recorded.
        """
        device = torch.device(options.device)
        asked = {family: every[family] for family in order if family in options.providers}
        missing = {family: why for family, own in asked.items() if (why := own[0].missing(device))}
        environment = results.environment(device, options.dtype)
        environment["peers"] = {name: results.version(name) for name in packages}
        here = [provider for family, own in asked.items() if family not in missing for provider in own]
        rates = results.peak_flops(environment), results.peak_bytes(environment)
        run = Comparison(here, timing.clock_for(device), options.seconds, options.limit, *rates)
        families = {provider.name: family for family, own in asked.items() for provider in own}
        save = functools.partial(self._save, run, environment, options, families, missing)
        steps = len(options.lengths) * len(options.passes)
        return carry_out(run, shapes, steps, options.passes, missing, save, self._report)

    def _save(
        self,
        run: Comparison,
        environment: results.Record,
        options: argparse.Namespace,
        families: Mapping[str, str],
        missing: Mapping[str, str],
    ) -> Path:
        """Write the JSON of a run, as far as it has come, and return its path."""
        records = self.complete(run.records, families, options.key_dim)
        content: dict[str, Any] = {
            "benchmark": self.name,
            "environment": environment,
            "settings": {name: value for name, value in vars(options).items() if name != "out"},
            "missing": missing,
            "results": records,
            "bars": [bar.verdict(records, environment) for bar in self.bars(options.device)],
        }
        path = options.out / f"{results.file_stem(self.name, environment)}.json"
        results.write_json(path, content)
        return path

    def _report(self, path: Path, content: results.Record) -> str:
        """Write table and picture beside the JSON of a run, and return the table."""
        settings, environment, records = content["settings"], content["environment"], content["results"]
        packages = ", ".join(f"{name} {version}" for name, version in environment["peers"].items() if version)
        sizes = f"{settings['heads']} heads of {settings['key_dim']}/{settings['value_dim']}"
        head = f"{sizes} on {results.headline(environment)}{f'; {packages}' if packages else ''}"
        filled = {key for record in records for key, x in record.items() if x not in (None, "")}
        sections = [
            f"{self.title}, {head}",
            results.text_table(records, {key: title for key, title in self.columns.items() if key in filled}),
            *self.notes,
            "\n".join(f"left out: {name} {why}" for name, why in content["missing"].items()),
            "\n".join(["bars", *results.verdict_lines(content["bars"])]),
        ]
        text = "\n\n".join(section for section in sections if section) + "\n"
        replace_text(path.with_suffix(".txt"), text)
        self.draw(path.with_suffix(".png"), records, head, settings)
        return text
