"""`longmix COMMAND ...`: one console command for everything.

Nothing heavy is imported here, as signals and lost terminals are to be answered before anything else begins.
"""

import importlib
import sys
from collections.abc import Sequence

from longmix import startup
from longmix.command_line.catalogue import CATALOGUE, Command, overview
from longmix.errors import ConfigError, LongmixError
from longmix.printable import LINES, printable
from longmix.wording import did_you_mean, nearest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, with the others as its words.

    Args:
        arguments: those of the process if not given.

    Returns:
        The exit code.

    Raises:
        SystemExit: a command that ends by itself, with its exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    startup.begin(resumable=given[:1] == ["train"])  # before imports that take seconds
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(overview())
            return 0
        if given[0] == "--version":
            from longmix.command_line.help import version_text

            print(version_text())
            return 0
        return run(_command(given[0]), given[1:])
    except LongmixError as error:
        print(f"{type(error).__name__}: {printable(error, keep=LINES)}", file=sys.stderr)
        return error.exit_code


def run(command: Command, words: list[str]) -> int:
    """Run one command with these words.

    Raises:
        ConfigError: an unknown word.
        SystemExit: a command that ends by itself.
    """
    if command.hydra is not None:
        if command.adds and {"-h", "--help"} & set(words):
            print(f"longmix {command.name}: {command.about}; takes the words of `longmix {command.hydra}` and these.\n")
        for added in command.adds:
            name = added.partition("=")[0]
            if any(word.lstrip("+~").partition("=")[0] == name for word in words):
                raise ConfigError(f"longmix {command.name} has {added}; longmix {command.hydra} takes other {name}s.")
        sys.argv[1:] = [*words, *command.adds]
        from longmix.entry_points import run as run_task

        run_task(command.hydra)
        return 0
    assert command.module is not None
    if command.words and {"-h", "--help"} & set(words) and not command.besides:
        print(command.help())
        return 0
    options = [*command.adds, *command.options(words)]
    return importlib.import_module(command.module).main(options) or 0


def _command(name: str) -> Command:
    if name in CATALOGUE:
        return CATALOGUE[name]
    if not name.strip():
        raise ConfigError(f"the name of the command is empty. Commands are: {', '.join(CATALOGUE)}.")
    close = nearest(name, CATALOGUE)
    meant = did_you_mean(f"longmix {close}" if close else "")
    raise ConfigError(f"longmix has no command {printable(name)}.{meant} Commands are: {', '.join(CATALOGUE)}.")


if __name__ == "__main__":
    sys.exit(main())
