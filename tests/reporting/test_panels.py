"""What a report shows: the panels' numbers, how runs are named, what evaluations say, and whether runs are fair."""

import pytest
from sweep_folder import STEPS, write_evaluation, write_needles, write_run, write_sweep

from longmix.reporting.compared import fairness
from longmix.reporting.panels import names_of, panels_of, quality_of, seconds_by_step
from longmix.reporting.results import NeedleMap, read_evaluations
from longmix.reporting.runs import find_runs


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


def runs_of(folder):
    return find_runs([folder]).runs


def panel(folder, key):
    (found,) = [panel for panel in panels_of(runs_of(folder)) if panel.key == key]
    return {series.name: (series.x, series.y) for series in found.series}, found


class TestPanels:
    def test_every_one_of_a_sweep(self, sweep):
        per_length = ("trade_off", "loss_by_tokens", "loss_by_time", "loss_by_position")
        assert [panel.key for panel in panels_of(runs_of(sweep))] == [
            *(f"{name}_{length}" for name in per_length for length in (32, 64)),
            "speed",
            "memory",
        ]

    def test_trade_off(self, sweep):
        assert panel(sweep, "trade_off_64")[0] == {"slow": ([500.0], [2.64]), "fast": ([1000.0], [3.64])}

    def test_tokens_and_seconds(self, sweep):
        tokens, shown = panel(sweep, "loss_by_tokens_32")
        assert tokens["slow"] == ([10_000, 20_000, 30_000], [pytest.approx(2.32 + 1 / step) for step in STEPS])
        assert shown.y_label == "validation, bits/byte"
        assert panel(sweep, "loss_by_time_32")[0]["slow"][0] == [20.0, 40.0, 60.0]
        assert panel(sweep, "loss_by_time_32")[0]["fast"][0] == [10.0, 20.0, 30.0]

    def test_tasks_during_training(self, sweep):
        runs = runs_of(sweep)
        for run in runs[:2]:
            for number, row in enumerate(run.metrics):
                row |= {f"task/needle/{name}/{n}": number for name in ("gain", "accuracy") for n in (8, 64, 16, 128)}
                row |= {"task/own/shares/32": 0.5, "task/own": 1, "task/a/b/c": 2}
        shown = [found for found in panels_of(runs) if found.section == "Tasks during training"]
        assert [(found.key, found.title, found.y_label) for found in shown] == [
            *((f"task_needle_{n}", f"task needle at {n} tokens", "accuracy") for n in (8, 16, 64)),
            ("task_own_32", "task own at 32 tokens", "shares"),
        ]
        assert len(shown[0].series) == 2 and shown[0].series[0].y == list(range(len(runs[0].metrics)))

    def test_seconds_follow_the_speed_of_each_stretch(self, tmp_path):
        (run,) = runs_of(write_run(tmp_path / "a", "flash", 32, 2.0, 500.0))
        for row, speed in zip([row for row in run.metrics if "train/loss" in row], (100.0, 200.0, 400.0), strict=True):
            row["throughput/tokens_per_second"] = speed
        assert seconds_by_step(run) == ([0.0, *STEPS], [0.0, 100.0, 150.0, 175.0])

    def test_training_loss_where_validations_are_few(self, tmp_path):
        write_sweep(tmp_path)
        for folder in tmp_path.glob("0,*"):
            lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
            (folder / "metrics.csv").write_text("".join(lines[:3]))
        curves, shown = panel(tmp_path, "loss_by_tokens_64")
        assert shown.y_label == "train, bits/byte"
        assert curves["fast"][1] == [4.0, 4.0, 4.0]

    def test_positions(self, sweep):
        assert panel(sweep, "loss_by_position_32")[0]["fast"] == ([16, 32], [3.0, 3.32])

    def test_costs_average_over_seeds(self, sweep):
        write_run(sweep / "4,mixer=slow,seq_len=64,seed=1", "slow", 64, 2.5, 700.0, peak_memory_bytes=2**30)
        assert panel(sweep, "speed")[0] == {"fast": ([32, 64], [1000, 1000]), "slow": ([32, 64], [500, 600])}
        assert panel(sweep, "memory")[0]["slow"] == ([32, 64], [3, 2])

    def test_no_costs_at_one_length_and_no_trade_off_of_one_run(self, tmp_path):
        write_run(tmp_path / "a", "flash", 32, 2.0, 500.0)
        keys = [panel.key for panel in panels_of(runs_of(tmp_path))]
        assert keys == ["loss_by_tokens_32", "loss_by_time_32", "loss_by_position_32"]

    def test_without_a_log_no_curves(self, tmp_path):
        (write_run(tmp_path / "a", "flash", 32, 2.0, 500.0) / "metrics.csv").unlink()
        assert [panel.key for panel in panels_of(runs_of(tmp_path))] == ["loss_by_position_32"]

    def test_values_that_are_no_numbers_are_left_out(self, tmp_path):
        rows = [{"start": 0, "end": 16, "loss": float("nan")}, {"start": 16, "end": 32, "loss": 1.0}]
        write_run(tmp_path / "a", "flash", 32, 2.0, 500.0, validation_by_position=rows)
        assert panel(tmp_path, "loss_by_position_32")[0] == {"flash": ([32], [1.0])}

    def test_nats_where_tokens_are_no_text(self, tmp_path):
        validation = {"bits_per_byte": float("nan"), "loss": 1.25}
        write_run(tmp_path / "a", "flash", 32, 2.0, 500.0, validation=validation)
        runs = runs_of(tmp_path)
        assert (quality_of(runs).unit, quality_of(runs).of(runs[0])) == ("nats/token", 1.25)


