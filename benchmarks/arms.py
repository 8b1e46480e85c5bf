"""Runs of a comparison, one after another: each is a folder of its own, and one that is finished is not repeated.

A run that was broken off goes on from its last checkpoint. `results.json` in the folder of all arms is written anew
after each, so that what is measured can be read while the rest goes on.
"""

import argparse
import contextlib
import hashlib
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import longmix
from benchmarks import results
from benchmarks.command import RESULTS, Parser, progress
from benchmarks.results import Record
from longmix.composing import composed
from longmix.config import ModelConfig, TrainConfig, read
from longmix.errors import DataError, Interrupted, LongmixError
from longmix.model.matching import count_parameters, match_parameters
from longmix.training.run import check_config

Examine = Callable[[longmix.Loaded, Path], Record]
"""What is measured of a trained model; the folder is for what evaluations write."""

ALWAYS = ("logger=csv", "trainer=cpu", "loop.validate_every=null")
RECORD = "record.json"


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        name: of the arm, one of a kind in its comparison.
        words: of `longmix train`.
    """

    name: str
    words: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Its folder's name: other words are another folder."""
        digest = hashlib.sha256("\n".join(self.words).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '_', self.name)}-{digest}"

    def matched(self) -> tuple[TrainConfig, int]:
        """The configuration, with the width that `match.parameters` chooses, and the model's number of parameters.

        Raises:
            ConfigError: no width meets the number, or a word is not allowed.
        """
        config = read(TrainConfig, composed("train", list(self.words)).content)
        vocabulary = check_config(config)[1].expected_vocab_size
        config = match_parameters(config, vocabulary)
        return config, count_parameters(config, vocabulary)


def words_of(model: str) -> list[str]:
    """The words of a mixer or a pattern and its settings, as of `gated_deltanet*3+flash flash.rotary_base=null`."""
    name, *given = model.split()
    return [f"mixer={name}", *(f"mixer.{setting}" for setting in given)]


def add_options(parser: Parser, name: str) -> None:
    """Add the options that all comparisons of arms have."""
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="each arm is run with each")
    add("--runs", type=Path, default=Path("runs") / name, help="folder of the arms; what is there goes on")
    add("--known", type=Path, nargs="+", default=[], metavar="JSON", help="results whose arms are not run again")
    add("--word", action="append", default=[], help="a further word of training, such as data.cache_dir=FOLDER")
    add("--check", action="store_true", help="find every model's width, take no step, write nothing")
    add("--name", default=name, help="of the files")
    add("--out", type=Path, default=RESULTS, help="folder for JSON, table and picture")


def run(arm: Arm, folder: Path, examine: Examine, asked: Record) -> Record:
    """What is measured of an arm, which is trained if it is not; `asked` is what `examine` depends on."""
    place = folder / arm.folder
    kept = place / RECORD
    same = {"words": list(arm.words), "asked": asked}
    if kept.exists():
        found: Record = json.loads(kept.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in same} == same:
            return found
    with contextlib.redirect_stdout(sys.stderr):
        trained = longmix.train([*arm.words, *ALWAYS, "resume=auto"], folder=place)
        facts: Any = trained.summary
        loaded = trained.load(device="cpu")
        measured = examine(loaded, place / "evaluated")
    record = {
        "arm": arm.name,
        **same,
        "parameters": facts["parameters"]["total"],
        "mlp_hidden": ModelConfig.of(loaded.config).model.number("mlp_hidden"),
        "tokens": facts["tokens"],
        "trained_length": loaded.config["seq_len"],
        "seconds": facts["training_seconds"],
        "tokens_per_second": facts["tokens_per_second"],
        "peak_memory_bytes": facts["peak_memory_bytes"],
        **measured,
    }
    results.write_json(kept, record)
    return record


def take_known(arms: Iterable[Arm], options: argparse.Namespace) -> None:
    """Lay down the records of earlier results that are of these arms, where an arm has none.

    Raises:
        DataError: a file cannot be read, or holds no results.
    """
    folders = {arm.words: options.runs / arm.folder for arm in arms}
    for path in options.known:
        try:
            records = json.loads(path.read_text(encoding="utf-8"))["results"]
            found = [
                (folders[tuple(record["words"])], record) for record in records if tuple(record["words"]) in folders
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"--known {path} holds no results of arms: {type(error).__name__}: {error}.") from error
        for folder, record in found:
            if not (folder / RECORD).exists():
                folder.mkdir(parents=True, exist_ok=True)
                results.write_json(folder / RECORD, record)


