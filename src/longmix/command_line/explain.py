"""Why a command line was refused, in one line that names the word and the cure."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from longmix.command_line import values
from longmix.command_line.members import MOST_RUNS, count, miswritten, no_match, too_long, without_sweep, wrong_member
from longmix.command_line.own_files import in_file, not_yaml
from longmix.command_line.program import program
from longmix.command_line.schema import HYDRA_PATHS, Schema
from longmix.command_line.unknown_words import foreign, wrong_word
from longmix.command_line.values import Takes
from longmix.command_line.words import Word, quoted, shown
from longmix.config import fits, misfit
from longmix.paths import empty_path
from longmix.wording import did_you_mean, nearest

LONGEST = 800  # characters of a message of Hydra's own


def explained(schema: Schema, given: Sequence[str], sweep: bool, error: BaseException) -> str:
    """The message for a command line that Hydra refused with `error`."""
    words = [Word.read(argument) for argument in given]
    if isinstance(error, YAMLError):
        return not_yaml(error)
    for problem in _problems(schema, words, sweep, error):
        if problem:
            return problem
    return in_file(schema, error) or _cleaned(error)


def misformed(schema: Schema, words: Sequence[Word], sweep: bool) -> str | None:
    """The message for a malformed word or an unknown choice; None if all are well. Composes nothing."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word.given):
            return f"{shown(word.given)} is not valid UTF-8."
    for index, word in enumerate(words):
        if not word.given:
            return "an argument is empty; was a variable of the shell not set?"
        if word.stands_alone:
            return _alone(schema, words, index)
        if word.sign and not word.name:
            return f"{shown(word.given)} has no name behind {word.sign}."
        problem = _left_out(schema, word) if word.sign == "~" else _no_section(schema, word)
        if problem:
            return problem
        if word.name in HYDRA_PATHS and not values.without_quotes((word.value or "").strip()).strip():
            return empty_path(word.name)
        if not word.name:
            return f"{shown(word.given)} has no name before the equals sign."
        if values.is_list(word.value or "") and word.name in schema.groups and not schema.takes_several(word.name):
            each = f" -m {word.name}=A,B runs with each." if schema.sweeps else ""
            return f"{shown(word.given)} is a list; {word.name} takes one choice.{each}"
    return next(filter(None, (_wrong_group(schema, word, sweep) for word in words)), None)


def _problems(schema: Schema, words: list[Word], sweep: bool, error: BaseException) -> Iterable[str | None]:
    yield misformed(schema, words, sweep)
    if sweep:
        yield wrong_member(schema, words)
    try:
        node = schema.composed(word for word in words if not word.sign)
    except Exception:
        return
    for word in words:
        yield wrong_word(schema, node, word)
    for word in words:
        yield _wrong_value(schema, word, words, sweep) or _no_value(schema, node, word)
    if any(isinstance(cause, GrammarParseError) for cause in (error, error.__cause__)):
        for word in words:
            if "${" in (word.value or ""):
                yield f"{shown(word.given)}: the ${{ in it begins an interpolation that has no end."
    if isinstance(error, InterpolationResolutionError) or isinstance(error.__cause__, InterpolationResolutionError):
        for word in words:
            if "${" in (word.value or ""):
                yield f"{shown(word.given)}: {_cleaned(error)}"


def _alone(schema: Schema, words: Sequence[Word], index: int) -> str:
    """The message for a word without "=": a forgotten sign, a text that the shell cut, or a choice without group."""
    word = words[index]
    called = program(schema.command)
    before = words[index - 1] if index else None
    takes = schema.words.get(before.name) if before and before.value is not None else None
    if before and takes and takes.text and not schema.is_group(word.given):
        run = [before.given]
        for later in words[index:]:
            if not later.stands_alone:
                break
            run.append(later.given)
        return (
            f"{shown(word.given)} stands alone. The shell divides at blanks; quote the word: {quoted(' '.join(run))}."
        )
    if word.given in schema.words or word.given in schema.groups:
        following = words[index + 1].given if index + 1 < len(words) else ""
        value = following if following and "=" not in following else "VALUE"
        return f"{shown(word.given)} has no value; write {quoted(f'{word.given}={value}')}."
    chosen = [f"{group}={word.given}" for group in schema.groups if word.given in schema.choices(group)]
    if chosen:
        return f"{shown(word.given)} stands alone; write {' or '.join(chosen)}."
    if word.given.startswith("-"):
        is_folder = word.given.startswith(("-cd", "--config-dir"))
        folder = " A folder of your own choices is hydra.searchpath=[FOLDER]." if is_folder else ""
        return f"{shown(word.given)} is an option, and only words are taken here.{folder}"
    if word.given.lower() in ("help", "?", "usage"):
        return f"{word.given} is not a word; {called} -h prints the help."
    if "checkpoint" in schema.words and os.path.exists(word.given):  # noqa: PTH110 (Path fails at a name too long)
        return f"{shown(word.given)} stands alone; write {quoted(f'checkpoint={word.given}')}."
    close = nearest(word.given, [*schema.words, *schema.groups])
    meant = did_you_mean(f"{close}=VALUE" if close else "")
    return f"{shown(word.given)} is neither word=value nor an option.{meant} {called} -h lists the words."


