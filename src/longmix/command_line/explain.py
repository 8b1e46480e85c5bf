"""Why a command line was refused, in one line that names the word and the cure."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from longmix.command_line import values
from longmix.command_line.program import program
from longmix.command_line.schema import Schema
from longmix.command_line.values import Takes
from longmix.command_line.words import Word
from longmix.config import fits, misfit
from longmix.wording import did_you_mean, nearest

NAME = re.compile(r"[A-Za-z_][\w/-]*(\.(\w|-)+)*(@[\w.:]*)?", re.ASCII)
SHOWN = 120  # characters of a word that a message repeats
LONGEST = 800  # characters of a message of Hydra's own
FROM_CHECKPOINT = {"mixer", "model", "block", "tokenizer", "optimizer", "data"}


def explained(schema: Schema, given: Sequence[str], sweep: bool, error: BaseException) -> str:
    """The message for a command line that Hydra refused with `error`."""
    words = [Word.read(argument) for argument in given]
    for problem in _problems(schema, words, sweep, error):
        if problem:
            return problem
    return _cleaned(error)


def misformed(schema: Schema, words: Sequence[Word], sweep: bool) -> str | None:
    """The message for a malformed word or an unknown choice; None if all are well. Composes nothing."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word.given):
            return f"{_shown(word.given)} is not valid UTF-8."
    for place, word in enumerate(words):
        if word.stands_alone:
            return _alone(schema, words, place)
        if word.sign and not word.name:
            return f"{_shown(word.given)} has no name behind {word.sign}."
        if not word.name:
            return f"{_shown(word.given)} has no name before the equals sign."
        if values.is_list(word.value or "") and word.name in schema.groups and not schema.takes_several(word.name):
            return f"{_shown(word.given)} is a list; {word.name} takes one choice. -m {word.name}=A,B runs with each."
    return next(filter(None, (_wrong_group(schema, word, sweep) for word in words)), None)


def unknown_word(schema: Schema, name: str) -> str | None:
    """The message for a word that the defaults lack, with the nearest one; None if they have it."""
    if not name:
        return "an empty text is no name of a word."
    group = re.split("[.@]", name)[0]
    if group in schema.all_groups and group not in schema.groups and group not in schema.words:
        return _foreign(schema, Word.read(name))
    if "/" in name or "@" in name:
        return f"there is no group {_shown(name)}. Groups are: {', '.join(schema.groups)}."
    return _wrong_word(schema, schema.composed([]), Word(name, "", name, None))


def _problems(schema: Schema, words: list[Word], sweep: bool, error: BaseException) -> Iterable[str | None]:
    yield misformed(schema, words, sweep)
    try:
        node = schema.composed(word for word in words if not word.sign)
    except Exception:
        return
    for word in words:
        yield _wrong_word(schema, node, word)
    for word in words:
        yield _wrong_value(schema, word, words, sweep)
    if isinstance(error, InterpolationResolutionError) or isinstance(error.__cause__, InterpolationResolutionError):
        for word in words:
            if "${" in (word.value or ""):
                yield f"{_shown(word.given)}: {_cleaned(error)}"


