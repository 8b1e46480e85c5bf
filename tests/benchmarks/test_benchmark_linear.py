"""`python -m benchmarks.linear`, on sizes that take no time."""

import json
import sys

import pytest

from benchmarks import linear as benchmark
from benchmarks import results

TINY = ("--device", "cpu", "--heads", "2", "--key-dim", "16", "--value-dim", "24", "--seconds", "0.001")
OURS = ["exp", "sig", "decay"]
NATIVE = ["mlstm-native", "mlstm-native-64", "mlstm-native-128"]


@pytest.fixture
def run(tmp_path, capsys):
    """`run("--lengths", "64")` is the command: its exit code, what it printed, and its JSON."""

    def command(*arguments):
        code = benchmark.main([*TINY, *arguments, "--out", str(tmp_path / "results")])
        files = sorted((tmp_path / "results").glob("*.json"))
        return code, capsys.readouterr(), json.loads(files[-1].read_text())

    return command


def test_a_run_leaves_table_picture_and_records(run, tmp_path):
    pytest.importorskip("mlstm_kernels.torch", reason="an optional peer")
    code, printed, content = run("--lengths", "256", "128")
    assert code == 0
    expected = [
        (direction, length, name)
        for direction in ("fwd", "fwd+bwd")
        for length in (128, 256)
        for name in (*OURS, *NATIVE, "sdpa-flash")
    ]
    assert [(r["pass"], r["length"], r["provider"]) for r in content["results"]] == expected
    for record in content["results"]:
        took, tokens = record["median_ms"], 2 * record["length"]
        assert 0 < record["least_ms"] <= record["low_ms"] <= took <= record["high_ms"] and record["repetitions"] >= 3
        assert record["us_per_token"] == pytest.approx(took * 1e3 / tokens)
        assert record["peak_gb"] == pytest.approx(record["peak_mib"] * 2**20 / 1e9) and record["peak_gb"] > 0
        assert record["over_sdpa"] > 0 and record["over_mlstm"] > 0 and record["over_gla"] is None
        if record["provider"] != "sdpa-flash":
            flops = tokens * 2 * 16 * 24 * (4 if record["pass"] == "fwd" else 12)
            assert record["tflops"] == pytest.approx(flops / took / 1e9)
            assert record["moved_gb"] > 0 and record["of_roofline"] is None
    fastest = [r for r in content["results"] if r["provider"] == "mlstm-native"]
    assert len(fastest) == 4
    for record in fastest:
        alike = [r for r in content["results"] if (r["pass"], r["length"]) == (record["pass"], record["length"])]
        best = min((r for r in alike if r["provider"] in NATIVE[1:]), key=lambda r: r["median_ms"])
        assert record["median_ms"] == best["median_ms"] and record["chunk_size"] == best["chunk_size"]
        assert record["note"] == f"the time of {best['provider']}" and record["over_mlstm"] == 1.0
    for kind in ("txt", "png"):
        (file,) = (tmp_path / "results").glob(f"linear_cpu_*.{kind}")
        assert file.stat().st_size > 1000
    assert file.with_suffix(".txt").read_text() in printed.out
    assert (
        "left out: mlstm-xl-sig needs CUDA" in printed.out and "of roofline" not in printed.out.split("ms: median")[0]
    )
    assert "unmeasured  CPU: exp, 4 heads of 64/128, forward + backward, T = 4096" in printed.out
    assert content["environment"]["peers"]["mlstm-kernels"] is not None


def test_chunk_sizes(run, tmp_path):
    pytest.importorskip("mlstm_kernels.torch", reason="an optional peer")
    arguments = "--chunk-sizes", "64", "32", "--lengths", "96", "--passes", "fwd"
    code, _, content = run(*arguments, "--providers", "sig", "mlstm-native", "sdpa-flash")
    notes = {r["provider"]: r["note"] for r in content["results"]}
    names = ["sig", "sig-32", "sig-64", "mlstm-native", "mlstm-native-32", "mlstm-native-64", "sdpa-flash"]
    assert code == 0 and list(notes) == names
    assert notes["mlstm-native-64"] == "skipped: T must be a multiple of the chunk size 64"
    assert notes["mlstm-native"] == "the time of mlstm-native-32"
    assert [r["chunk_size"] for r in content["results"][:3]] == [None, 32, 64]
    assert next((tmp_path / "results").glob("*.png")).stat().st_size > 1000


