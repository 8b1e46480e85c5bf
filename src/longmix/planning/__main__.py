"""`python -m longmix.planning model=7b mixer=flash seq_len=65536 gpus=64`: memory, traffic and time of a run.

Exits with 0 where the run fits, 1 where it does not, 2 for impossible words.
"""

import sys

from longmix import startup
from longmix.command_line.catalogue import CATALOGUE
from longmix.command_line.program import is_console
from longmix.errors import ConfigError, LongmixError

DOES_NOT_FIT = 1
COMMAND = CATALOGUE["plan"]


def main(words: list[str] | None = None) -> int:
    """Print the plan, write it where asked to, and return the exit code."""
    words = sys.argv[1:] if words is None else words
    if not words:
        print(f"ConfigError: there is nothing to plan; give at least one word.\n\n{_usage()}", file=sys.stderr)
        return ConfigError.exit_code
    try:
        if set(words) & {"-h", "--help"}:
            print(_help(words))
            return 0
        return _run(words)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _usage() -> str:
    """The table of this command's words, by the names of what was called."""
    text = COMMAND.help() + "\nExits with 0 where the run fits, 1 where it does not, 2 for impossible words."
    if is_console():
        return text
    return text.replace("longmix plan", "python -m longmix.planning").replace("longmix train", "python train.py")


def _help(words: list[str]) -> str:
    """The help of this command, or on the words that are asked about."""
    from longmix import cli
    from longmix.command_line.schema import Schema, configs_folder

    own = {word.name for word in COMMAND.words}
    asked = [word for word in words if word.partition("=")[0] not in own]
    if not [word for word in asked if not word.startswith("-")]:
        return _usage()
    cli.register()
    schema = Schema("train", configs_folder())
    schema.search(asked)
    return cli.answered(schema, asked) or ""


def _run(words: list[str]) -> int:
    from rich.console import Console

    from longmix.allocation import allocation_errors
    from longmix.files import check_folder, replace_json, storage_errors
    from longmix.paths import user_path
    from longmix.planning import arguments, report
    from longmix.planning.plan import Planner, single_changes, smallest_change

    folder = arguments.divided(words)[0].get("output")
    output = None if folder is None else user_path("output", folder)
    if output is not None:
        check_folder(output)
    with allocation_errors("this model", "give smaller sizes."):
        planners = [Planner(request) for request in arguments.read_stages(words)]
        planned = [planner.plan() for planner in planners]
        dearest = max(range(len(planned)), key=lambda number: planned[number].memory.total)
        planner, plan = planners[dearest], planned[dearest]
        fits = plan.memory.fits
        change = None if fits else smallest_change(planner)
        singles = [] if fits else single_changes(planner)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    if len(planned) > 1:
        console.print(report.stages(planners, planned, dearest))
    console.print(report.shown(planner, plan, change, singles))
    if output is not None:
        with storage_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        plans = report.lengths(planner)
        found = report.as_json(planner, plan, change, singles, plans)
        if len(planned) > 1:
            found["stages"] = [one.report(each) for one, each in zip(planners, planned, strict=True)]
        replace_json(output / "plan.json", found)
        report.draw(planner, plans, output / "plan.png")
        console.print(f"wrote {output / 'plan.json'} and {output / 'plan.png'}", soft_wrap=True)
    return 0 if fits else DOES_NOT_FIT


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
