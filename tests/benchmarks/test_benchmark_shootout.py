"""The shoot-out: which runs follow from those before, and what its table and picture show."""

import pytest

from benchmarks import shootout
from benchmarks.shootout import Point

BITS = {0.5: 3.0, 1.0: 2.0, 2.0: 2.5, 4.0: 2.6}


def options_of(*words):
    return shootout.parse([*words, "--check", "--length", "64", "--longer", "128", "--step-tokens", "128"])


def record_of(point, bits):
    rows = [{"end": end, "loss": 1.0} for end in (16, point.length)]
    facts = {"arm": point.name, "bits_per_byte": bits, "by_position": rows, "needle_gain": 0.25, "state_bytes": 64}
    facts["beyond"] = {str(n * point.length): {"bits_per_byte": bits + n, "by_bucket": rows} for n in (2, 4)}
    return facts | {"parameters": 1000, "tokens_per_second": 7.0, "seconds": 60.0, "peak_memory_bytes": 2**30}


def carried_out(options, bits):
    """All records, as a run makes them; `bits` gives bits/byte by model and factor."""
    records, points = [], shootout.first_points(options)
    while points:
        records += [record_of(point, bits[point.model][point.factor] + 0.01 * point.seed) for point in points]
        known = {record["arm"] for record in records}
        points = [point for point in shootout.following(records, options) if point.name not in known]
    return records


def test_seeds_and_lengths_follow_the_best_factor():
    options = options_of("flash")
    found = [Point.of(record) for record in carried_out(options, {"flash": BITS})]
    assert found[:3] == [Point("flash", factor, 64, 0) for factor in (0.5, 1.0, 2.0)]
    assert found[3:] == [Point("flash", 1.0, 64, 1), Point("flash", 1.0, 128, 0)]


@pytest.mark.parametrize(("falls", "tried"), [(1, [0.5, 1, 2, 4, 8]), (-1, [0.125, 0.25, 0.5, 1, 2])])
def test_factors_go_on_beyond_the_best_at_the_edge(falls, tried):
    bits = {2.0**power: 2.0 - 0.1 * falls * power for power in range(-9, 9)}
    found = [Point.of(record) for record in carried_out(options_of("flash"), {"flash": bits})]
    assert sorted({point.factor for point in found}) == tried
    assert {point.factor for point in found if point.seed} == {tried[-1] if falls > 0 else tried[0]}


def test_a_model_whose_runs_failed_is_left_out():
    options = options_of("flash", "kda")
    records = [record_of(point, 2.0) for point in shootout.first_points(options) if point.model == "kda"]
    assert {point.model for point in shootout.following(records, options)} == {"kda"}


def test_an_arm_has_the_default_rates_times_its_factor():
    model = "gated_deltanet*3+flash flash.rotary_base=null"
    one, half = (shootout.arm_of(Point(model, factor, 64, 3), options_of(model)).matched()[0] for factor in (1, 0.5))
    for name in shootout.RATES:
        assert half.optimizer.settings[name] == one.optimizer.settings[name] / 2 > 0
    assert (half.seq_len, half.batch_size, half.seed, half.max_tokens) == (64, 2, 3, 3_000_000)
    assert Point.of({"arm": Point(model, 0.5, 64, 3).name}) == Point(model, 0.5, 64, 3)


def test_table_and_picture_have_the_best_model_first():
    options = options_of("flash", "kda")
    records = carried_out(options, {"flash": BITS, "kda": {factor: bits - 1 for factor, bits in BITS.items()}})
    rows = shootout.table(records, options).splitlines()
    assert rows[2] == "| `kda` | 64 | 1 | 1.0050 | 0.0100 | 3.0050 | 5.0050 | 0.25 | 1,000 | 7 | 60 | 1.00 | 64 |"
    assert [row.split(" | ")[:2] for row in rows[2:6]] == [
        [f"| `{m}`", n] for n in ("64", "128") for m in ("kda", "flash")
    ]
    assert rows[-2:] == ["| `kda` | 2.0000 | 1.0000 | 1.5000 |", "| `flash` | 3.0000 | 2.0000 | 2.5000 |"]
    titles = [axes.get_title(loc="left") for axes in shootout.drawn(records, options).axes]
    beyond = ["trained on 64 tokens, read on to 256", "trained on 128 tokens, read on to 512"]
    assert titles == ["64 tokens", "loss by position, 64 tokens", "loss by position, 128 tokens", *beyond]


def test_an_unknown_mixer_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        shootout.main(["flasch"])
    assert ended.value.code == 2 and "flasch" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_are_trained_and_measured(tmp_path):
    small = ["model.d_model=32", "model.num_layers=1"]
    words = [word for setting in small for word in ("--word", setting)]
    words += ["--tokens", "512", "--length", "128", "--longer", "256", "--step-tokens", "256", "--evaluated", "512"]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert shootout.main(["gla", "--factors", "1", "--parameters", "30000", *words, *places]) == 0
    (table,) = (tmp_path / "out").glob("*.md")
    assert [line.split(" | ")[1] for line in table.read_text().splitlines()[2:4]] == ["128", "256"]