def _left_out(schema: Schema, word: Word) -> str | None:
    """The message for a word that a command needs and `~` would leave out."""
    if word.name not in schema.words and word.name not in schema.sections and word.name not in schema.groups:
        return None
    takes = schema.words.get(word.name)
    cure = f" For no value write {word.name}=null." if takes and type(None) in takes.options else ""
    return f"{shown(word.given)}: {word.name} cannot be left out; without the word it has its default.{cure}"


def _no_value(schema: Schema, node: Any, word: Word) -> str | None:
    """The message for a value in the place of settings, such as hydra.run=x."""
    if schema.is_group(word.name):
        return None
    for part in word.name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or word.value is None or word.value.strip().startswith("{"):
        return None
    names = ", ".join(f"{word.name}.{name}" for name in node)
    return f"{shown(word.given)}: {word.name} has no value of its own; its words are: {names}."


def _no_section(schema: Schema, word: Word) -> str | None:
    """The message for a single value in the place of words, as in loop=null."""
    inner = schema.sections.get(word.name)
    if inner is None or word.value is None or word.value.strip().startswith("{"):
        return None
    names = ", ".join(f"{word.name}.{name}" for name in inner)
    return f"{shown(word.given)}: {word.name} has no value of its own; its words are: {names}."


def _wrong_group(schema: Schema, word: Word, sweep: bool) -> str | None:
    group = word.name.partition("@")[0]
    if word.value is not None and word.name in schema.changed_groups:
        return foreign(schema, word)
    if word.value is None or not schema.is_group(word.name) or word.sign == "~":
        return None
    if word.sign and word.name in schema.groups:
        return f"{shown(word.given)}: {group} has a choice already; write {quoted(f'{group}={word.value}')}."
    if word.sign == "++":
        return f"{shown(word.given)}: a choice of {group} is added with one +."
    if group not in schema.groups:
        return foreign(schema, word) if group in schema.all_groups and not group.startswith("hydra/") else None
    value = word.value.strip()
    if not sweep and (problem := without_sweep(word, schema)):
        return problem
    if value.startswith("{"):
        return f"{shown(word.given)} chooses a file of configs/{group} by name; settings are {group}.NAME=VALUE."
    parts = values.split(value) if not values.SWEEP.fullmatch(value) else []
    if values.is_list(value):
        parts = values.items(value)
    elif len(parts) > 1 and not sweep:
        if schema.takes_several(group):
            return f"{shown(word.given)} gives several values; write {group}=[{value}]."
        cure = f"write -m {group}={value} for one run with each" if schema.sweeps else f"{group} takes one"
        return f"{shown(word.given)} gives several values; {cure}."
    for part in parts:
        if len(parts) > 1 and part.strip().lower() == "null":
            return f"{shown(word.given)}: null is no choice of a sweep; sweep without it, and run that one by itself."
        problem = _wrong_choice(schema, group, part.strip())
        if problem:
            return problem
    return None


def _wrong_choice(schema: Schema, group: str, choice: str) -> str | None:
    choices = schema.choices(group)
    choice = values.without_quotes(choice)
    if choice in choices or (choice.lower() == "null" and schema.groups[group] is None):
        return None
    if group == "mixer" and re.search(r"[*+]", choice):
        return _wrong_pattern(choices, choice)
    return no_such_choice(schema, group, choice)


def no_such_choice(schema: Schema, group: str, choice: str) -> str:
    """The message for an unknown choice of a group, with the nearest one."""
    return does_not_exist(group, choice, schema.choices(group))


def does_not_exist(group: str, choice: str, choices: Sequence[str]) -> str:
    """The message for a choice that is not among the existing ones."""
    meant = did_you_mean(nearest(choice, choices))
    return f"{group}={shown(choice)} does not exist.{meant} Choices are: {', '.join(choices)}."


def _wrong_pattern(choices: list[str], pattern: str) -> str | None:
    for term in pattern.split("+"):
        name, star, count = term.partition("*")
        if not term:
            return f"mixer={shown(pattern)} has nothing on one side of a +; write it like sliding_window*3+flash."
        if name not in choices:
            meant = did_you_mean(nearest(name, choices))
            return f"mixer={shown(pattern)}: there is no mixer {name!r}.{meant} Choices are: {', '.join(choices)}."
        if star and not re.fullmatch(r"[1-9]\d*", count, re.ASCII):
            return f"mixer={shown(pattern)}: the count {count!r} of {name} must be a whole number from 1."
        if len(count) > 4:  # a list of a thousand million names fills the memory before anything else is looked at
            return f"mixer={shown(pattern)}: {count} layers of {name} are too many; give at most 9999."
    return None