SYNTHETIC = "data: {_target_: longmix.data.synthetic.base.SyntheticData, task: {_target_: x.Mqar}}\n"


class TestQuality:
    def test_of_synthetic_data_is_recall_where_all_say_it(self, tmp_path):
        for name, bits, recall in (("a", 1.0, 0.25), ("b", 2.0, 0.5)):
            validation = {"bits_per_byte": bits, "loss": bits, "recall": recall}
            write_run(tmp_path / name, name, 32, bits, 500.0, config=SYNTHETIC, validation=validation)
        runs = runs_of(tmp_path)
        assert quality_of(runs).unit == "recall" and [run.label for run in runs] == ["b", "a"]
        assert panel(tmp_path, "trade_off_32")[1].best == "high" and runs[0].row()["bits_per_byte"] is None

    def test_of_synthetic_data_is_else_the_loss_and_never_bits(self, tmp_path):
        for name, bits in (("a", 1.0), ("b", 2.0)):
            write_run(tmp_path / name, name, 32, bits, 500.0, config=SYNTHETIC)
        assert quality_of(runs_of(tmp_path)).unit == "nats/token"


class TestNames:
    def test_mixer_unless_it_repeats(self, sweep):
        write_run(sweep / "4,mixer=slow,seq_len=64,seed=1", "slow", 64, 2.5, 700.0)
        names = {folder.name: name for folder, name in names_of(runs_of(sweep)).items()}
        assert names["0,mixer=slow,seq_len=32"] == "slow"
        assert names["3,mixer=fast,seq_len=64"] == "fast"
        assert names["2,mixer=slow,seq_len=64"] == "2,mixer=slow,seq_len=64", "nothing else tells it"
        assert names["4,mixer=slow,seq_len=64,seed=1"] == "slow seed=1"

    def test_settings_that_two_runs_share_do_not_name_them(self, tmp_path):
        for number in range(2):
            write_run(tmp_path / f"{number},mixer=a,seed=1", "a", 32, 2.0, 500.0)
        write_run(tmp_path / "2,mixer=a,seed=2", "a", 32, 2.0, 500.0)
        names = {folder.name: name for folder, name in names_of(runs_of(tmp_path)).items()}
        assert names["2,mixer=a,seed=2"] == "a seed=2"
        assert len(set(names.values())) == 3