def _alone(schema: Schema, words: Sequence[Word], place: int) -> str:
    """The message for a word without "=": a forgotten sign, a text that the shell cut, or a choice without group."""
    word = words[place]
    called = program(schema.command)
    before = words[place - 1] if place else None
    takes = schema.words.get(before.name) if before and before.value is not None else None
    if before and takes and takes.text and not schema.is_group(word.given):
        run = [before.given]
        for later in words[place:]:
            if not later.stands_alone:
                break
            run.append(later.given)
        return (
            f"{_shown(word.given)} stands alone. The shell divides at blanks; quote the word: {_quoted(' '.join(run))}."
        )
    if word.given in schema.words or schema.is_group(word.given):
        following = words[place + 1].given if place + 1 < len(words) else ""
        value = following if following and "=" not in following else "VALUE"
        return f"{_shown(word.given)} has no value; write {_quoted(f'{word.given}={value}')}."
    chosen = [f"{group}={word.given}" for group in schema.groups if word.given in schema.choices(group)]
    if chosen:
        return f"{_shown(word.given)} stands alone; write {' or '.join(chosen)}."
    if word.given.lower() in ("help", "?", "usage"):
        return f"{word.given} is not a word; {called} -h prints the help."
    if "checkpoint" in schema.words and os.path.exists(word.given):  # noqa: PTH110 (Path fails at a name too long)
        return f"{_shown(word.given)} stands alone; write {_quoted(f'checkpoint={word.given}')}."
    close = nearest(word.given, [*schema.words, *schema.groups])
    meant = did_you_mean(f"{close}=VALUE" if close else "")
    return f"{_shown(word.given)} is neither word=value nor an option.{meant} {called} -h lists the words."


def _wrong_group(schema: Schema, word: Word, sweep: bool) -> str | None:
    group = word.name.partition("@")[0]
    if word.value is None or not schema.is_group(word.name) or word.sign in ("~", "++"):
        return None
    if group not in schema.groups:
        return _foreign(schema, word) if group in schema.all_groups and not group.startswith("hydra/") else None
    value = word.value.strip()
    if value.startswith("{"):
        return f"{_shown(word.given)} chooses a file of configs/{group} by name; settings are {group}.NAME=VALUE."
    parts = values.split(value) if not values.SWEEP.fullmatch(value) else []
    if values.is_list(value):
        parts = values.items(value)
    elif len(parts) > 1 and not sweep:
        several = f"{group}=[{value}]" if schema.takes_several(group) else f"-m {group}={value} for one run with each"
        return f"{_shown(word.given)} gives several values; write {several}."
    for part in parts:
        problem = _wrong_choice(schema, group, part.strip())
        if problem:
            return problem
    return None


def _wrong_choice(schema: Schema, group: str, choice: str) -> str | None:
    choices = schema.choices(group)
    if choice in choices or values.quoted_by(choice) or (choice.lower() == "null" and schema.groups[group] is None):
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
    return f"{group}={_shown(choice)} does not exist.{meant} Choices are: {', '.join(choices)}."


def _wrong_pattern(choices: list[str], pattern: str) -> str | None:
    for term in pattern.split("+"):
        name, star, count = term.partition("*")
        if not term:
            return f"mixer={_shown(pattern)} has nothing on one side of a +; write it like sliding_window*3+flash."
        if name not in choices:
            meant = did_you_mean(nearest(name, choices))
            return f"mixer={_shown(pattern)}: there is no mixer {name!r}.{meant} Choices are: {', '.join(choices)}."
        if star and not re.fullmatch(r"[1-9]\d*", count, re.ASCII):
            return f"mixer={_shown(pattern)}: the count {count!r} of {name} must be a whole number from 1."
        if len(count) > 4:  # a list of a thousand million names fills the memory before anything else is looked at
            return f"mixer={_shown(pattern)}: {count} layers of {name} are too many; give at most 9999."
    return None


def _foreign(schema: Schema, word: Word) -> str:
    """The message for a group that belongs to another command."""
    group = re.split("[.@]", word.name)[0]
    if schema.command in ("evaluate", "generate") and group in FROM_CHECKPOINT:
        return f"{_shown(word.given)} cannot be chosen here: {group} comes from the checkpoint."
    taken = ", ".join([*schema.groups, *(name for name in schema.words if not name.startswith("hydra."))])
    return f"{group} is not a word of {schema.command}.py. Words there are: {taken}."


