"""`python -m benchmarks.attention`, on sizes that take no time."""

import json

import pytest

from benchmarks import attention as benchmark
from benchmarks import attention_providers, results
from benchmarks.comparison import Provider, Workload

TINY = ("--device", "cpu", "--dims", "16", "--heads", "2", "--seconds", "0.001")


@pytest.fixture
def run(tmp_path, capsys):
    """`run("--lengths", "64")` is the command: its exit code, what it printed, and its JSON."""

    def command(*arguments):
        code = benchmark.main([*TINY, *arguments, "--out", str(tmp_path / "results")])
        files = sorted((tmp_path / "results").glob("*.json"))
        return code, capsys.readouterr(), json.loads(files[-1].read_text())

    return command


@pytest.mark.slow
def test_a_run_leaves_table_picture_and_records(run, tmp_path):
    code, printed, content = run("--lengths", "128", "64", "64")
    assert code == 0
    ours = (
        "dense",
        "window",
        "documents",
        "hash-shared",
        "hash-separate",
        "routing",
        "scatterbrain",
        "drop",
        "sink-local",
        "sdpa-flash",
        "sdpa-math",
    )
    expected = [(length, direction, name) for length in (64, 128) for direction in ("fwd", "fwd+bwd") for name in ours]
    assert [(r["length"], r["pass"], r["provider"]) for r in content["results"]] == expected
    for record in content["results"]:
        assert record["note"] == "" and record["repetitions"] >= 3
        assert 0 < record["least_ms"] <= record["low_ms"] <= record["median_ms"] <= record["high_ms"]
        flops = record["pairs"] * 16 * (4 if record["pass"] == "fwd" else 14)
        assert record["tflops"] == pytest.approx(flops / record["median_ms"] / 1e9)
        assert record["peak_mib"] >= 128 * 2 * 16 * 4 / 2**20 * record["length"] / 128
        assert record["of_peak"] is None
        assert ("order_ms" in record) == (record["provider"] in ("hash-shared", "hash-separate", "routing", "drop"))
    fastest = [r for r in content["results"] if r["over_sdpa"] == 1.0 and r["provider"].startswith("sdpa")]
    assert len(fastest) == 4
    assert content["missing"]["fa3"] == "needs CUDA" and "--flex" in content["missing"]["flex"]
    environment = content["environment"]
    assert environment["device"] == "cpu" and environment["dtype"] == "fp32" and environment["torch"]
    for kind in ("txt", "png"):
        (file,) = (tmp_path / "results").glob(f"attention_cpu_*.{kind}")
        assert file.stat().st_size > 1000
    assert (file.with_suffix(".txt")).read_text() in printed.out
    assert "left out: sdpa-cudnn needs CUDA" in printed.out
    assert "unmeasured  CPU: hash-shared" in printed.out
    assert "T = 128, d16, fwd+bwd" in printed.err