class TestEvaluations:
    def test_none(self, tmp_path):
        found = read_evaluations(tmp_path)
        assert found.causal is None and found.recall == {} and found.needle is None

    def test_all_kinds(self, tmp_path):
        write_evaluation(tmp_path, "causality_step9", causal=True, step=9)
        lengths = {"64": {"accuracy": 0.5}, "32": {"accuracy": 1.0}}
        write_evaluation(tmp_path, "accuracy_mqar_test_step9", data="mqar", step=9, lengths=lengths)
        write_needles(tmp_path, [32, 64], [0.0, 1.0], [[1.0, 0.0], [1.0, 0.5]])
        write_evaluation(tmp_path, "loss_validation_step9", step=9)  # of no concern here
        found = read_evaluations(tmp_path)
        assert found.causal is True
        assert found.recall == {
            "mqar": {32: 1.0, 64: 0.5},
            "needle": {32: 1.0, 64: 0.25},
            "needle gain": {32: 9.0, 64: 2.25},
        }
        assert found.needle == NeedleMap(
            [32, 64], [0.0, 1.0], [[1.0, 0.0], [1.0, 0.5]], [[9.0, 0.0], [9.0, 4.5]], 32, needles=8
        )

    def test_other_data_splits_and_states_are_no_results_of_the_run(self, tmp_path):
        lengths = {"32": {"accuracy": 0.25}}
        place = {"data": "mqar", "step": 9, "lengths": lengths}
        write_evaluation(tmp_path, "accuracy_a", **place, own_data=True, split="validation", date="2026-01-01")
        for number, changes in enumerate(({"own_data": False}, {"own_data": True, "split": "test"})):
            other = {
                **place,
                "lengths": {"32": {"accuracy": 0.75}},
                "data_fingerprint": "abcdef0123",
                "date": "2026-02-01",
            }
            write_evaluation(tmp_path, f"accuracy_{number}", **other | changes)
        elsewhere = {"states": {"file": "x", "sha256": "0" * 64}, "lengths": {"32": {"accuracy": 1.0}}}
        write_evaluation(tmp_path, "accuracy_states", **place | elsewhere)
        found = read_evaluations(tmp_path)
        assert found.recall == {"mqar": {32: 0.25}, "mqar (abcdef)": {32: 0.75}, "mqar, test": {32: 0.75}}
        assert found.damaged == ()

    def test_averaged_weights_and_a_changed_mixer_are_measures_of_their_own(self, tmp_path):
        place = {"data": "mqar", "step": 9, "split": "validation", "own_data": True}
        for number, (changes, share) in enumerate(
            (({}, 0.25), ({"averaged": "ema"}, 0.5), ({"mixer": {"flash": {"rotary_base": 5e5}}}, 0.75))
        ):
            lengths = {"32": {"accuracy": share}, str(64 + number): {"accuracy": share}}
            write_evaluation(
                tmp_path, f"accuracy_{number}", **place, **changes, lengths=lengths, date=f"2026-01-0{number + 1}"
            )
        assert read_evaluations(tmp_path).recall == {
            "mqar": {32: 0.25, 64: 0.25},
            "mqar, weights=ema": {32: 0.5, 65: 0.5},
            "mqar, flash.rotary_base=500000.0": {32: 0.75, 66: 0.75},
        }

    def test_lengths_of_one_step_add_up_and_the_newer_day_counts(self, tmp_path):
        for name, step, lengths, date in (
            ("a", 9, {"16": {"accuracy": 1.0}}, "2026-01-01"),
            ("b", 10, {"32": {"accuracy": 0.5}}, "2026-01-02"),
            ("c", 10, {"64": {"accuracy": 0.25}}, "2026-01-03"),
            ("d", 10, {"32": {"accuracy": 0.75}}, "2026-01-04"),
        ):
            write_evaluation(tmp_path, f"accuracy_{name}", data="mqar", step=step, lengths=lengths, date=date)
        assert read_evaluations(tmp_path).recall == {"mqar": {32: 0.75, 64: 0.25}}

    def test_newest_step_counts(self, tmp_path):
        for step, causal in ((9, True), (10, False), (1, True)):
            write_evaluation(tmp_path, f"causality_step{step}", causal=causal, step=step)
        assert read_evaluations(tmp_path).causal is False

    def test_damaged(self, tmp_path):
        write_evaluation(tmp_path, "causality_step9", causal=True, step=9)
        (tmp_path / "evaluation" / "causality_step9.json").write_text("{")
        write_needles(tmp_path, [32], [0.0], [[0.5]])
        found = read_evaluations(tmp_path)
        ((path, reason),) = found.damaged
        assert path.name == "causality_step9.json" and reason and found.causal is None and found.recall["needle"]

    def test_panels_and_rows_have_them(self, sweep):
        run = sweep / "0,mixer=slow,seq_len=32"
        lengths = {"32": {"accuracy": 1.0}, "64": {"accuracy": 0.5}}
        write_evaluation(run, "accuracy_mqar_test_step9", data="mqar", step=9, lengths=lengths)
        write_evaluation(run, "causality_step9", causal=False, step=9)
        (row,) = [found.row() for found in runs_of(sweep) if found.folder == run]
        assert row["causal"] is False and row["mqar at 32"] == 1.0 and row["mqar at 64"] == 0.5
        curves, shown = panel(sweep, "recall_mqar_32")
        assert curves == {"slow": ([32, 64], [1.0, 0.5])}
        assert shown.title == "mqar, trained at 32 tokens" and shown.kind == "lines"

    def test_lines_of_one_point_each_are_points(self, sweep):
        for name in ("0,mixer=slow,seq_len=32", "1,mixer=fast,seq_len=32"):
            write_evaluation(sweep / name, "accuracy_x", data="mqar", step=9, lengths={"32": {"accuracy": 1.0}})
        shown = panel(sweep, "recall_mqar_32")[1]
        assert shown.kind == "points" and shown.best is None

    def test_recall_by_state_joins_the_sizes_of_a_mixer(self, sweep):
        wide = write_run(sweep / "4,mixer=slow,seq_len=32,model.d_model=128", "slow", 32, 2.0, 500.0)
        old = write_run(sweep / "5,mixer=slow,seq_len=32,seed=1", "slow", 32, 2.0, 500.0)
        sizes = {sweep / "0,mixer=slow,seq_len=32": 256, sweep / "1,mixer=fast,seq_len=32": 4096, wide: 1024, old: None}
        for run, size in sizes.items():
            row = {"accuracy": (size or 0) / 4096} | ({"state_bytes": size} if size else {})
            lengths = {"32": row, "64": {**row, "accuracy": 0.0}}
            write_evaluation(run, "accuracy_mqar_test_step9", data="mqar", step=9, lengths=lengths)
        curves, shown = panel(sweep, "capacity_mqar_32")
        assert curves == {"fast": ([4096], [1.0]), "slow": ([256, 1024], [0.0625, 0.25])}
        assert shown.log_x and shown.from_zero