def _wrong_word(schema: Schema, node: dict[str, Any], word: Word) -> str | None:
    """The message for a name that does not exist, or that `+` would add although it exists."""
    name = word.name
    if schema.is_group(name) and not name.startswith("hydra/"):
        return None
    if "/" in name or "@" in name:
        return None
    exists = _exists(node, name)
    if word.sign == "+" and exists and word.value is not None and not word.value.startswith(("[", "{")):
        return f"{_shown(word.given)}: {name} is there already; write {_quoted(word.given[1:])}."
    if word.sign in ("+", "++") and NAME.fullmatch(name):
        return None
    if exists:
        return None
    if word.sign == "~":
        return f"{_shown(word.given)}: there is no {name} to leave out."
    if not NAME.fullmatch(name):
        return f"{_shown(name)} is no name of a word.{did_you_mean(nearest(name, _dotted(node)))}"
    return _unknown(schema, node, word)


def _unknown(schema: Schema, node: dict[str, Any], word: Word) -> str:
    *parents, leaf = word.name.split(".")
    parent: Any = node
    depth = 0
    for part in parents:
        if not isinstance(parent, dict) or part not in parent:
            break
        parent, depth = parent[part], depth + 1
    place = ".".join(parents[:depth])
    group = parents[0] if parents else ""
    if group in schema.all_groups and group not in schema.groups:
        return _foreign(schema, word)
    if schema.takes_several(group) and depth == 1 and parents[1:] and parents[1] in schema.choices(group):
        return (
            f"{_shown(word.name)} is a setting of {group}={parents[1]}, which is not chosen; add {group}={parents[1]}."
        )
    if group in schema.groups:
        having = [choice for choice in schema.choices(group) if _file_has(schema, group, choice, parents[1:], leaf)]
        if having:
            such = f"{group}={having[-1]}" if len(having) == 1 else f"the one you mean, such as {group}={having[-1]}"
            return f"{_shown(word.name)} is a setting of {_as_choices(group, having)}; add {such}."
    keys = [key for key in parent if key != "_target_"] if isinstance(parent, dict) else []
    wanted = parents[depth] if depth < len(parents) else leaf
    if not place:
        keys = [key for key in keys if key != "hydra"]
        keys += [name for name in schema.groups if name not in keys]
    meant = nearest(wanted, keys)
    guess = f"{place}.{meant}" if place and meant else meant
    if guess and depth < len(parents):
        guess = ".".join([guess, *parents[depth + 1 :], leaf])
        guess = guess if _exists(node, guess) else f"{place}.{meant}" if place else meant
    if not guess and group in schema.groups and depth == 1:
        meant = nearest(wanted, _settings_of_choices(schema, group))
        guess = f"{group}.{meant}" if meant else ""
    if not guess:
        guess = _by_leaf(node, leaf)
    where = f"Settings of {place} are" if place else "Words are"
    if place and not keys:
        return f"unknown word {_shown(word.name)}: {place} has no settings of its own."
    return f"unknown word {_shown(word.name)}.{did_you_mean(guess)} {where}: {', '.join(keys)}."


def _as_choices(group: str, names: list[str]) -> str:
    shown = [f"{group}={name}" for name in names[:4]] + (["others"] if len(names) > 4 else [])
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _file_has(schema: Schema, group: str, choice: str, parents: list[str], leaf: str) -> bool:
    """Whether a choice's own file sets a name below some parents."""
    from omegaconf import OmegaConf

    try:
        node: Any = OmegaConf.to_container(OmegaConf.load(schema.file(group, choice)), resolve=False)
    except Exception:
        return False
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    return isinstance(node, dict) and leaf in node


def _settings_of_choices(schema: Schema, group: str) -> set[str]:
    """The settings of all choices of a group together."""
    from omegaconf import OmegaConf

    found: set[str] = set()
    for choice in schema.choices(group):
        try:
            node = OmegaConf.load(schema.file(group, choice))
        except Exception:
            continue  # Hydra says what is wrong with the file where it is chosen
        found |= {str(key) for key in node} if OmegaConf.is_dict(node) else set()
    return found - {"_target_", "defaults"}


