"""The GPU command: what it plans, how it survives crashes and cut-offs, and what it makes of results; without a GPU."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.comparison import FORWARD, TRAINING
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, engine_calls, speed, training, tuning
from benchmarks.gpu.case import CRASHED, FAILED, LATE, PASSED, SKIPPED, Case, CheckFailed, Result, ended
from benchmarks.gpu.catalogue import MIXERS, PARALLEL, SHARES, STAGES, every_case
from benchmarks.gpu.journal import FILE, Journal
from benchmarks.gpu.pool import Pool
from benchmarks.gpu.summary import PATCH, summarised, summary_text, write_summary

ROOT = Path(__file__).parents[2]
H200 = {"device": "cuda", "device_name": "NVIDIA H200", "dtype": "bf16", "torch": "2", "triton": "3", "threads": 1}
H200 |= {"commit": None, "uncommitted_changes": False, "date": "2026-11-29T00:00:00+00:00"}


def case(name: str, action: str, **settings) -> Case:
    return Case("correctness", name, f"gpu_actions.{action}", settings, 0.0, 100.0)


class TestPlan:
    def test_every_case_has_a_name_of_its_own_and_can_end(self):
        cases = every_case("cuda") + tuning.tuning_cases()
        assert len({planned.name for planned in cases}) == len(cases)
        for planned in cases:
            assert planned.name.startswith(planned.stage + "/") and 0 < planned.seconds <= planned.most
            json.dumps(dataclasses.asdict(planned))

    def test_stages_follow_each_other(self):
        shares = [SHARES[stage] for stage in STAGES]
        assert shares == sorted(shares) and shares[-1] == 1.0 and set(PARALLEL) < set(STAGES)

    def test_every_mixer_is_trained_and_watched(self):
        assert set(MIXERS) == {path.stem for path in (ROOT / "configs" / "mixer").glob("*.yaml")}
        names = {planned.name for planned in every_case("cuda")}
        for mixer in MIXERS:
            assert {f"training/{mixer}", f"hazards/waits/{mixer}", f"hazards/compiled/{mixer}"} <= names

    def test_the_plan_is_printed_and_nothing_done(self, tmp_path, capsys):
        assert command.main(["--plan", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert all(f"{stage}: " in printed for stage in STAGES if stage != "tune")
        assert command.main(["--plan", "--tune", "--out", str(tmp_path)]) == 0
        assert capsys.readouterr().out.startswith("tune: ")
        assert list(tmp_path.iterdir()) == []

    def test_peers_that_are_not_installed_are_named(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(command, "PEERS", {"one-that-is": "json", "fla-core": "nothing_of_this_name"})
        command.main(["--plan", "--out", str(tmp_path)])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == "not installed, so nothing is compared with 1 package: fla-core"

    def test_what_cannot_be_is_refused(self, tmp_path, capsys):
        assert command.main(["--out", str(tmp_path), "--only", "nothing"]) == 2
        assert "no case begins with nothing" in capsys.readouterr().err
        if not torch.cuda.is_available():
            assert command.main(["--out", str(tmp_path), "--tune"]) == 2
        (tmp_path / FILE).touch()
        with pytest.raises(SystemExit) as error:
            command.main(["--out", str(tmp_path)])
        assert error.value.code == 2 and "--resume" in capsys.readouterr().err


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGMIX_TEST", "here")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    found = Pool(tmp_path / "workers.log")
    yield found
    found.close()


def run(pool: Pool, cases: list[Case], seconds: float = 200.0, count: int = 1) -> tuple[dict[str, Result], list[str]]:
    found: dict[str, Result] = {}
    left = pool.run(cases, count, time.monotonic() + seconds, lambda result: found.update({result.case: result}))
    return found, [planned.name for planned in left]


class TestPool:
    def test_what_goes_wrong_costs_one_case(self, pool, tmp_path):
        found, left = run(
            pool,
            [
                case("crash", "crash", status=3),
                Case("correctness", "late", "gpu_actions.wait", {"seconds": 60.0}, 0.0, 1.0),
                case("wrong", "fail", text="1 is not 2"),
                case("nothing to do", "skip", text="no such device"),
                case("broken", "break_down"),
                case("environment", "say_where", variable="LONGMIX_TEST"),
            ],
        )
        statuses = {name: result.status for name, result in found.items()}
        assert statuses == {
            "crash": CRASHED,
            "late": LATE,
            "wrong": FAILED,
            "nothing to do": SKIPPED,
            "broken": FAILED,
            "environment": PASSED,
        }
        assert found["crash"].note.endswith("exit code 3") and found["wrong"].note == "1 is not 2"
        assert found["broken"].note.startswith("ZeroDivisionError at gpu_actions.py:")
        assert "of course" in (tmp_path / "workers.log").read_text()
        assert found["environment"].values["LONGMIX_TEST"] == "here" and not left

    def test_what_cannot_end_in_time_does_not_begin(self, pool):
        def planned(name: str, seconds: float) -> Case:
            return Case("correctness", name, "gpu_actions.wait", {"seconds": 0.0}, seconds, 100.0)

        found, left = run(pool, [planned("long", 30.0), planned("short", 0.5)], 20.0)
        assert list(found) == ["short"] and left == ["long"]

    def test_processes_share_the_cases(self, pool):
        found, _ = run(pool, [case(str(n), "say_where", variable="HOME") for n in range(6)], count=2)
        assert len(found) == 6 and 1 <= len({result.values["pid"] for result in found.values()}) <= 2


class TestJournal:
    def test_a_torn_line_is_left_out_and_the_latest_counts(self, tmp_path):
        journal = Journal(tmp_path / FILE)
        journal.begin(H200)
        journal.add(ended(case("a", "wait"), FAILED, 1.0, "wrong"))
        journal.add(ended(case("a", "wait"), PASSED, 1.0))
        journal.add(ended(case("b", "wait"), CRASHED, 1.0))
        with (tmp_path / FILE).open("a") as file:
            file.write('{"case": "c", "stat')
        again = Journal(tmp_path / FILE)
        assert again.is_done("a") and not again.is_done("b") and not again.is_done("c")
        assert again.environments == [H200]

    def test_what_comes_after_a_torn_line_is_read(self, tmp_path):
        (tmp_path / FILE).write_text('{"case": "c", "stat')
        Journal(tmp_path / FILE).add(ended(case("a", "wait"), PASSED, 1.0))
        assert Journal(tmp_path / FILE).is_done("a")


def timed(provider: str, milliseconds: float, **where) -> results.Record:
    return {"provider": provider, "median_ms": milliseconds, "peak_mib": 1.0, "note": "", **where}


class TestSummary:
    @pytest.fixture
    def journal(self, tmp_path):
        journal = Journal(tmp_path / FILE)
        journal.begin(H200)
        where = {"pass": TRAINING, "dim": 128, "length": 16384, "tokens": 65536, "columns": 2048}
        records = [timed("dense", 10.0, **where), timed("sdpa-flash", 9.0, **where), timed("sdpa-cudnn", 8.5, **where)]
        values = {"records": records, "families": {r["provider"]: r["provider"] for r in records}}
        journal.add(Result("speed/attention-16384-128-fwd+bwd", "speed", PASSED, 1.0, values))
        for mixer, rate in (("flash", 100.0), ("kda", 150.0)):
            measured = {"mixer": mixer, "compiled": False, "tokens_per_second": rate, "peak_bytes": 2e9}
            measured |= {"of_peak": 0.3, "step_seconds": 1.0, "compile_seconds": 2.0}
            journal.add(Result(f"training/{mixer}", "training", PASSED, 1.0, measured))
        journal.add(Result("correctness/a", "correctness", FAILED, 1.0, {}, "errors above 1"))
        return journal

    def test_bars_ratios_and_what_is_wrong(self, journal):
        planned = [Case("correctness", "correctness/a", "x"), Case("correctness", "correctness/b", "x")]
        content = summarised(planned, journal)
        dense = next(bar for bar in content["bars"] if "dense" in bar["bar"] and bar["ratio"])
        assert dense["verdict"] == "met" and dense["ratio"] == pytest.approx(0.85)
        assert {bar["verdict"] for bar in content["bars"] if bar is not dense} == {"unmeasured"}
        assert content["stages"]["correctness"] == {"failed": 1, "not run": 1}
        assert [record["over_flash"] for record in content["training"]] == [1.0, 1.5]
        text = summary_text(planned, journal)
        assert "failed: correctness/a: errors above 1" in text and "0.85x, against sdpa-cudnn" in text

    def test_it_is_written_as_json_and_text(self, journal, tmp_path):
        write_summary(tmp_path, [], journal)
        assert json.loads((tmp_path / "summary.json").read_text())["not_run"] == []
        assert "kda" in (tmp_path / "summary.txt").read_text() and not (tmp_path / PATCH).exists()


class TestTuning:
    @pytest.mark.parametrize(("engine", "kernel", "width"), [("attention", "forward", 64), ("delta", "scan", 64)])
    def test_better_rows_are_a_patch_that_applies(self, engine, kernel, width, tmp_path):
        launch = tuning._launch(engine)
        row = launch.TABLE.entry(kernel, 90, 2, width)
        best = next(tuning.neighbours(row, kernel))
        record = {"engine": engine, "kernel": kernel, "architecture": 90, "width": width}
        record |= {"row": vars(row), "best": vars(best)}
        diff = tuning.patch([record], ROOT)
        place = Path(launch.__file__).relative_to(ROOT)
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text((ROOT / place).read_text())
        subprocess.run(["patch", "-p1", "-s"], cwd=tmp_path, input=diff, text=True, check=True)
        space: dict = {"__name__": "patched"}
        exec(compile((tmp_path / place).read_text(), "patched", "exec"), space)
        assert vars(space["TABLE"].entry(kernel, 90, 2, width)) == vars(best)
        assert tuning.patch([record | {"best": vars(row)}], ROOT) == ""

    def test_the_rows_that_a_call_takes_are_noted(self):
        table = tuning._launch("linear").TABLE
        kernels = list(tuning._launch("linear").KERNELS)[:2]

        class Call:
            def results(self, backend):
                return {kernel: table.entry(kernel, 90, 2, 150) for kernel in kernels}

        results, taken = tuning._results_and_entries(Call(), table, kernels[1])
        assert taken == [(table.covering(150), results[kernels[1]])]
        Call().results("triton")
        assert len(taken) == 1 and table.watch is None

    def test_neighbours_differ_in_one_number(self):
        row = tuning._launch("linear").TABLE.entry("output", 90, 2, 192)
        for other in tuning.neighbours(row, "output"):
            assert sum(a != b for a, b in zip(vars(row).values(), vars(other).values(), strict=True)) == 1

    def test_only_what_the_kernel_uses_is_varied(self):
        table = tuning._launch("attention").TABLE
        for kernel, field in (("forward", "descriptors"), ("grad_query", None), ("grad_key_value", "fold")):
            row = table.entry(kernel, 90, 2, 64)
            flags = {
                name
                for other in tuning.neighbours(row, kernel)
                for name in ("descriptors", "fold")
                if getattr(other, name) != getattr(row, name)
            }
            assert flags == ({field} if field else set())


class TestActions:
    def test_a_wrong_gradient_is_found(self):
        call = engine_calls.make("attention", batch=1, length=20, heads=1, dim=8, dtype="fp32", device="cpu")
        found, wanted = call.results("blocked"), call.results("reference", call.exact())
        assert max(correctness.errors_of(found, wanted, 1e-5).values()) < 1e-5
        found["gradient of key"][0, 3] += 0.1
        with pytest.raises(CheckFailed, match="gradient of key"):
            correctness.errors_of(found, wanted, 1e-5)
        assert correctness.relative_error(found["output 0"] * torch.nan, wanted["output 0"]) == float("inf")

    @pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_training_steps_are_timed_and_have_to_learn(self, compiled):
        sizes: dict = {"batch": 1, "length": 64, "device": "cpu", "words": ["model=tiny", "model.num_layers=1"]}
        found = training.steps(mixer="flash", compiled=compiled, count=2, **sizes)
        assert found["tokens_per_second"] > 0 and len(found["losses"]) == training.WARM_STEPS + 2
        sizes["words"] += ["optimizer.learning_rate=1e-30", "optimizer.adamw_learning_rate=1e-30"]
        with pytest.raises(CheckFailed, match="losses do not fall"):
            training.steps(mixer="flash", compiled=False, count=2, **sizes)

    @pytest.mark.slow
    def test_the_command_trains_through_train_py(self):
        words = ["mixer=flash", "model=tiny", "seq_len=64", "data=copying", "data.task.count=8", "batch_size=2"]
        words += ["max_steps=2", "data.validation_tokens=128", "trainer=cpu"]
        assert training.command(words=words, seconds=200.0)["summary"]["steps"] == 2
        with pytest.raises(CheckFailed, match="exit code 2"):
            training.command(words=["mixer=nothing"], seconds=200.0)

    def test_times_are_taken_of_what_is_installed(self, monkeypatch):
        own = speed.BENCHMARKS["attention"]
        small = {**vars(own), "shape": lambda length, dim, **place: speed.Shape(1, length, 1, dim, **place)}
        monkeypatch.setitem(speed.BENCHMARKS, "attention", speed.Benchmark(**small))
        settings = {"benchmark": "attention", "direction": FORWARD, "seconds": 0.01, "limit": 5.0, "device": "cpu"}
        found = speed.compare(families=["dense", "sdpa-flash", "fa3"], length=128, dim=16, **settings)
        assert [record["provider"] for record in found["records"]] == ["dense", "sdpa-flash"]
        assert all(record["median_ms"] > 0 for record in found["records"]) and found["missing"] == {"fa3": "needs CUDA"}
        json.dumps(found)


@pytest.mark.slow
class TestOnACpu:
    """The first stage, in Triton's interpreter."""

    def start(self, folder: Path, *options: str) -> subprocess.Popen:
        call = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--budget", "500", *options]
        return subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def test_correctness_passes_and_the_rest_is_planned(self, tmp_path):
        process = self.start(tmp_path, "--workers", "2")
        printed, _ = process.communicate(timeout=500)
        assert process.returncode == 0, printed
        assert "correctness: 5 passed" in printed and "training/flash" in printed
        assert json.loads((tmp_path / "summary.json").read_text())["stages"]["correctness"] == {"passed": 5}
        printed, _ = self.start(tmp_path, "--resume").communicate(timeout=200)
        assert "passed  correctness" not in printed

    def test_what_was_found_before_a_signal_stays(self, tmp_path):
        process = self.start(tmp_path, "--workers", "1")
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not Journal(tmp_path / FILE).results:
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)
        assert process.returncode == 128 + signal.SIGTERM
        passed = json.loads((tmp_path / "summary.json").read_text())["stages"]["correctness"]
        assert passed["passed"] >= 1 and passed["not run"] >= 1
