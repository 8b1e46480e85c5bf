"""The user's name for a command: `longmix train`, or `python train.py` in the repository's folder.

Nothing heavy is imported here.
"""

import re
import sys
from pathlib import Path

SCRIPTS = ("train", "evaluate", "generate", "prepare")
"""Commands for which the repository has a script too."""

MODULES = {
    "longmix.planning": "longmix plan",
    "longmix.reporting": "longmix report",
    "longmix.checkpoints": "longmix",
    "longmix.interop.huggingface": "longmix",
}
"""Modules that `python -m` runs, and the commands that do the same."""


def is_script() -> bool:
    """Whether one of the repository's scripts was called."""
    called = Path(sys.argv[0] if sys.argv else "")
    return called.suffix == ".py" and called.stem in SCRIPTS


def is_console() -> bool:
    """Whether the console command was called, or `python -m longmix`."""
    called = Path(sys.argv[0] if sys.argv else "")
    return called.stem == "longmix" or (called.stem == "__main__" and called.parent.name == "longmix")


def program(command: str) -> str:
    """The name of a command in messages: `python train.py` where a script was called, else `longmix train`."""
    return f"python {command}.py" if is_script() and command in SCRIPTS else f"longmix {command}"


def as_called(text: str) -> str:
    """A text that names scripts and modules; with console commands in their place where the console was called."""
    if not is_console():
        return text
    text = re.sub(rf"\bpython ({'|'.join(SCRIPTS)})\.py\b", r"longmix \1", text)
    modules = "|".join(re.escape(module) for module in MODULES)
    return re.sub(rf"\bpython -m ({modules})\b", lambda found: MODULES[found[1]], text)


def in_dialect(message: str) -> str:
    """A module's message; where the console was called, its options are the words that the console takes."""
    if not is_console():
        return message
    message = re.sub(r"--force\b", "force=true", message)
    message = re.sub(r"--as (?=[a-z]+,)", "as=", message)
    # What argparse says of an option begins with "argument"; there the option was typed.
    option = r"(?<![\w-])(?<!argument )--([a-z]+(?:-[a-z]+)*)\b"
    return re.sub(option, lambda found: found[1].replace("-", "_"), as_called(message))
