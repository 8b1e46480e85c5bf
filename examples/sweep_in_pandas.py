"""A sweep as a table of pandas (pip install pandas): python examples/sweep_in_pandas.py [WORD=VALUE...]."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas

import longmix


def runs_of(folder: Path) -> pandas.DataFrame:
    """One row for each finished run below a folder, such as multirun/DATE."""
    paths = sorted(folder.rglob("summary.json"))
    return pandas.json_normalize([json.loads(path.read_text(encoding="utf-8")) for path in paths])


def curves_of(folder: Path) -> pandas.DataFrame:
    """What every run logged (logger=csv): one row for each step that it logged."""
    return pandas.concat({path.parent.name: pandas.read_csv(path) for path in sorted(folder.rglob("metrics.csv"))})


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        for mixer in ("flash", "retention"):
            words = [f"mixer={mixer}", "seq_len=64", "max_steps=20", "loop.log_every=5", "logger=csv", *sys.argv[1:]]
            longmix.train(words, folder=Path(name) / mixer)
        runs = runs_of(Path(name))
        print(runs[["name", "mixer", "parameters.total", "validation.bits_per_byte"]].to_string(index=False))
        print(curves_of(Path(name)).groupby(level=0).size().to_string())
