"""What was compared: data, sizes, recipe, machine and days, and every setting that is not the same in all runs."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from longmix.files import sha256_of_json
from longmix.reporting.markup import Markup, joined, tag
from longmix.reporting.runs import Run
from longmix.reporting.settings import block_of, corpus_of, differing, recipe_of, tokenizer_of
from longmix.wording import counted

MOST_VALUES = 6
"""Different values of a setting that are written out."""

DIGEST_LETTERS = 12

MOST_SETTINGS = 30
"""Settings that differ and are written out; the others are counted."""


class Row(NamedTuple):
    """A line of what was compared.

    Attributes:
        name: of the setting.
        values: the different ones, in the order of the runs.
    """

    name: str
    values: list[str]


def rows_of(runs: list[Run]) -> list[Row]:
    """Everything that a reader needs to know what the figures are of; what no run says is left out."""
    of: dict[str, Callable[[Run], Any]] = {
        "data": lambda run: corpus_of(run.settings),
        "data's content": content_of,
        "tokenizer": lambda run: tokenizer_of(run.settings),
        "mixers": lambda run: run.summary["mixer"],
        "model": _sizes,
        "block": lambda run: block_of(run.settings),
        "parameters": lambda run: f"{run.summary['parameters']['total']:,}",
        "context, tokens": lambda run: f"{run.summary['seq_len']:,}",
        "batch": _batch,
        "trained on": lambda run: f"{run.summary['tokens']:,} tokens",
        "optimizer": lambda run: recipe_of(run.settings, "optimizer"),
        "learning rate": lambda run: run.settings.get("optimizer.learning_rate"),
        "schedule": lambda run: recipe_of(run.settings, "schedule"),
        "seeds": lambda run: run.settings.get("seed"),
        "machine": lambda run: run.summary.get("device"),
        "versions": _versions,
        "finished": _day,
    }
    rows = [
        Row(name, list(dict.fromkeys(str(value) for run in runs if (value := get(run)) is not None)))
        for name, get in of.items()
    ]
    return [row for row in rows if row.values]


def content_of(run: Run) -> str | None:
    """A digest of the training data's tokens, whatever was cut of them; None of a run that does not say."""
    fingerprint = run.summary.get("data_fingerprint")
    if not isinstance(fingerprint, dict):
        return None
    kept = {key: value for key, value in fingerprint.items() if key not in ("seq_len", "batch_size", "seed")}
    return sha256_of_json(kept)[:DIGEST_LETTERS]


def section(runs: list[Run]) -> Markup:
    """The page's table of what was compared, and of the settings that differ."""
    lines = [tag("div", tag("dt", row.name), tag("dd", _values(row))) for row in rows_of(runs)]
    parts = [tag("h2", "What was compared"), tag("dl", joined(lines), class_="facts-list")]
    changed = differing([run.settings for run in runs])
    if changed:
        parts.append(_differences(runs, changed))
    return joined(parts)


def _differences(runs: list[Run], changed: dict[str, list[Any]]) -> Markup:
    shown = list(changed.items())[:MOST_SETTINGS]
    head = tag("tr", tag("th", "setting"), *(tag("th", run.label) for run in runs))
    body = [
        tag("tr", tag("th", key), *(tag("td", "-" if value is None else str(value)) for value in values))
        for key, values in shown
    ]
    more = f" {len(changed) - len(shown)} more are not shown." if len(changed) > len(shown) else ""
    words = f"Settings that are not the same in all runs, besides those of the mixers.{more}"
    table = tag("table", joined([head, *body]), class_="compared")
    return tag("details", tag("summary", words), tag("div", table, class_="scroll"))


def _values(row: Row) -> str:
    shown = row.values[:MOST_VALUES]
    more = f" and {len(row.values) - len(shown)} more" if len(row.values) > len(shown) else ""
    return "; ".join(shown) + more


def _sizes(run: Run) -> str | None:
    names = {"model.num_layers": "layers", "model.d_model": "d_model", "model.num_heads": "heads"}
    known = {word: run.settings[key] for key, word in names.items() if key in run.settings}
    if not known:
        return None
    words = [counted(known["layers"], "layer")] * ("layers" in known)
    words += [f"{word} {known[word]}" for word in ("d_model", "heads") if word in known]
    if "model.mlp_hidden" in run.settings and run.settings.get("match.parameters") is None:  # chosen, and not fitted
        words.append(f"mlp_hidden {run.settings['model.mlp_hidden']}")
    return ", ".join(words)


def _batch(run: Run) -> str:
    per_step = f"{run.summary['tokens_per_step']:,} tokens a step"
    rows = run.settings.get("batch_size")
    return per_step if rows is None else f"{counted(rows, 'window')}, {per_step}"


def _versions(run: Run) -> str | None:
    versions = run.summary.get("versions", {})
    names = [name for name in ("longmix", "torch", "python") if name in versions]
    return ", ".join(f"{name} {versions[name]}" for name in names) or None


def _day(run: Run) -> str | None:
    try:
        finished = (run.folder / "summary.json").stat().st_mtime
    except OSError:
        return None
    return f"{datetime.fromtimestamp(finished, UTC):%Y-%m-%d}"