def test_a_provider_that_fails_is_noted_and_the_others_go_on(run, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("this kernel has a bad day\nat line 7")

    calls = Workload({"fwd": fail, "fwd+bwd": fail}, {"fwd": 1.0, "fwd+bwd": 1.0})
    every = attention_providers.providers(False)
    every |= {"window": Provider("window", fail), "drop": Provider("drop", lambda shape: calls)}
    monkeypatch.setattr(benchmark, "providers", lambda flex: every)
    code, printed, content = run("--lengths", "64", "--passes", "fwd", "--providers", "dense", "window", "drop")
    dense, *others = content["results"]
    assert code == 0 and dense["median_ms"] > 0 and dense["note"] == ""
    for record in others:
        assert record["note"] == "failed: RuntimeError: this kernel has a bad day"
        assert record["median_ms"] is None and record["over_dense"] is None
    assert printed.out.count("this kernel has a bad day") == 2


def test_what_would_take_too_long_is_noted(run):
    code, printed, content = run(
        "--lengths", "64", "4096", "--passes", "fwd", "--providers", "dense", "sdpa-math", "--limit", "1e-9"
    )
    first, second = content["results"][::2]
    assert first["note"].startswith("skipped: one call took") and second["note"].startswith("skipped: one call would")
    assert "stores all scores" in content["results"][3]["note"]
    assert code == 1 and "nothing was measured" in printed.err and not printed.out


def test_flex_on_the_cpu_has_no_backward_pass(run):
    code, printed, _ = run("--lengths", "64", "--passes", "fwd+bwd", "--providers", "flex", "--flex")
    assert code == 1 and "FlexAttention has no backward pass on the CPU" in printed.err


def test_the_waste_table(run, monkeypatch):
    monkeypatch.setattr(benchmark.work, "WASTE_SIMULATED", {(512, 4): (1.0, 2.0)})
    code, printed, content = run("--waste")
    (row,) = content["results"]
    assert code == 0 and (row["length"], row["buckets"], row["simulated_64"]) == (512, 4, 2.0)
    assert row["waste_128"] > row["waste_64"] > 1 and "waste 128" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "'0' is not allowed; allowed are whole numbers above 0"),
        (["--lengths", "1.5"], "'1.5' is not allowed"),
        (["--dims", "512"], "'512' is not allowed; allowed are whole numbers above 0 up to 256"),
        (["--seconds", "-1"], "'-1' is not allowed; allowed are numbers above 0"),
        (["--limit", "nan"], "'nan' is not allowed"),
        (["--providers", "sdqa"], "invalid choice: 'sdqa'"),
        (["--passes", "bwd"], "invalid choice: 'bwd'"),
        (["--out", __file__], "cannot be a folder"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


PLACE = {"pass": "fwd+bwd", "dim": 128, "length": 16384, "tokens": 65536, "columns": 2048}
RECORDS = [
    {"provider": provider, "median_ms": took, **PLACE}
    for provider, took in {"dense": 10.0, "hash-shared": 1.0, "sdpa-flash": 9.0, "sdpa-cudnn": 7.0, "fa3": 1.0}.items()
]
H200 = {"device": "cuda", "device_name": "NVIDIA H200", "dtype": "bf16"}


def verdicts(device, environment, records=RECORDS):
    bars = [bar for bar in benchmark.bars(device, [128]) if isinstance(bar, results.Bar)]
    return {bar.provider: bar.verdict(records, environment) for bar in bars}


def test_bars_on_an_h200():
    found = verdicts("cuda", H200)
    assert found["dense"]["ratio"] == 0.7 and found["dense"]["against"] == "sdpa-cudnn"
    assert found["dense"]["verdict"] == "not met" and found["dense"]["least"] == 0.8
    assert found["hash-shared"]["ratio"] == 9.0 and found["hash-shared"]["against"] == "sdpa-flash"
    assert found["hash-shared"]["verdict"] == "met" and found["hash-shared"]["least"] == 8
    assert found["hash-separate"]["verdict"] == "unmeasured" and found["hash-separate"]["ratio"] is None


@pytest.mark.parametrize("change", [{"dtype": "fp16"}, {"device_name": "NVIDIA A100"}])
def test_bars_of_an_h200_need_one(change):
    found = verdicts("cuda", H200 | change)
    assert {bar["verdict"] for bar in found.values()} == {"unmeasured"}
    (line,) = results.verdict_lines([found["dense"]])
    assert "0.70x" in line and f"needs {next(iter(change))}" in line


@pytest.mark.parametrize("change", [{"tokens": 32768}, {"columns": 1024}, {"pass": "fwd"}, {"dim": 64}])
def test_bars_of_an_h200_are_about_its_sizes(change):
    found = verdicts("cuda", H200, [record | change for record in RECORDS])
    assert {bar["verdict"] for bar in found.values()} == {"unmeasured"}


def test_a_bar_needs_the_rivals_that_matter():
    found = verdicts("cuda", H200, [record for record in RECORDS if record["provider"] != "sdpa-cudnn"])
    assert found["dense"]["ratio"] == 0.9 and found["dense"]["verdict"] == "unmeasured"
    (line,) = results.verdict_lines([found["dense"]])
    assert line.endswith("0.90x, against sdpa-flash (needs a time of sdpa-cudnn)")


def test_bars_on_a_cpu_of_routing():
    records = [{"provider": name, "median_ms": took, **PLACE} for name, took in (("routing", 2.0), ("sdpa-flash", 9.0))]
    found = verdicts("cpu", {"device": "cpu", "dtype": "fp32"}, records)["routing"]
    assert found["verdict"] == "met" and found["ratio"] == 4.5 and found["least"] == 4.0


def test_bars_on_a_cpu_of_scatterbrain():
    took = {1024: 1.0, 2048: 2.0, 4096: 4.2, 8192: 8.0, 16384: 16.0, 32768: 33.0, 65536: 70.0}
    records = [
        {"provider": "scatterbrain", "median_ms": ms, **PLACE, "length": n, "tokens": n} for n, ms in took.items()
    ]
    records.append({"provider": "sdpa-flash", "median_ms": 80.0, **PLACE})
    cpu = {"device": "cpu", "dtype": "fp32"}
    assert verdicts("cpu", cpu, records)["scatterbrain"]["ratio"] == 5.0
    (bar,) = (bar for bar in benchmark.bars("cpu", [128]) if isinstance(bar, results.FlatBar))
    assert bar.verdict(records, cpu)["verdict"] == "met"
    assert bar.verdict(records[:-2], cpu)["lacks"] == ["times at T = 65536"]


def test_bars_on_a_cpu():
    cpu = {"device": "cpu", "dtype": "fp32"}
    assert verdicts("cpu", cpu)["hash-shared"]["ratio"] == 7.0
    assert verdicts("cpu", cpu)["hash-shared"]["verdict"] == "met"
    shorter = [record | {"length": 8192} for record in RECORDS]
    assert verdicts("cpu", cpu, shorter)["hash-shared"]["verdict"] == "unmeasured"
    edge = [record | {"median_ms": 1.75 if record["provider"] == "hash-shared" else 7.0} for record in RECORDS]
    assert verdicts("cpu", cpu, edge)["hash-shared"]["verdict"] == "met"


@pytest.mark.parametrize(("device", "dtype", "share"), [("NVIDIA H200", "bf16", 989e12), ("NVIDIA H200", "fp32", None)])
def test_peak_is_known_for_an_h200(device, dtype, share):
    assert results.peak_flops({"device_name": device, "dtype": dtype}) == share


def test_sizes_on_cuda_share_out_tokens_and_columns(monkeypatch):
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: True)
    options = benchmark.parse(["--device", "cuda"])
    assert options.dtype == "bf16"
    for shape in benchmark.shapes(options):
        assert shape.batch * shape.length == 65536 and shape.heads * shape.dim == 2048


