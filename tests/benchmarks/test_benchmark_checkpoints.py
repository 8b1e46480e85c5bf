"""`python -m benchmarks.checkpoints`, for a small model in one process."""

import json

import pytest

from benchmarks import checkpoints as benchmark


def test_a_run_leaves_table_and_records(tmp_path, capsys):
    words = ["--width", "64", "--layers", "1", "--vocabulary", "11", "--length", "8", "--saves", "2"]
    assert benchmark.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("checkpoints_cpu_*.json")
    content = json.loads(path.read_text())
    assert path.with_suffix(".txt").read_text() in capsys.readouterr().out
    assert [record["way"] for record in content["results"]] == list(benchmark.WAYS)
    state = 3 * 4 * content["parameters"]
    for record in content["results"]:
        assert 0 < record["blocked"] <= record["most"]
        assert record["blocked"] <= record["committed"]
        assert state < sum(record["bytes"]) < 1.2 * state
    assert sorted(left.suffix for left in tmp_path.iterdir()) == [".json", ".txt"], "checkpoints stay behind"


def test_impossible_widths_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--width", "100", "--out", str(tmp_path)])
    assert "multiples of 64" in capsys.readouterr().err
