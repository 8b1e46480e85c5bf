"""Whatever a run's files hold: no traceback, no other run lost, and the reason by name on terminal and page."""

import json
import os
import sys
from pathlib import Path

import pytest
from sweep_folder import write_evaluation, write_needles, write_run

from longmix.reporting import __main__ as command
from longmix.reporting.page import html
from longmix.reporting.panels import panels_of
from longmix.reporting.runs import find_runs

DEEP = "[" * 100_000


SUMMARIES = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"3",
    "deep": DEEP.encode(),
    "not UTF-8": b'{"mixer": "\xff"}',
    "nothing in it": b"{}",
    "other keys": b'{"a": 1}',
}
ENTRIES = {
    "mixer": [None, 3, "", ["flash"], {}],
    "seq_len": [None, "32", 0, -1, 1.5, True, 10**400, float("nan")],
    "parameters": [None, {}, 5, {"total": "many"}, {"total": 0}],
    "tokens": [None, "x", 0],
    "tokens_per_step": [None, 0, "x"],
    "tokens_per_second": [None, "fast", float("nan"), float("inf"), -1, 1e300],
    "training_seconds": [None, [], float("nan")],
    "training_flops_per_token": [None, "x"],
    "validation": [None, [], 3, {"loss": 1.0}, {"loss": "x", "bits_per_byte": 1.0}],
    "validation_by_position": [None, {}, [1], [{"end": 16}], [{"end": 0, "loss": 1.0}]],
    "peak_memory_bytes": ["x", float("nan")],
    "device": [["CPU"]],
    "versions": ["2.13", []],
}


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two runs; tests damage the second one, `bad`."""
    write_run(tmp_path / "good", "flash", 32, 2.0, 500.0)
    write_run(tmp_path / "bad", "rwkv7", 32, 1.0, 900.0)
    return tmp_path


def check(sweep: Path, file: str, good: int = 1) -> str:
    """The page, after the damage has been named and the other run is there; returns the reason."""
    found = find_runs([sweep])
    assert len(found.runs) == good and "good" in [run.label.split("/")[-1] for run in found.runs]
    ((path, reason),) = found.damaged
    assert path == sweep / "bad" / file and reason and "\n" not in reason
    page = html(found, panels_of(found.runs), sweep)
    assert "Damaged and left out" in page and f"bad/{file}" in page
    return reason


@pytest.mark.sampled(3)
@pytest.mark.parametrize("content", SUMMARIES.values(), ids=SUMMARIES)
def test_a_summary_that_is_none(sweep, content):
    (sweep / "bad" / "summary.json").write_bytes(content)
    check(sweep, "summary.json")


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ENTRIES.items() for value in values])
def test_a_summary_with_a_wrong_entry(sweep, key, value):
    path = sweep / "bad" / "summary.json"
    summary = json.loads(path.read_text()) | {key: value}
    if value is None:
        del summary[key]
    path.write_text(json.dumps(summary))
    assert len(check(sweep, "summary.json")) < 200


@pytest.mark.slow
def test_files_that_are_none(sweep):
    path = sweep / "bad" / "summary.json"
    path.unlink()
    os.mkfifo(path)
    check(sweep, "summary.json")
    path.unlink()
    path.mkdir()
    check(sweep, "summary.json")
    path.rmdir()
    path.symlink_to("nowhere")
    check(sweep, "summary.json")


METRICS = {
    "not UTF-8": b"step,train/loss\n1,\xff\xfe\n",
    "NUL": b"step,train/loss\n1,2\x00\n",
    "no step": b"train/loss\n1\n",
    "steps that are no numbers": b"step,train/loss\nnan,1\ninf,2\n-,3\n",
    "a field without end": b'step,train/loss\n1,"' + b"x" * 200_000,
    "more cells than names": b"step,train/loss\n1,2,3,4\n",
    "infinite": b"step,train/loss,throughput/tokens_per_second\n1,inf,0\n2,nan,nan\n3,1e400,-5\n",
    "empty": b"",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("content", METRICS.values(), ids=METRICS)
def test_metrics_of_any_kind(sweep, content):
    (sweep / "bad" / "metrics.csv").write_bytes(content)
    found = find_runs([sweep])
    assert len(found.runs) == 2 and all(path.name == "metrics.csv" for path, _ in found.damaged)
    page = html(found, panels_of(found.runs), sweep)
    assert ">1.000 bits/byte<" in page, "its summary is whole"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "content", [b"a: &a [x]\nb: *a\n", b"[1]", b"a: [", b"\xff", b"", b"data: 3\nmodel: [1]\n", b"3: {4: 5}\n"]
)
def test_a_configuration_of_any_kind(sweep, content):
    (sweep / "bad" / "config.yaml").write_bytes(content)
    found = find_runs([sweep])
    assert len(found.runs) == 2 and all(path.name == "config.yaml" for path, _ in found.damaged)
    html(found, panels_of(found.runs), sweep)


RESULTS = {
    "causality": [{}, {"step": 1}, {"step": 1, "causal": "yes"}, {"step": "x", "causal": True}, []],
    "accuracy": [
        {"step": 1},
        {"step": 1, "data": 3, "lengths": {}},
        {"step": 1, "data": "x", "lengths": []},
        {"step": 1, "data": "x", "lengths": {"a": {"accuracy": 1}}},
        {"step": 1, "data": "x", "lengths": {"0": {"accuracy": 1}}},
        {"step": 1, "data": "x", "lengths": {"8": {"accuracy": 7}}},
        {"step": 1, "data": "x", "lengths": {"8": {"accuracy": float("nan")}}},
        {"step": 1, "data": "x", "lengths": {"8": 3}},
        {"step": 1, "data": "x", "own_data": False, "lengths": {"8": {"accuracy": 1}}},
    ],
    "needle": [
        {"step": 1},
        {"step": 1, "cells": []},
        {"step": 1, "cells": [{}], "trained_seq_len": 8, "needles": 1},
        {"step": 1, "cells": [{"depth": 0, "seq_len": 8, "accuracy": 1, "gain": "x"}]},
        {
            "step": 1,
            "cells": [{"depth": d, "seq_len": 8 + d, "accuracy": 1, "gain": 0} for d in (0, 1)],
            "trained_seq_len": 8,
            "needles": 1,
        },
    ],
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("task", "content"), [(task, content) for task in RESULTS for content in RESULTS[task]])
def test_a_result_that_is_none(sweep, task, content):
    write_needles(sweep / "good", [32], [0.0], [[0.5]])
    write_evaluation(sweep / "bad", f"{task}_step1")
    (sweep / "bad" / "evaluation" / f"{task}_step1.json").write_text(json.dumps(content))
    assert len(check(sweep, f"evaluation/{task}_step1.json", good=2)) < 200


class TestUnfinished:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda run, summary: (run / "summary.json").unlink(), id="no summary"),
            pytest.param(lambda run, summary: write(run, summary | {"validation": {}}), id="no last validation"),
            pytest.param(
                lambda run, summary: write(
                    run, summary | {"steps": 30, "validation": summary["validation"] | {"step": 20}}
                ),
                id="the last validation is of an earlier step",
            ),
            pytest.param(
                lambda run, summary: write(run, summary | {"tokens": 20_000}), id="going on after an earlier end"
            ),
        ],
    )
    def test_last_figures_on_terminal_and_page(self, sweep, make, monkeypatch, capsys):
        run = sweep / "bad"
        make(run, json.loads((run / "summary.json").read_text()))
        monkeypatch.setattr(sys, "argv", ["longmix.reporting", str(sweep)])
        assert command.main() == 0
        figures = "step 30, train 4.0000 bits/byte at step 30, validation 1.0333 bits/byte at step 30"
        assert f"not finished: {run}: {figures}\n" in capsys.readouterr().out
        page = (sweep / "report.html").read_text()
        assert "Not finished: 1 run" in page and figures in page and "1 run, 1 mixer" in page

    def test_alone_they_are_listed_before_the_error(self, sweep, monkeypatch, capsys):
        (sweep / "bad" / "summary.json").unlink()
        (sweep / "good" / "summary.json").write_text("[")
        monkeypatch.setattr(sys, "argv", ["longmix.reporting", str(sweep)])
        assert command.main() == 2
        said = capsys.readouterr()
        assert "not finished:" in said.out and "damaged, left out:" in said.out
        assert said.err.startswith(f"DataError: no finished run at or below {sweep}: none has a summary.json that can")
        assert not (sweep / "report.html").exists()


def write(run: Path, summary: dict) -> None:
    (run / "summary.json").write_text(json.dumps(summary))