def _wrong_value(schema: Schema, word: Word, words: list[Word], sweep: bool) -> str | None:
    if word.value is None or word.sign == "~" or schema.is_group(word.name):
        return None
    takes = schema.words.get(word.name) or schema.setting(word.name, words)
    written = word.value if takes is None else values.as_hydra_reads(word.value, takes, sweep)
    try:
        override = OverridesParser.create().parse_override(f"{word.name}={written}")
    except Exception:
        if takes:
            return f"{shown(word.given)} {_misfit(word.value, takes)}{_cure(word, takes)}"
        cure = shlex.quote(f"{word.name}='{word.value}'")
        return f"{shown(word.given)} cannot be read; a text with such characters needs quotes of its own: {shown(cure)}"
    if override.is_sweep_override():
        if not sweep:
            is_list = takes is None or takes.texts
            cures = [f"a list is {word.name}=[{word.value}]"] if is_list else []
            cures += [f"-m {shown(word.given)} makes one run with each"] if schema.sweeps else []
            cure = "; ".join(cures) or "give one"
            return f"{shown(word.given)} gives several values. {cure[:1].upper()}{cure[1:]}."
        return _wrong_sweep(word, override, takes)
    value = override.value()
    if takes and not (isinstance(value, str) and "${" in value) and not fits(value, takes.hint):
        if isinstance(value, dict):
            return f"{shown(word.given)} gives several settings at once; write each as {word.name}.NAME=VALUE."
        return f"{shown(word.given)} {_misfit(word.value, takes)}{_cure(word, takes)}"
    return None


def _misfit(text: str, takes: Takes) -> str:
    """The message for a value of the wrong type, or a number that is too large."""
    return misfit(values.numbers(text), takes.hint) if takes.whole else misfit(text, takes.hint)


def _cure(word: Word, takes: Takes) -> str:
    value = word.value or ""
    if takes.texts and not takes.text and not value.startswith("["):
        return f" A list is {quoted(f'{word.name}=[{value}]')}."
    thousands = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbBgG])i?", value)
    if takes.whole and thousands:
        exponent = {"k": 1, "m": 2, "b": 3, "g": 3}[thousands[2].lower()]
        plain, binary = (int(float(thousands[1]) * base**exponent) for base in (1000, 1024))
        return f" Write {word.name}={plain} or {word.name}={binary}."
    return ""


def wrong_sweep(schema: Schema, words: Sequence[Word]) -> str | None:
    """The message for a sweep without values, which Hydra would take for a success without runs."""
    runs = 1
    for word in words:
        value = (word.value or "").strip()
        if word.sign == "~":
            continue
        if values.SWEEP.fullmatch(value):
            problem = too_long(word) or miswritten(word) or no_match(schema, word)
            problem = problem or _wrong_value(schema, word, list(words), sweep=True)
            if problem:
                return problem
        runs *= max(1, count(word))
        if runs > MOST_RUNS:
            return f"{shown(word.given)}: the sweep would have {runs:,} runs or more, and may have {MOST_RUNS:,}."
    return None


def _wrong_sweep(word: Word, override: Any, takes: Takes | None) -> str | None:
    if not override.is_discrete_sweep():
        return None
    try:
        found = list(override.sweep_iterator())
    except Exception as error:
        return f"{shown(word.given)} is no sweep: {_first_line(error)}."
    if not found:
        return f"{shown(word.given)} holds no value, so the sweep would have no run."
    for value in found:
        text = getattr(value, "text", value)
        if takes and not fits(text, takes.hint):
            return f"{word.name}={shown(str(text))} {_misfit(str(text), takes)}"
    return None


def _cleaned(error: BaseException) -> str:
    """The text of an error without Hydra's decoration."""
    causes = [error]
    while isinstance(causes[-1].__cause__, HydraException | OmegaConfBaseException):
        causes.append(causes[-1].__cause__)
    inner = causes[-1]
    if isinstance(inner, MissingConfigException) and inner.options and inner.missing_cfg_file:
        group, _, choice = inner.missing_cfg_file.rpartition("/")
        return does_not_exist(group, choice, inner.options)
    key = getattr(inner, "full_key", None)
    text = str(inner) or str(error) or type(error).__name__
    text = re.split(r"\n\s*(?:Config s|S)earch path:|\nSee https://|\n\s*full_key:|\n\s*reference_type=", text)[0]
    text = " ".join(text.split()).replace("To append to your config use +", "Add it with +")
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    text = text if text.endswith(".") else f"{text}."
    return f"{key}: {text}" if key and key not in text else text


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
