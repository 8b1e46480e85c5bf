"""Options of the modules that `python -m` runs: what they refuse is one line, as that of every other command."""

import argparse
from pathlib import Path
from typing import NoReturn

from longmix.errors import ConfigError
from longmix.paths import user_path

MISSING = "the following arguments are required"
"""The beginning of what argparse says of a command without its arguments."""


class OptionParser(argparse.ArgumentParser):
    """A parser that refuses an option in one line; where arguments are missing, the usage stands above it."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: says why.
            SystemExit: arguments are missing.
        """
        if message.startswith(MISSING):
            super().error(message)
        raise ConfigError(f"{message}; {self.prog} -h lists the options.")


def path_option(text: str) -> Path:
    """The path that an option gives, with `~` expanded; the `type` of such an option.

    Raises:
        argparse.ArgumentTypeError: it is empty, or no path.
    """
    try:
        return user_path("it", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error
