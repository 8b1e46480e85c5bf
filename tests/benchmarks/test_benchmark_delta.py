"""`python -m benchmarks.delta`, on sizes that take no time."""

import json
import sys

import pytest

from benchmarks import delta as benchmark
from benchmarks import results

TINY = ("--device", "cpu", "--heads", "2", "--key-dim", "16", "--value-dim", "24", "--seconds", "0.001")
OURS = ["rwkv7", "gated-delta", "kda", "gla"]
NAIVE = ["dplr-naive", "dplr-naive-16", "dplr-naive-32", "dplr-naive-64"]


@pytest.fixture
def run(tmp_path, capsys):
    """`run("--lengths", "64")` is the command: its exit code, what it printed, and its JSON."""

    def command(*arguments):
        code = benchmark.main([*TINY, *arguments, "--out", str(tmp_path / "results")])
        files = sorted((tmp_path / "results").glob("*.json"))
        return code, capsys.readouterr(), json.loads(files[-1].read_text())

    return command


def test_a_run_leaves_table_picture_and_records(run, tmp_path):
    pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive", reason="an optional peer")
    code, printed, content = run("--lengths", "128", "64")
    assert code == 0 and content["benchmark"] == "delta"
    expected = [(way, length, name) for way in ("fwd", "fwd+bwd") for length in (64, 128) for name in (*OURS, *NAIVE)]
    assert [(r["pass"], r["length"], r["provider"]) for r in content["results"]] == expected
    for record in content["results"]:
        took, tokens = record["median_ms"], 2 * record["length"]
        products = (2 if record["provider"] == "gla" else 4) * (1 if record["pass"] == "fwd" else 3)
        assert record["tflops"] == pytest.approx(tokens * 2 * 2 * products * 16 * 24 / took / 1e9)
        assert record["us_per_token"] == pytest.approx(took * 1e3 / tokens)
        assert record["peak_gb"] > 0 and record["moved_gb"] > 0 and record["of_roofline"] is None
        assert record["over_fla"] is None
        assert (record["over_naive"] is not None) == (record["family"] in ("rwkv7", "dplr-naive"))
    fastest = [r for r in content["results"] if r["provider"] == "dplr-naive"]
    for record in fastest:
        alike = [r for r in content["results"] if (r["pass"], r["length"]) == (record["pass"], record["length"])]
        best = min((r for r in alike if r["provider"] in NAIVE[1:]), key=lambda r: r["median_ms"])
        assert record["median_ms"] == best["median_ms"] and record["over_naive"] == 1.0
        assert record["note"] == f"the time of {best['provider']}"
    for kind in ("txt", "png"):
        (file,) = (tmp_path / "results").glob(f"delta_cpu_*.{kind}")
        assert file.stat().st_size > 1000
    assert file.with_suffix(".txt").read_text() in printed.out
    for name in OURS:
        assert f"left out: fla-{name} needs CUDA" in printed.out
    assert "unmeasured  CPU: rwkv7, 4 heads of 64/64, forward + backward, T = 2048, against dplr-naive" in printed.out
    assert content["environment"]["peers"]["fla-core"] is not None


def test_a_length_that_the_peer_does_not_cut(run):
    pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive", reason="an optional peer")
    code, _, content = run("--lengths", "48", "--passes", "fwd", "--providers", "rwkv7", "dplr-naive")
    notes = {r["provider"]: r["note"] for r in content["results"]}
    assert code == 0 and notes["dplr-naive"] == "the time of dplr-naive-16"
    assert notes["dplr-naive-64"] == "skipped: T must be a multiple of the chunk size 64"