class TestFairness:
    def facts(self, folder):
        return {fact.words: fact.good for fact in fairness(runs_of(folder))}

    def test_equal(self, sweep):
        assert self.facts(sweep) == {
            "100,000 parameters each": True,
            "30,000 tokens each, 1,000 in a step": True,
            "one run of a mixer and length: small differences may be chance": None,
            "CPU, torch 2.13.0": None,
        }

    @pytest.mark.parametrize(
        ("changes", "words", "good"),
        [
            ({"parameters": {"total": 103_000}}, "100,000 to 103,000 parameters, 3.0% apart", True),
            (
                {"parameters": {"total": 110_000}},
                "100,000 to 110,000 parameters, 10.0% apart; match.parameters=N makes them equal",
                False,
            ),
            ({"tokens": 60_000}, "30,000 to 60,000 tokens", False),
            ({"tokens_per_step": 500}, "30,000 tokens each, but 500 to 1,000 in a step", False),
            ({"device": "NVIDIA H200"}, "speed on different machines: CPU, NVIDIA H200", False),
        ],
    )
    def test_unequal(self, sweep, changes, words, good):
        write_run(sweep / "other", "other", 32, 2.0, 100.0, **changes)
        assert self.facts(sweep)[words] is good

    def test_other_content_of_the_same_data(self, tmp_path):
        for number, key in enumerate(("a", "a", "b")):
            marks = {"train_key": key, "seq_len": 32 * (1 + number), "batch_size": 2, "seed": number}
            write_run(tmp_path / str(number), f"m{number}", 32, 2.0, 100.0, data_fingerprint=marks)
        words = "the data had other content, or other tokens, in some runs; their losses do not compare"
        assert self.facts(tmp_path)[words] is False
        write_run(tmp_path / "x" / "y", "m", 32, 2.0, 100.0, data_fingerprint=3)
        assert words not in self.facts(tmp_path / "x")

    def test_a_leak(self, sweep):
        write_evaluation(sweep / "0,mixer=slow,seq_len=32", "causality_step9", causal=False, step=9)
        assert self.facts(sweep)["slow sees later tokens: its loss is not that of a language model"] is False

    def test_several_seeds(self, tmp_path):
        for seed in (1, 2):
            write_run(tmp_path / f"seed={seed}", "flash", 32, 2.0, 100.0)
        assert self.facts(tmp_path)["at least 2 runs of each mixer and length"] is True
