"""What the pages show, measured again: `python -m benchmarks.reproduce`.

    python -m benchmarks.reproduce                 # names, hours, pages and files
    python -m benchmarks.reproduce mqar            # runs the commands behind it
    python -m benchmarks.reproduce mqar --print    # prints them
    python -m benchmarks.reproduce --check         # whether committed results are there and of these commands

The list is `benchmarks/reproduce.yaml`. A command that fails ends its result. New results lie beside the committed
ones, whose files have the date in their names; of the pages only pictures are replaced, by commands that draw them.
"""

import argparse
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import Parser
from benchmarks.results import ROOT, Record, text_table
from longmix.errors import ConfigError
from longmix.reading import read_yaml

LIST = Path(__file__).with_suffix(".yaml")

BENCHMARK = re.compile(r"python -m benchmarks\.(\w+)")
RUN_NUMBER = re.compile(r"^\d+,")


@dataclass(frozen=True)
class Result:
    """A table or picture of the pages, and what it takes to measure it again.

    Attributes:
        name: of the result.
        pages: headings that show it, such as "docs/results.md#needles".
        pictures: of these pages, relative to the repository.
        commands: in their order.
        seeds: of the runs.
        hours: on two CPU cores; None where nobody noted it.
        versions: of packages at the time; None where nobody noted them.
        files: committed results, relative to the repository.
        missing: what the commands do not give, in words.
    """

    name: str
    pages: list[str]
    pictures: list[str]
    commands: list[str]
    seeds: list[int]
    hours: float | None
    versions: dict[str, str] | None
    files: list[str]
    missing: str | None = None


def read_results(path: Path = LIST) -> dict[str, Result]:
    """The list, by name.

    Raises:
        ConfigError: an entry lacks something, or has what there is not.
    """
    found = {}
    for name, entry in read_yaml(path).items():
        try:
            found[name] = Result(name, **entry)
        except TypeError as error:
            raise ConfigError(f"{path.name}: {name}: {error}.") from error
    return found


def faults(result: Result, results: Mapping[str, Result], root: Path = ROOT) -> list[str]:
    """What is wrong with the files of a result.

    Each file is to be there, to have runs of the result's commands, and none but of these and those of other results
    that name it too.
    """
    found = [f"{path} is missing" for path in (*result.pictures, *result.files) if not (root / path).exists()]
    for path in result.files:
        if (root / path).exists():
            content = json.loads((root / path).read_text(encoding="utf-8"))
            sharing = [command for other in results.values() if path in other.files for command in other.commands]
            strange = _strangers(content, sharing)
            found += [f"{path}: {fault}" for fault in strange]
            if not strange and len(_strangers(content, result.commands)) >= len(_records(content)) > 0:
                found.append(f"{path}: nothing in it is of the commands of {result.name}")
    return found


def _strangers(content: Any, commands: Sequence[str]) -> list[str]:
    """What in a file of results is of none of the commands."""
    if isinstance(content, Mapping) and "settings" in content:
        own = [command for command in commands if BENCHMARK.match(command)]
        reasons = [_differences(content, command) for command in own]
        nearest = min(reasons, key=lambda reason: len(reason), default=["no benchmark is among them"])
        return [] if not nearest else [f"is of no command: {'; '.join(nearest)}"]
    records = _records(content)
    known = [set(words) for command in commands for words in _expanded(command)]
    strange = []
    for record in records:
        words = _words(record, content)
        if words is not None and not any(words <= own for own in known):
            strange.append(f"{' '.join(sorted(words))} is of no command")
    if not records or all(_words(record, content) is None for record in records):
        strange.append("says of no run which words it had")
    return strange


def _records(content: Any) -> list[Record]:
    found: list[Record] = content if isinstance(content, list) else content.get("runs", content.get("results", []))
    return found


def _differences(content: Mapping[str, Any], command: str) -> list[str]:
    """Where the settings of a benchmark's results are not those of a command, in words."""
    program, options, alone = _options(command)
    settings = content["settings"]
    name = options.pop("name", [program])[0]
    found = [] if content["benchmark"] == name else [f"it is of {content['benchmark']} and not of {name}"]
    flags = [option for option, value in settings.items() if value is True]
    found += [f"{flag} was given and is not" for flag in flags if flag not in options]
    for option, values in options.items():
        held, wanted = _flat(settings.get(option)), _flat(values or True)  # a flag has no values
        if "=".join(held) != "=".join(wanted):  # pairs of texts are held in two
            found.append(f"{option} was {' '.join(held) or 'not given'} and is {' '.join(wanted)}")
    named = next((_flat(settings[key]) for key in ("mixers", "models", "claims", "parts") if key in settings), [])
    named = [*_flat(settings.get("teacher")), *_flat(settings.get("checkpoint")), *map(str, named)]
    if alone and named != alone:
        found.append(f"it is of {', '.join(named)} and not of {', '.join(alone)}")
    return found