def test_chunk_sizes_are_compared_at_one_length():
    options = benchmark.parse([*TINY, "--chunk-sizes", "64"])
    assert options.lengths == [8192] and options.heads == 2
    assert benchmark.parse(["--device", "cpu"]).lengths == [512 << power for power in range(8)]


@pytest.mark.slow
def test_a_peer_that_is_not_there_is_noted_and_the_others_go_on(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlstm_kernels.torch", None)
    code, printed, content = run("--lengths", "64", "--passes", "fwd")
    assert code == 0 and [r["provider"] for r in content["results"]] == [*OURS, "sdpa-flash"]
    assert all(r["median_ms"] > 0 and r["over_mlstm"] is None for r in content["results"])
    assert content["missing"]["mlstm-native"].startswith("is not installed")
    assert "left out: mlstm-native is not installed" in printed.out


def test_what_fails_is_noted_and_the_others_go_on(run, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("this kernel has a bad day\nat line 7")

    monkeypatch.setattr(benchmark.peers, "linear_attention", fail)
    code, printed, content = run("--lengths", "64", "--passes", "fwd", "--providers", "sig", "sdpa-flash")
    failed, other = content["results"]
    assert code == 0 and other["median_ms"] > 0
    assert failed["note"] == "failed: RuntimeError: this kernel has a bad day" and failed["us_per_token"] is None
    code, printed, _ = run("--lengths", "64", "--passes", "fwd", "--providers", "sig")
    assert code == 1 and "nothing was measured" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "'0' is not allowed; allowed are whole numbers above 0"),
        (["--key-dim", "1024"], "'1024' is not allowed; allowed are whole numbers above 0 up to 512"),
        (["--value-dim", "x"], "'x' is not allowed"),
        (["--chunk-sizes", "48"], "'48' is not allowed; allowed are powers of two from 16 to 1024"),
        (["--chunk-sizes", "8"], "'8' is not allowed"),
        (["--chunk-sizes", "auto"], "'auto' is not allowed"),
        (["--providers", "mamba"], "invalid choice: 'mamba'"),
        (["--passes", "bwd"], "invalid choice: 'bwd'"),
        (["--limit", "0"], "'0' is not allowed; allowed are numbers above 0"),
        (["--out", __file__], "cannot be a folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_sizes_on_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    options = benchmark.parse(["--device", "cuda", "--heads", "8", "--key-dim", "256", "--value-dim", "512"])
    assert options.dtype == "bf16" and len(list(benchmark.shapes(options))) == 8
    for shape in benchmark.shapes(options):
        assert shape.batch * shape.length == 65536 and (shape.heads, shape.key_dim, shape.value_dim) == (8, 256, 512)
    options = benchmark.parse(["--device", "cuda"])
    assert (options.heads, options.key_dim, options.value_dim) == (16, 128, 256)


CPU, H200 = {"device": "cpu", "dtype": "fp32"}, {"device": "cuda", "device_name": "NVIDIA H200", "dtype": "bf16"}
CPU_PLACE = {"pass": "fwd+bwd", "heads": 4, "key_dim": 64, "dim": 128, "batch": 2}
H200_PLACE = {"pass": "fwd+bwd", "heads": 16, "key_dim": 128, "dim": 256, "tokens": 65536, "length": 8192}


def records(times, place, **more):
    return [{"provider": name, "median_ms": took, **place, **more} for name, took in times.items()]


def verdicts(device, environment, found):
    return [(bar["verdict"], bar) for bar in (bar.verdict(found, environment) for bar in benchmark.bars(device))]


def test_bars_on_a_cpu():
    times = {"exp": 1.0, "sig": 0.5, "mlstm-native-64": 5.0, "mlstm-native-128": 3.0}
    found = verdicts("cpu", CPU, [r for n in (4096, 16384) for r in records(times, CPU_PLACE, length=n, tokens=2 * n)])
    assert [(verdict, bar["ratio"], bar["least"]) for verdict, bar in found[:4]] == [
        ("met", 3.0, 2.0),
        ("not met", 3.0, 4.0),
        ("met", 6.0, 2.0),
        ("met", 6.0, 4.0),
    ]
    assert all(bar["against"] == "mlstm-native-128" for _, bar in found[:4])
    assert {verdict for verdict, _ in found[4:]} == {"unmeasured"}
    del times["mlstm-native-64"]
    (verdict, bar), *_ = verdicts("cpu", CPU, records(times, CPU_PLACE, length=4096, tokens=8192))
    assert verdict == "unmeasured" and bar["lacks"] == ["a time of mlstm-native-64"]


@pytest.mark.parametrize(("last", "verdict"), [(1.35, "met"), (1.36, "not met"), (0.8, "met"), (0.73, "not met")])
def test_time_per_token_is_flat(last, verdict):
    """Within 15 % of a middle: the longest at most 1.15 / 0.85 of the shortest."""
    lengths = [2048 << power for power in range(6)]
    found = [
        record
        for length in lengths
        for record in records(
            {"sig": length * (last if length == 65536 else 1.0)}, CPU_PLACE, length=length, tokens=2 * length
        )
    ]
    bar = next(bar for _, bar in verdicts("cpu", CPU, found) if "spread" in bar and " sig" in bar["bar"])
    assert bar["verdict"] == verdict
    assert bar["spread"] == pytest.approx(abs(last - 1) / (last + 1))
    assert results.verdict_lines([bar])[0].endswith(f"to 65536 within +-15%: +-{bar['spread']:.1%}")
    bar = next(bar for _, bar in verdicts("cpu", CPU, found[1:]) if "spread" in bar and " sig" in bar["bar"])
    assert bar["verdict"] == "unmeasured" and bar["lacks"] == ["times at T = 2048"]


def test_bars_on_an_h200():
    times = {"sig": 6.0, "mlstm-xl-sig-128": 12.0, "mlstm-xl-sig-256": 11.0, "simple-gla": 7.0}
    (first, mlstm), (second, gla) = verdicts("cuda", H200, records(times, H200_PLACE))
    assert (first, mlstm["against"], second, gla["against"]) == ("met", "mlstm-xl-sig-256", "not met", "simple-gla")
    edge = times | {"sig": 5.95, "mlstm-xl-sig-128": 10.0, "mlstm-xl-sig-256": 9.92}
    assert [verdict for verdict, _ in verdicts("cuda", H200, records(edge, H200_PLACE))] == ["met", "met"]
    for change in ({"tokens": 32768}, {"heads": 8}, {"key_dim": 256}, {"length": 4096}, {"pass": "fwd"}):
        found = verdicts("cuda", H200, records(times, H200_PLACE | change))
        assert {verdict for verdict, _ in found} == {"unmeasured"}
    found = verdicts("cuda", H200 | {"device_name": "NVIDIA H100"}, records(times, H200_PLACE))
    assert {verdict for verdict, _ in found} == {"unmeasured"}


def test_speedups_on_cuda_are_against_the_same_kind():
    names = ("exp", "sig", "mlstm-xl-exp-128", "mlstm-xl-exp-256", "mlstm-xl-sig-128", "simple-gla")
    families = {name: name.removesuffix("-128").removesuffix("-256") for name in names}
    times = dict(zip(names, (2.0, 1.0, 8.0, 6.0, 5.0, 4.0), strict=True))
    place = {"pass": "fwd", "length": 64, "dim": 256, "tokens": 128, "peak_mib": None, "note": ""}
    found = {r["provider"]: r for r in benchmark.complete(records(times, place), families, 128)}
    assert found["exp"]["over_mlstm"] == 3.0 and found["sig"]["over_mlstm"] == 5.0
    assert found["mlstm-xl-exp"]["note"] == "the time of mlstm-xl-exp-256"
    assert found["sig"]["over_gla"] == 4.0 and found["sig"]["over_sdpa"] is None


def test_the_roofline_is_known_for_an_h200():
    environment = {"device_name": "NVIDIA H200", "dtype": "bf16"}
    assert results.peak_bytes(environment) == 4.8e12
    assert results.peak_bytes(environment | {"dtype": "fp32"}) is None
