"""The texts of `-h` and `--version`: every word with default and meaning, every group with its choices."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

import longmix
from longmix.command_line.entries import SWEEP_GROUPS, entry, group_lines, words, written
from longmix.command_line.pages import pages_of
from longmix.command_line.program import as_called
from longmix.command_line.schema import Schema

VERSIONED = ("torch", "triton", "lightning", "hydra-core")

RULES = """\
A choice's settings are words too: GROUP.SETTING=VALUE. `-h GROUP=CHOICE` lists them with their meaning, and
`--cfg job` prints every setting with its value. A text may hold any character; quote it for the shell where the shell
asks for it: 'prompt=Who goes there?'. Whole numbers may be written as 3e6 or 3_000_000. The last of equal words counts.
"""


def help_text(schema: Schema, asked: Sequence[str] = ()) -> str:
    """The help of a command, or of the words that are asked about.

    Args:
        schema: the command's.
        asked: words such as `task=needle`, `task`, `seed` or `task.needle.depths`.

    Raises:
        ConfigError: there is no such word or choice.
    """
    pages = [page for word in asked for page in pages_of(schema, word)]
    if pages:
        return "\n".join(pages)
    primary: Any = OmegaConf.to_container(schema.primary, resolve=False)
    head = primary["hydra"]["help"]["template"]
    groups = [line for group, default in schema.groups.items() for line in group_lines(schema, group, default)]
    if schema.command == "train":
        groups += [line for group in SWEEP_GROUPS for line in group_lines(schema, group, "basic")]
    own = [line for name, default, text in words(schema) for line in entry(f"{name}={written(default)}", text)]
    chosen = ["Words that choose a file", *groups, "", "Other words"] if groups else ["Words"]
    return "\n".join([as_called(head.rstrip()), "", *chosen, *own, "", RULES.rstrip()])


def version_text() -> str:
    """Versions of longmix and of what it runs on."""
    found = []
    for package in VERSIONED:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"longmix {longmix.__version__} ({', '.join(found)})"
