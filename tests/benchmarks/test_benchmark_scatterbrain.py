"""`python -m benchmarks.scatterbrain`, on sizes that take no time."""

import json

import pytest
import torch

from benchmarks import scatterbrain as benchmark

TINY = ("--length", "128", "--block", "8", "--dim", "8", "--heads", "2", "--draws", "3")


def test_a_run_leaves_table_picture_and_records(tmp_path, capsys):
    folder = tmp_path / "results"
    assert benchmark.main([*TINY, "--radii", "1", "0.25", "--features", "8", "128", "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    (path,) = folder.glob("scatterbrain_cpu_*.json")
    content = json.loads(path.read_text())
    assert path.with_suffix(".txt").read_text() in printed and path.with_suffix(".png").stat().st_size > 1000
    records = content["results"]
    methods = [("local", 0), ("performer", 8), ("scatterbrain", 8), ("performer", 128), ("scatterbrain", 128)]
    expected = [(kind, radius, *method) for kind in benchmark.KEPT for radius in (0.25, 1.0) for method in methods]
    assert [(r["tokens"], r["radius"], r["method"], r["features"]) for r in records] == expected
    assert all(0 < r["low"] <= r["error"] <= r["high"] for r in records)
    errors = {row[1:]: r["error"] for row, r in zip(expected, records, strict=True) if r["tokens"] == "independent"}
    for radius in (0.25, 1.0):
        own = errors[radius, "scatterbrain", 128]
        assert own < errors[radius, "performer", 128] and own < errors[radius, "scatterbrain", 8]
        assert own < 0.5 * errors[radius, "local", 0]
    assert errors[0.25, "scatterbrain", 128] < errors[1.0, "scatterbrain", 128]


def test_neighbours_are_alike_where_they_are_said_to_be():
    options = benchmark.parse(["--length", "500", "--dim", "16", "--heads", "1"])
    for kind, kept in benchmark.KEPT.items():
        query, key, value = benchmark.drawn(kind, options, 0)
        for x in (query, key):
            assert torch.allclose(x.norm(dim=-1), torch.ones(1, 500, 1, dtype=torch.float64))
            assert (x[:, 1:] * x[:, :-1]).sum(-1).mean().item() == pytest.approx(kept, abs=0.05)
        assert value.square().mean().item() == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "7"], "--features [7] has odd numbers; allowed are even ones"),
        (["--radii", "0"], "'0' is not allowed; allowed are numbers above 0 up to 64"),
        (["--out", __file__], "cannot be a folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