def _options(command: str) -> tuple[str, dict[str, list[str]], list[str]]:
    """A benchmark's name, its options by name, and what stands alone: in front of options, or later with blanks in it.

    An option's first value may have blanks itself.
    """
    program, *rest = shlex.split(command)[2:]
    options: dict[str, list[str]] = {}
    alone: list[str] = []
    current: list[str] = alone
    for part in rest:
        if part.startswith("--"):
            current = options.setdefault(part[2:].replace("-", "_"), [])
        else:
            (alone if " " in part and current else current).append(part)
    return program.removeprefix("benchmarks."), options, alone


def _flat(value: Any) -> list[str]:
    """Values in one list of texts; pairs are written as NAME=VALUE, whole numbers without a point."""
    if isinstance(value, list | tuple):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
            return [f"{value[0]}={value[1]}"]
        return [text for part in value for text in _flat(part)]
    try:
        return [f"{float(value):g}"]
    except (TypeError, ValueError):
        return [] if value is None else [str(value)]


def _expanded(command: str) -> Iterator[list[str]]:
    """The words of each run of a command that trains: a sweep has one for each combination of its values."""
    parts = shlex.split(command)
    if parts[:2] != ["python", "train.py"]:
        return
    words, sweeps = parts[2:], "-m" in parts
    choices = []
    for word in words:
        key, sign, values = word.partition("=")
        if sign:
            choices.append([f"{key}={value}" for value in (values.split(",") if sweeps else [values])])
    for chosen in itertools.product(*choices):
        yield list(chosen)


def _words(record: Mapping[str, Any], content: Any) -> set[str] | None:
    """The words of a run as its record tells them; None where it does not."""
    if "command" in record:
        return set(shlex.split(record["command"])[2:])
    if "words" in record:
        steps = [] if record.get("max_steps") is None else [f"max_steps={record['max_steps']}"]
        template = shlex.split(content["command"].partition(";")[0])[2:]
        common = [word for word in template if "=" in word and not word.isupper() and not word.endswith("=STEPS")]
        return {*record["words"].split(), *steps, *common}
    if "run" in record:
        return {*RUN_NUMBER.sub("", record["run"]).split(","), f"max_tokens={record['tokens']}"}
    return None


def overview(results: Mapping[str, Result]) -> str:
    """A line for each result."""
    rows: list[Record] = [
        {
            "name": result.name,
            "hours": "-" if result.hours is None else f"{result.hours:g}",
            "commands": len(result.commands),
            "files": len(result.files),
            "pages": ", ".join(result.pages),
        }
        for result in results.values()
    ]
    return text_table(rows, {key: key for key in rows[0]})


def script(result: Result) -> str:
    """The commands as a shell reads them, behind what is known of them."""
    versions = result.versions or {}
    known = [f"{result.name}: {', '.join(result.pages)}", f"seeds {', '.join(map(str, result.seeds)) or 'none'}"]
    known.append("hours on two CPU cores not noted" if result.hours is None else f"{result.hours:g} h on two CPU cores")
    known.append(", ".join(f"{name} {version}" for name, version in versions.items()) or "versions not noted")
    known += [f"leaves what is in {path}" for path in result.files]
    known += [] if result.missing is None else [f"does not give {result.missing}"]
    return "\n".join([*(f"# {line}" for line in known), *result.commands])


def run(result: Result) -> int:
    """Run the commands; the exit code of the first that fails, or 0."""
    for number, command in enumerate(result.commands, 1):
        print(f"[{number}/{len(result.commands)}] {command}", file=sys.stderr, flush=True)
        code = subprocess.run(command, shell=True, cwd=ROOT, check=False).returncode
        if code:
            print(f"{result.name}: exit code {code}; the rest is left out", file=sys.stderr)
            return code
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """List, print, check or run."""
    results = read_results()
    parser = Parser(prog="python -m benchmarks.reproduce", description="What the pages show, measured again.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(results)}")
    parser.add_argument("--print", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--check", action="store_true", help="check the committed files; of all without a name")
    options: argparse.Namespace = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in results]:
        parser.error(f"there is no result {', '.join(unknown)}; there are {', '.join(results)}")
    chosen = {name: results[name] for name in options.names or results}
    if options.check:
        found = [f"{name}: {fault}" for name, result in chosen.items() for fault in faults(result, results)]
        print("\n".join(found) if found else f"{len(chosen)} results, all files in place and of their commands")
        return int(bool(found))
    if not options.names:
        print(overview(results))
        return 0
    if options.print:
        print("\n\n".join(script(result) for result in chosen.values()))
        return 0
    return next((code for result in chosen.values() if (code := run(result))), 0)


if __name__ == "__main__":
    sys.exit(main())