def test_speedups_are_against_the_same_work():
    records = [
        {"provider": name, "pass": "fwd", "dim": 64, "length": length, "median_ms": took}
        for name, length, took in (("a", 1, 2.0), ("b", 1, 1.0), ("c", 1, None), ("a", 2, 3.0))
    ]
    results.add_speedup(records, "speedup", ("b",))
    assert [record["speedup"] for record in records] == [0.5, 1.0, None, None]


def test_a_table_is_aligned():
    rows = [{"name": "a", "ms": 1234.5}, {"name": "long name", "ms": None}, {"name": "b", "ms": 0.25}]
    text = results.text_table(rows, {"name": "provider", "ms": "ms"})
    assert text == "provider      ms\na          1,234\nlong name      -\nb          0.250"


def test_a_picture_leaves_gaps_where_nothing_was_measured(tmp_path):
    records = [
        {"provider": name, "pass": "fwd", "dim": 64, "length": length, "median_ms": took, "speedup": took}
        for name, length, took in (("a", 64, 1.0), ("a", 128, 2.0), ("b", 64, None))
    ]
    labels = {"speedup": "speedup", "speedup_label": "x"}
    results.draw(tmp_path / "x.png", records, title="t", ours=("a",), **labels)
    assert (tmp_path / "x.png").stat().st_size > 1000
