"""`python -m longmix.planning model=7b mixer=flash seq_len=65536 gpus=64`: memory, traffic and time of a run.

Takes the words of `train.py`, and gpus=N (1), gpu=NAME (H200; `cpu` is this machine), and output=FOLDER for plan.json
and plan.png. Exits with 0 where the run fits, 1 where it does not, 2 for impossible words.
"""

import sys
from pathlib import Path

from longmix import startup
from longmix.command_line.program import as_called
from longmix.errors import ConfigError, LongmixError

DOES_NOT_FIT = 1


def main(words: list[str] | None = None) -> int:
    """Print the plan, write it where asked to, and return the exit code."""
    words = sys.argv[1:] if words is None else words
    if not words:
        print(
            f"ConfigError: there is nothing to plan; give at least one word.\n\n{as_called(__doc__ or '')}",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    outputs = [word.removeprefix("output=") for word in words if word.startswith("output=")]
    try:
        if set(words) & {"-h", "--help"}:
            print(_help(words))
            return 0
        if "" in outputs:
            raise ConfigError("output= names no folder.")
        folder = Path(outputs[-1]).expanduser() if outputs else None
        return _run([word for word in words if not word.startswith("output=")], folder)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _help(words: list[str]) -> str:
    """The help of this command, or of the words of `train.py` that are asked about."""
    from longmix import cli
    from longmix.command_line.schema import Schema, configs_folder

    asked = [word for word in words if word.partition("=")[0] not in ("gpus", "gpu", "output")]
    if not [word for word in asked if not word.startswith("-")]:
        return as_called(__doc__ or "")
    cli.register()
    schema = Schema("train", configs_folder())
    schema.search(asked)
    return cli.answered(schema, asked) or ""


def _run(words: list[str], output: Path | None) -> int:
    from rich.console import Console

    from longmix.files import replace_json, storage_errors
    from longmix.planning import arguments, report
    from longmix.planning.plan import Planner, single_changes, smallest_change

    planner = Planner(arguments.read(words))
    plan = planner.plan()
    fits = plan.memory.fits
    change = None if fits else smallest_change(planner)
    singles = [] if fits else single_changes(planner)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(report.shown(planner, plan, change, singles))
    if output is not None:
        with storage_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        plans = report.lengths(planner)
        replace_json(output / "plan.json", report.as_json(planner, plan, change, singles, plans))
        report.draw(planner, plans, output / "plan.png")
        console.print(f"wrote {output / 'plan.json'} and {output / 'plan.png'}", soft_wrap=True)
    return 0 if fits else DOES_NOT_FIT


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
