"""The runs of a sweep: how many there are, and which of them does not take one of the words, as every run gets all."""

import fnmatch
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, RangeSweep

from longmix.command_line import values
from longmix.command_line.schema import Schema
from longmix.command_line.unknown_words import wrong_word
from longmix.command_line.words import Word, shown

MOST_RUNS = 10_000
"""The most runs of a sweep: Hydra composes all of them before the first one begins."""


def too_long(word: Word) -> str | None:
    """The message for a range of more values than a sweep may have, without making a list of them."""
    numbers = _parsed(word)
    if not isinstance(numbers, RangeSweep) or None in (numbers.start, numbers.stop) or not numbers.step:
        return None
    number = (numbers.stop - numbers.start) / numbers.step  # type: ignore[operator]
    if number <= MOST_RUNS:
        return None
    return f"{word.name}={word.value} has {number:,.0f} values, and a sweep may have {MOST_RUNS:,} runs."


SWEEPS = {
    "choice": "choice(A,B)",
    "range": "range(1,4)",
    "interval": "interval(0,1)",
    "glob": "glob(*)",
    "shuffle": "shuffle(A,B)",
    "sort": "sort(1,2)",
    "tag": "tag(NAME,choice(A,B))",
}
"""What the sweeps of Hydra's grammar are written like."""


def miswritten(word: Word) -> str | None:
    """The message for a sweep such as `choice()` that Hydra cannot read."""
    value = (word.value or "").strip()
    if not values.SWEEP.fullmatch(value) or _parsed(word) is not None:
        return None
    return f"{shown(word.given)} is no sweep: it is written like {word.name}={SWEEPS[value.partition('(')[0].strip()]}."


def without_sweep(word: Word, schema: Schema) -> str | None:
    """The message for several choices, such as `choice(a,b)`, on a command line that is no sweep."""
    if not values.SWEEP.fullmatch((word.value or "").strip()):
        return None
    found = ",".join(_choices(word))
    cure = f"; write -m {shown(f'{word.name}={found}')} for one run with each" if schema.sweeps and found else ""
    return miswritten(word) or f"{shown(word.given)} is a sweep{cure}."


def no_match(schema: Schema, word: Word) -> str | None:
    """The message for a pattern of names that no choice has, which would be a success without runs."""
    pattern = _parsed(word)
    if not isinstance(pattern, Glob) or not schema.is_group(word.name):
        return None
    choices = schema.choices(word.name.partition("@")[0])
    included = [name for name in choices if any(fnmatch.fnmatch(name, each) for each in pattern.include)]
    if any(not any(fnmatch.fnmatch(name, each) for each in pattern.exclude) for name in included):
        return None
    return f"{word.name}={word.value} matches none of its choices, which are: {', '.join(choices)}."


def count(word: Word) -> int:
    """How many values a sweep's word stands for; 0 where only the sweeper knows."""
    return len(_choices(word))


def _parsed(word: Word) -> object:
    try:
        return OverridesParser.create().parse_override(f"{word.name}={word.value}").value()
    except Exception:
        return None  # it is refused by what looks at values


def wrong_member(schema: Schema, words: Sequence[Word]) -> str | None:
    """The message for a setting that some choices of a sweep have and others lack; None if there is no such word."""
    swept = {word.name: _choices(word) for word in words if not word.sign and schema.is_group(word.name)}
    firsts = {name: Word.read(f"{name}={choices[0]}") for name, choices in swept.items() if choices}
    others = [word for word in words if word.name not in swept]
    for group, choices in swept.items():
        settings = [word for word in others if word.name.startswith(f"{group}.")]
        lacking: dict[str, list[str]] = {word.given: [] for word in settings}
        for choice in choices if len(choices) > 1 and settings else []:
            chosen = firsts | {group: Word.read(f"{group}={choice}")}
            try:
                node = schema.composed([*chosen.values(), *others])
            except Exception:
                continue  # it has another fault, which is told by itself
            for word in settings:
                if wrong_word(schema, node, word) is not None:
                    lacking[word.given].append(f"{group}={choice}")
        for word in settings:
            if 0 < len(lacking[word.given]) < len(choices):
                return (
                    f"{word.name} is no setting of {' and '.join(lacking[word.given])}, and every run of a sweep gets "
                    f"all words; nothing was run. Sweep the choices that have {word.name} by themselves."
                )
    return None


def _choices(word: Word) -> list[str]:
    value = (word.value or "").strip()
    if not values.SWEEP.fullmatch(value):
        return [part.strip() for part in values.split(value)]
    try:
        override = OverridesParser.create().parse_override(f"{word.name}={value}")
        return [str(getattr(choice, "text", choice)) for choice in override.sweep_iterator()]
    except Exception:
        return []  # a pattern of names, or no sweep at all
