"""The table of what was compared, with all settings that differ between runs; and whether the comparison is fair."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from longmix.files import sha256_of_json
from longmix.reporting.markup import Markup, joined, tag
from longmix.reporting.panels import by_length
from longmix.reporting.runs import Run
from longmix.reporting.settings import block_of, corpus_of, differing, recipe_of, tokenizer_of
from longmix.reporting.stages import is_staged
from longmix.wording import counted

MOST_VALUES = 6
"""The most values of a setting that are written out."""

DIGEST_LETTERS = 12

MOST_SETTINGS = 30
"""The most differing settings that are written out; the others are counted."""


EQUAL_PARAMETERS = 0.04
"""The largest relative difference of two models that both meet `match.parameters` within the default tolerance."""


class Row(NamedTuple):
    """A line of what was compared.

    Attributes:
        name: of the setting.
        values: the different ones, in the order of the runs.
    """

    name: str
    values: list[str]


def rows_of(runs: list[Run]) -> list[Row]:
    """The rows that tell a reader what was measured; facts that no run states are left out."""
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
    """A digest of the training data's tokens, however they were cut into windows; None where a run has none."""
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
    words = [_number(known["layers"], "layer")] if "layers" in known else []
    words += [f"{word} {known[word]}" for word in ("d_model", "heads") if word in known]
    if "model.mlp_hidden" in run.settings and run.settings.get("match.parameters") is None:  # chosen, and not fitted
        words.append(f"mlp_hidden {run.settings['model.mlp_hidden']}")
    return ", ".join(words)


def _batch(run: Run) -> str:
    if is_staged(run.summary):
        return ", then ".join(f"{stage['tokens_per_step']:,}" for stage in run.summary["stages"]) + " tokens a step"
    per_step = f"{run.summary['tokens_per_step']:,} tokens a step"
    rows = run.settings.get("batch_size")
    return per_step if rows is None else f"{_number(rows, 'window')}, {per_step}"


def _number(value: Any, noun: str) -> str:
    """A number with its noun; any other value as it is."""
    return counted(value, noun) if isinstance(value, int) else f"{value} {noun}s"


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


@dataclass(frozen=True)
class Fact:
    """Something about a whole comparison.

    Attributes:
        words: the fact.
        good: True makes the comparison fairer, False less fair; None is neither.
    """

    words: str
    good: bool | None


def fairness(runs: list[Run]) -> list[Fact]:
    """Parameters, tokens, data, blocks, repetitions, leaks and machines of runs that are laid side by side."""
    return [
        *(_parameters(runs), _tokens(runs)),
        *(*_data(runs), *_blocks(runs), *_learning_rates(runs)),
        *(_repetitions(runs), *_leaks(runs), *_machine(runs)),
    ]


def _parameters(runs: list[Run]) -> Fact:
    smallest, largest = _range(runs, lambda run: run.summary["parameters"]["total"])
    difference = largest / smallest - 1
    if difference == 0:
        return Fact(f"{smallest:,} parameters each", True)
    words = f"{smallest:,} to {largest:,} parameters, {difference:.1%} apart"
    if difference <= EQUAL_PARAMETERS:
        return Fact(words, True)
    return Fact(f"{words}; match.parameters=N makes them equal", False)


def _tokens(runs: list[Run]) -> Fact:
    smallest, largest = _range(runs, lambda run: run.summary["tokens"])
    if smallest != largest:
        return Fact(f"{smallest:,} to {largest:,} tokens", False)
    if any(is_staged(run.summary) for run in runs):
        return Fact(f"{smallest:,} tokens each, and stages change how many are in a step", False)
    steps, more_steps = _range(runs, lambda run: run.summary["tokens_per_step"])
    if steps != more_steps:
        return Fact(f"{smallest:,} tokens each, but {steps:,} to {more_steps:,} in a step", False)
    return Fact(f"{smallest:,} tokens each, {steps:,} in a step", True)


def _data(runs: list[Run]) -> list[Fact]:
    """Facts about different data, or different tokens of them: losses of such runs do not compare."""
    corpora = sorted({corpus for run in runs if (corpus := corpus_of(run.settings)) is not None})
    if len(corpora) > 1:
        return [Fact(f"trained on different data: {_listed(corpora)}; their losses do not compare", False)]
    contents = {content for run in runs if (content := content_of(run)) is not None}
    if len(contents) > 1:
        return [Fact("the data had other content, or other tokens, in some runs; their losses do not compare", False)]
    tokenizers = sorted({words for run in runs if (words := tokenizer_of(run.settings)) is not None})
    if len(tokenizers) > 1:
        return [Fact(f"different tokenizers: {_listed(tokenizers)}; bits per byte compare, losses do not", False)]
    return [Fact(f"data: {corpus}", None) for corpus in corpora]


def _blocks(runs: list[Run]) -> list[Fact]:
    """Facts about mixers in another block than most: their lead or lag may come from the block."""
    mixers: dict[str, list[str]] = {}
    for run in runs:
        block = block_of(run.settings)
        if block is not None:
            mixers.setdefault(block, []).append(run.summary["mixer"])
    if len(mixers) < 2:
        return []
    usual = max(mixers, key=lambda block: len(mixers[block]))
    return [
        Fact(
            f"{_listed(sorted(set(names)))} ran in another block ({block}) than the others ({usual}): a difference may "
            "be the block's",
            False,
        )
        for block, names in mixers.items()
        if block != usual
    ]


def _learning_rates(runs: list[Run]) -> list[Fact]:
    rates = {run.settings["optimizer.learning_rate"] for run in runs if "optimizer.learning_rate" in run.settings}
    if len(rates) < 2 or not all(isinstance(rate, int | float) for rate in rates):
        return []
    return [Fact(f"learning rates from {min(rates):g} to {max(rates):g}", None)]


def _listed(words: list[str], most: int = 4) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return "; ".join(words[:most]) + more


def _repetitions(runs: list[Run]) -> Fact:
    mixers = [[run.summary["mixer"] for run in group] for group in by_length(runs).values()]
    fewest = min(group.count(mixer) for group in mixers for mixer in group)
    if fewest > 1:
        return Fact(f"at least {counted(fewest, 'run')} of each mixer and length", True)
    return Fact("one run of a mixer and length: small differences may be chance", None)


def _leaks(runs: list[Run]) -> list[Fact]:
    leaky = sorted({run.summary["mixer"] for run in runs if run.evaluations.causal is False})
    return [Fact(f"{mixer} sees later tokens: its loss is not that of a language model", False) for mixer in leaky]


def _machine(runs: list[Run]) -> list[Fact]:
    machines = sorted({run.summary["device"] for run in runs if "device" in run.summary})
    if len(machines) > 1:
        return [Fact(f"speed on different machines: {', '.join(machines)}", False)]
    torch = sorted({str(run.summary.get("versions", {}).get("torch", "?")) for run in runs})
    return [Fact(f"{machine}, torch {' and '.join(torch)}", None) for machine in machines]


def _range(runs: list[Run], value: Callable[[Run], int]) -> tuple[int, int]:
    values = [value(run) for run in runs]
    return min(values), max(values)
