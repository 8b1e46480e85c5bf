"""What caches hold and read, counted by context: a part of `task=decode_cost`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from longmix.caches.cache import CacheKind
from longmix.caches.exact import Exact
from longmix.caches.named import names_the_cache
from longmix.generation.session import Session
from longmix.model.backbone import LanguageModel

EXACT = Exact.name
"""The cache that the others stand beside."""


def cache_bytes(model: LanguageModel, kinds: Mapping[str, CacheKind], contexts: Sequence[int]) -> list[dict[str, Any]]:
    """The bytes that a row holds after a prompt and reads for the next token, as layers and caches count them.

    Args:
        model: on any device, the meta device included.
        kinds: by name.
        contexts: tokens of prompts.

    Returns:
        `{"cache", "context", "held_bytes", "read_bytes"}` of each.

    Raises:
        ConfigError: no layer takes a kind.
    """
    rows = []
    for name, kind in kinds.items():
        with names_the_cache(name, "task.caches"):
            session = Session(model, 1, kind)
        for context in contexts:
            counted = {"held_bytes": session.counted_bytes(context), "read_bytes": session.counted_read_bytes(context)}
            rows.append({"cache": name, "context": context, **counted})
    return rows


def cache_table(report: Mapping[str, Any]) -> Table:
    """The bytes held and read by context, of each cache and of `mixer=flash`."""
    rows = report["caches"]
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    table = Table(title=f"caches of one sequence in {report['dtype']}: MB held / read for a token, by context")
    table.add_column("cache", overflow="fold")
    for context in contexts:
        table.add_column(f"{context:,}", justify="right")
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = [(row["held_bytes"], row["read_bytes"]) for row in rows if row["cache"] == cache]
        table.add_row(f"cache={cache}".replace(":", " "), *_megabytes(own))
    flash = [(row["held_bytes"], row["state_bytes"] // report["batch"]) for row in report["flash"]]
    table.add_row("mixer=flash", *_megabytes(flash))
    return table


def _megabytes(pairs: Iterable[tuple[int, int]]) -> list[str]:
    return [f"{held / 1e6:,.2f} / {read / 1e6:,.2f}" for held, read in pairs]