@pytest.mark.slow
def test_a_peer_that_is_not_there_is_noted_and_the_others_go_on(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.generalized_delta_rule.dplr.naive", None)
    code, printed, content = run("--lengths", "64", "--passes", "fwd")
    assert code == 0 and [r["provider"] for r in content["results"]] == OURS
    assert "left out: dplr-naive is not installed" in printed.out


def test_what_fails_is_noted_and_the_others_go_on(run, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("this kernel has a bad day")

    monkeypatch.setattr(benchmark.peers, "delta_rule", fail)
    code, printed, content = run("--lengths", "64", "--passes", "fwd", "--providers", *OURS)
    assert code == 1 and "nothing was measured" in printed.err
    assert {r["note"] for r in content["results"]} == {"failed: RuntimeError: this kernel has a bad day"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "'0' is not allowed; allowed are whole numbers above 0"),
        (["--key-dim", "512"], "'512' is not allowed; allowed are whole numbers above 0 up to 256"),
        (["--providers", "mamba"], "invalid choice: 'mamba'"),
        (["--out", __file__], "cannot be a folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_sizes():
    options = benchmark.parse(["--device", "cpu"])
    assert options.lengths == [1024 << power for power in range(7)] and options.dtype == "fp32"
    assert [(s.batch, s.heads, s.key_dim, s.value_dim) for s in benchmark.shapes(options)] == [(2, 4, 64, 64)] * 7


def test_sizes_on_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    options = benchmark.parse(["--device", "cuda"])
    assert options.dtype == "bf16"
    sizes = {s.length: (s.batch, s.heads, s.key_dim, s.value_dim) for s in benchmark.shapes(options)}
    assert sizes[4096] == (8, 64, 64, 64) and sizes[1024] == (32, 64, 64, 64) and sizes[65536] == (1, 64, 64, 64)


CPU, H200 = {"device": "cpu", "dtype": "fp32"}, {"device": "cuda", "device_name": "NVIDIA H200", "dtype": "bf16"}
CPU_PLACE = {"pass": "fwd+bwd", "heads": 4, "key_dim": 64, "dim": 64, "batch": 2}
H200_PLACE = {"pass": "fwd+bwd", "heads": 64, "key_dim": 64, "dim": 64, "batch": 8, "length": 4096}


def records(times, place, **more):
    return [{"provider": name, "median_ms": took, **place, **more} for name, took in times.items()]


def verdicts(device, environment, found):
    return [bar.verdict(found, environment) for bar in benchmark.bars(device)]


@pytest.mark.parametrize(("own", "verdict"), [(1.0, "met"), (1.01, "not met")])
def test_bar_on_a_cpu(own, verdict):
    times = {"rwkv7": own, "dplr-naive-16": 5.0, "dplr-naive-32": 6.0, "dplr-naive-64": 7.0}
    first, *flat = verdicts("cpu", CPU, records(times, CPU_PLACE, length=2048, tokens=4096))
    assert first["verdict"] == verdict and first["against"] == "dplr-naive-16"
    assert len(flat) == 4 and {bar["verdict"] for bar in flat} == {"unmeasured"}
    for change in ({"length": 4096}, {"heads": 8}, {"key_dim": 32}, {"dim": 32}, {"batch": 1}, {"pass": "fwd"}):
        found = records(times, {**CPU_PLACE, "length": 2048, "tokens": 4096, **change})
        assert verdicts("cpu", CPU, found)[0]["verdict"] == "unmeasured"
    del times["dplr-naive-32"]
    first, *_ = verdicts("cpu", CPU, records(times, CPU_PLACE, length=2048, tokens=4096))
    assert first["verdict"] == "unmeasured" and first["lacks"] == ["a time of dplr-naive-32"]


@pytest.mark.parametrize(("last", "verdict"), [(1.35, "met"), (1.36, "not met"), (0.73, "not met")])
@pytest.mark.parametrize("name", OURS)
def test_time_per_token_is_flat(name, last, verdict):
    found = [
        record
        for length in (2048 << power for power in range(6))
        for record in records(
            {name: length * (last if length == 65536 else 1.0)}, CPU_PLACE, length=length, tokens=2 * length
        )
    ]
    (bar,) = [bar for bar in verdicts("cpu", CPU, found) if f" {name}," in bar["bar"] and "spread" in bar]
    assert bar["verdict"] == verdict and results.verdict_lines([bar])[0].startswith(verdict)


def test_bar_on_an_h200():
    for own, verdict in ((4.0, "met"), (4.01, "not met")):
        (bar,) = verdicts("cuda", H200, records({"rwkv7": own, "fla-rwkv7": 10.0}, H200_PLACE))
        assert bar["verdict"] == verdict
    times = {"rwkv7": 1.0, "fla-rwkv7": 10.0}
    for change in ({"batch": 4}, {"length": 2048}, {"heads": 32}, {"pass": "fwd"}):
        assert verdicts("cuda", H200, records(times, H200_PLACE | change))[0]["verdict"] == "unmeasured"
    (bar,) = verdicts("cuda", H200 | {"device_name": "NVIDIA H100"}, records(times, H200_PLACE))
    assert bar["verdict"] == "unmeasured"


def test_speedups_are_against_the_same_inputs():
    names = ("rwkv7", "kda", "gla", "fla-rwkv7", "fla-kda", "dplr-naive-16", "dplr-naive-32")
    families = {name: name.removesuffix("-16").removesuffix("-32") for name in names}
    times = dict(zip(names, (1.0, 2.0, 0.5, 3.0, 8.0, 20.0, 10.0), strict=True))
    place = {"pass": "fwd", "length": 64, "dim": 64, "tokens": 128, "peak_mib": None, "note": ""}
    found = {r["provider"]: r for r in benchmark.complete(records(times, place), families, 64)}
    assert found["rwkv7"]["over_fla"] == 3.0 and found["kda"]["over_fla"] == 4.0 and found["gla"]["over_fla"] is None
    assert found["rwkv7"]["over_naive"] == 10.0 and found["kda"]["over_naive"] is None
    assert found["dplr-naive"]["note"] == "the time of dplr-naive-32"
