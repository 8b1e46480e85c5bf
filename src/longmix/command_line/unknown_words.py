"""Why a name is no word of a command, with the nearest word that is."""

import re
from typing import Any

from longmix.command_line.program import program
from longmix.command_line.schema import Schema
from longmix.command_line.words import Word, quoted, shown
from longmix.wording import did_you_mean, nearest

NAME = re.compile(r"[A-Za-z_][\w/-]*(\.(\w|-)+)*(@[\w.:]*)?", re.ASCII)


FROM_CHECKPOINT = {"mixer", "model", "block", "tokenizer", "optimizer", "data"}


def unknown_word(schema: Schema, name: str) -> str | None:
    """The message for a word that the defaults lack, with the nearest one; None if they have it."""
    if not name:
        return "an empty text is no name of a word."
    group = re.split("[.@]", name)[0]
    if group in schema.all_groups and group not in schema.groups and group not in schema.words:
        return foreign(schema, Word.read(name))
    if "/" in name or "@" in name:
        return f"there is no group {shown(name)}. Groups are: {', '.join(schema.groups)}."
    return wrong_word(schema, schema.composed([]), Word(name, "", name, None))


def foreign(schema: Schema, word: Word) -> str:
    """The message for a group that belongs to another command."""
    group = re.split("[.@]", word.name)[0]
    if schema.command in ("evaluate", "generate") and group in FROM_CHECKPOINT:
        return f"{shown(word.given)} cannot be chosen here: {group} comes from the checkpoint."
    taken = ", ".join([*schema.groups, *(name for name in schema.words if not name.startswith("hydra."))])
    return f"{group} is not a word of {program(schema.command)}. Words there are: {taken}."


def wrong_word(schema: Schema, node: dict[str, Any], word: Word) -> str | None:
    """The message for a name that does not exist, or that `+` would add although it exists."""
    name = word.name
    if schema.is_group(name) and not name.startswith("hydra/"):
        return None
    if "/" in name or "@" in name:
        return None
    exists = _exists(node, name)
    if word.sign == "+" and exists and word.value is not None and not word.value.startswith(("[", "{")):
        return f"{shown(word.given)}: {name} is there already; write {quoted(word.given[1:])}."
    if word.sign in ("+", "++") and NAME.fullmatch(name):
        return None
    if exists:
        return None
    if word.sign == "~":
        return f"{shown(word.given)}: there is no {name} to leave out."
    if not NAME.fullmatch(name):
        return f"{shown(name)} is no name of a word.{did_you_mean(nearest(name, _dotted(node)))}"
    return _unknown(schema, node, word)


def _unknown(schema: Schema, node: dict[str, Any], word: Word) -> str:
    *parents, leaf = word.name.split(".")
    parent: Any = node
    depth = 0
    for part in parents:
        if not isinstance(parent, dict) or part not in parent:
            break
        parent, depth = parent[part], depth + 1
    known = ".".join(parents[:depth])
    group = parents[0] if parents else ""
    if group in schema.all_groups and group not in schema.groups:
        return foreign(schema, word)
    if schema.takes_several(group) and depth == 1 and parents[1:] and parents[1] in schema.choices(group):
        return (
            f"{shown(word.name)} is a setting of {group}={parents[1]}, which is not chosen; add {group}={parents[1]}."
        )
    if group in schema.groups:
        problem = _no_member(node[group], word)
        if problem:
            return problem
        having = [choice for choice in schema.choices(group) if _file_has(schema, group, choice, parents[1:], leaf)]
        if having:
            such = f"{group}={having[-1]}" if len(having) == 1 else f"the one you mean, such as {group}={having[-1]}"
            return f"{shown(word.name)} is a setting of {_as_choices(group, having)}; add {such}."
    keys = [key for key in parent if key != "_target_"] if isinstance(parent, dict) else []
    wanted = parents[depth] if depth < len(parents) else leaf
    if not known:
        keys = [key for key in keys if key != "hydra"]
        keys += [name for name in schema.groups if name not in keys]
    meant = nearest(wanted, keys)
    guess = f"{known}.{meant}" if known and meant else meant
    if depth < len(parents) and leaf in keys:
        guess = f"{known}.{leaf}" if known else leaf
    elif guess and depth < len(parents):
        guess = ".".join([guess, *parents[depth + 1 :], leaf])
        guess = guess if _exists(node, guess) else f"{known}.{meant}" if known else meant
    if not guess and group in schema.groups and depth == 1:
        meant = nearest(wanted, _settings_of_choices(schema, group))
        guess = f"{group}.{meant}" if meant else ""
    if not guess:
        guess = _by_leaf(node, leaf)
    where = f"Settings of {known} are" if known else "Words are"
    if known and not keys:
        return f"unknown word {shown(word.name)}: {known} has no settings of its own."
    return f"unknown word {shown(word.name)}.{did_you_mean(guess)} {where}: {', '.join(keys)}."


def _no_member(mixer: Any, word: Word) -> str | None:
    """The message for a setting that names no member of a pattern of mixers, or one that lacks it; else None."""
    order = mixer.get("pattern") if isinstance(mixer, dict) else None
    if not isinstance(order, list):
        return None
    group, *rest = word.name.split(".")
    named = rest[0] if len(rest) > 1 and isinstance(mixer.get(rest[0]), dict) else ""
    setting = ".".join(rest[1:] if len(rest) > 1 else rest)
    members = list(dict.fromkeys(order))
    having = [member for member in members if _exists(mixer, f"{member}.{setting}")]
    if not having:
        known = {str(key): f"{group}.{member}.{key}" for member in reversed(members) for key in mixer.get(member) or ()}
        close = nearest(setting, known)
        return f"unknown word {shown(word.name)}.{did_you_mean(known[close])}" if close and not named else None
    value = "" if word.value is None else f"={word.value}"
    written = " ".join(quoted(f"{group}.{member}.{setting}{value}") for member in having)
    lacking = [member for member in members if member not in having]
    lack = f" {_listed(lacking)} {'lacks' if len(lacking) == 1 else 'lack'} {setting}." if lacking else ""
    if named:
        return f"unknown word {shown(word.name)}.{lack} Did you mean {written}?"
    pattern = f"{group}={'+'.join(members)}"
    if len(rest) > 1:
        return f"{shown(word.name)}: {shown(rest[0])} is no member of {pattern}. Write {written}."
    return f"{shown(word.name)} names no member of {pattern}, and each has its own settings.{lack} Write {written}."


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _as_choices(group: str, names: list[str]) -> str:
    return _listed([f"{group}={name}" for name in names[:4]] + (["others"] if len(names) > 4 else []))


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