def _by_leaf(node: dict[str, Any], leaf: str) -> str:
    """The full name of a setting elsewhere whose last part is, abbreviates, or nearly is this name."""
    dotted = [name for name in _dotted(node) if not name.startswith("hydra.")]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(dotted)}
    initials = {"".join(part[:1] for part in name.split("_")): full for name, full in by_leaf.items() if "_" in name}
    if leaf in by_leaf:
        return by_leaf[leaf]
    if leaf in initials:
        return initials[leaf]
    close = nearest(leaf, by_leaf, cutoff=0.7)
    return by_leaf[close] if close else ""


def _dotted(node: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        if key == "_target_":
            continue
        name = f"{prefix}{key}"
        found += [name, *(_dotted(value, f"{name}.") if isinstance(value, dict) else [])]
    return found


def _exists(node: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _wrong_value(schema: Schema, word: Word, words: list[Word], sweep: bool) -> str | None:
    if word.value is None or word.sign == "~" or schema.is_group(word.name):
        return None
    takes = schema.words.get(word.name) or schema.setting(word.name, words)
    written = word.value if takes is None else values.as_hydra_reads(word.value, takes, sweep)
    try:
        override = OverridesParser.create().parse_override(f"{word.name}={written}")
    except Exception:
        if takes:
            return f"{_shown(word.given)} {_misfit(word.value, takes)}{_cure(word, takes)}"
        cure = shlex.quote(f"{word.name}='{word.value}'")
        return (
            f"{_shown(word.given)} cannot be read; a text with such characters needs quotes of its own: {_shown(cure)}"
        )
    if override.is_sweep_override():
        if not sweep:
            cure = f"A list is {word.name}=[{word.value}]; " if takes is None or takes.texts else ""
            return f"{_shown(word.given)} gives several values. {cure}-m {_shown(word.given)} makes one run with each."
        return _wrong_sweep(word, override, takes)
    value = override.value()
    if takes and not (isinstance(value, str) and "${" in value) and not fits(value, takes.hint):
        return f"{_shown(word.given)} {_misfit(word.value, takes)}{_cure(word, takes)}"
    return None


def _misfit(text: str, takes: Takes) -> str:
    """The message for a value of the wrong type, or a number that is too large."""
    return misfit(values.numbers(text), takes.hint) if takes.whole else misfit(text, takes.hint)


def _cure(word: Word, takes: Takes) -> str:
    value = word.value or ""
    if takes.texts and not takes.text and not value.startswith("["):
        return f" A list is {_quoted(f'{word.name}=[{value}]')}."
    thousands = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbBgG])i?", value)
    if takes.whole and thousands:
        exponent = {"k": 1, "m": 2, "b": 3, "g": 3}[thousands[2].lower()]
        plain, binary = (int(float(thousands[1]) * base**exponent) for base in (1000, 1024))
        return f" Write {word.name}={plain} or {word.name}={binary}."
    return ""


def wrong_sweep(schema: Schema, words: Sequence[Word]) -> str | None:
    """The message for a sweep without values, which Hydra would take for a success without runs."""
    for word in words:
        if values.SWEEP.fullmatch((word.value or "").strip()):
            problem = _wrong_value(schema, word, list(words), sweep=True)
            if problem:
                return problem
    return None


def _wrong_sweep(word: Word, override: Any, takes: Takes | None) -> str | None:
    if not override.is_discrete_sweep():
        return None
    try:
        found = list(override.sweep_iterator())
    except Exception as error:
        return f"{_shown(word.given)} is no sweep: {_first_line(error)}."
    if not found:
        return f"{_shown(word.given)} holds no value, so the sweep would have no run."
    for value in found:
        text = getattr(value, "text", value)
        if takes and not fits(text, takes.hint):
            return f"{word.name}={_shown(str(text))} {_misfit(str(text), takes)}"
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


def _shown(text: str) -> str:
    """A part of the command line for a message: on one line, and shortened."""
    line = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def _quoted(argument: str) -> str:
    return _shown(shlex.quote(argument))