def run_all(
    arms: Sequence[Arm],
    options: argparse.Namespace,
    examine: Examine,
    asked: Record,
    environment: Record,
    before: Sequence[Record] = (),
) -> tuple[list[Record], list[str]]:
    """Records of `before` and of all arms, and the names of those that failed, whose tracebacks went to standard error.

    Raises:
        Interrupted: a signal asked for the end; the state is saved.
    """
    records = list(before)
    failed: list[str] = []
    with progress(len(arms)) as (announce, finish):
        for arm in arms:
            announce(arm.name)
            began = time.monotonic()
            try:
                records.append(run(arm, options.runs, examine, asked))
            except Interrupted:
                raise
            except Exception:  # hours of other arms are not lost with one
                traceback.print_exc()
                failed.append(arm.name)
            finish(f"{arm.name}: {'FAILED' if arm.name in failed else 'done'}, {time.monotonic() - began:.0f} s")
            content = {"environment": environment, "failed": failed, "results": records}
            results.write_json(options.runs / "results.json", content)
    return records, failed


def check(arms: Iterable[Arm]) -> int:
    """Print each arm's width and number of parameters; 1 if a model cannot be had."""
    rows: list[Record] = []
    for arm in arms:
        row: Record = {"arm": arm.name, "parameters": None, "width": None, "note": ""}
        try:
            config, row["parameters"] = arm.matched()
            row["width"] = config.model.settings["mlp_hidden"]
        except LongmixError as error:
            row["note"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    print(results.text_table(rows, {"arm": "arm", "parameters": "parameters", "width": "mlp_hidden", "note": ""}))
    return int(any(row["note"] for row in rows))


def main(
    arms: Sequence[Arm],
    options: argparse.Namespace,
    examine: Examine,
    asked: Record,
    table: Callable[[Sequence[Record]], str],
    drawn: Callable[[Sequence[Record]], Figure],
    then: Callable[[Sequence[Record]], Sequence[Arm]] = lambda records: (),
) -> int:
    """Check the arms, or run, measure, write and print; 1 if an arm failed.

    Args:
        arms: the first ones.
        options: of the command, with those of `add_options`.
        examine: measures a trained model.
        asked: what `examine` depends on.
        table, drawn: of the records.
        then: the arms that follow from the records so far, those that have run among them.
    """
    if options.check:
        return check(arms)
    environment = results.environment(torch.device("cpu"), "fp32")
    records: list[Record] = []
    failed: list[str] = []
    try:
        options.runs.mkdir(parents=True, exist_ok=True)
        while arms:
            take_known(arms, options)
            records, more = run_all(arms, options, examine, asked, environment, records)
            failed += more
            known = {record["arm"] for record in records} | set(failed)
            arms = [arm for arm in then(records) if arm.name not in known]
    except Interrupted as error:
        print(f"{error}\nThe same command goes on.", file=sys.stderr)
        return error.exit_code
    except DataError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if records:
        plain = {"runs": str(options.runs), "known": [str(path) for path in options.known]}
        written = argparse.Namespace(**{**vars(options), **plain})
        results.leave(options.name, environment, written, records, table, drawn)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    return int(bool(failed))


def mean(records: Sequence[Record], *keys: Any) -> float | None:
    """The mean of a number that lies below these keys; None where a record lacks it."""
    found = []
    for record in records:
        value: Any = record
        for key in keys:
            value = None if value is None else value.get(key)
        found.append(value)
    return None if not found or None in found else sum(found) / len(found)


def spread(records: Sequence[Record], *keys: Any) -> float:
    """The largest of these numbers less the smallest."""
    found = [mean([record], *keys) for record in records]
    numbers = [value for value in found if value is not None]
    return max(numbers) - min(numbers) if numbers else 0.0


def cell(value: float | None, form: str) -> str:
    """A number in a table; "-" where there is none."""
    return "-" if value is None else format(value, form)


def markdown(lines: Sequence[Sequence[str]], texts: int) -> str:
    """A table whose first line is its heads; the first `texts` columns are texts, the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(lines[0]) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
