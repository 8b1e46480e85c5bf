"""`--best`: of runs that differ in tuned settings alone, the best."""

import json

import pytest
from sweep_folder import write_run

from longmix.errors import DataError
from longmix.reporting.__main__ import main
from longmix.reporting.best import best_of
from longmix.reporting.runs import find_runs

RATES = {("flash", 0.001): 2.5, ("flash", 0.01): 2.1, ("rwkv7", 0.001): 2.2, ("rwkv7", 0.01): 2.4}


@pytest.fixture
def sweep(tmp_path):
    """Two mixers at two rates and two seeds, each a tenth of a bit worse with the second."""
    for (mixer, rate), bits in RATES.items():
        for seed in (0, 1):
            name = f"mixer={mixer},rate={rate},seed={seed}"
            config = f"name: {name}\nmixer:\n  _target_: {mixer}\noptimizer:\n  learning_rate: {rate}\nseed: {seed}\n"
            write_run(tmp_path / name, mixer, 32, bits + seed / 10, 500.0, config=config)
    return tmp_path


def test_each_mixer_and_seed_has_its_best_rate(sweep):
    kept = best_of(find_runs([sweep]).runs, ["optimizer.learning_rate"])
    assert [(run.summary["mixer"], run.settings["optimizer.learning_rate"], run.settings["seed"]) for run in kept] == [
        ("flash", 0.01, 0),
        ("flash", 0.01, 1),
        ("rwkv7", 0.001, 0),
        ("rwkv7", 0.001, 1),
    ]


def test_of_several_settings_one_run_is_left(sweep):
    kept = best_of(find_runs([sweep]).runs, ["optimizer.learning_rate", "seed"])
    assert [run.summary["validation"]["bits_per_byte"] for run in kept] == [2.1, 2.2]
    assert len(best_of(find_runs([sweep]).runs, ["mixer", "optimizer", "seed"])) == 1


def test_an_unknown_setting_is_refused(sweep):
    with pytest.raises(DataError, match=r"--best optimizer\.rate: no run has this setting"):
        best_of(find_runs([sweep]).runs, ["optimizer.rate"])


def test_a_run_whose_settings_cannot_be_read_stands_alone(sweep):
    for folder in sweep.iterdir():
        (folder / "config.yaml").write_text(
            "a: [\n" if "seed=0" in folder.name else (folder / "config.yaml").read_text()
        )
    assert len(best_of(find_runs([sweep]).runs, ["optimizer.learning_rate"])) == 4 + 2


@pytest.mark.slow
def test_the_report_has_the_best_alone(sweep, capsys):
    assert main([str(sweep), "--best", "optimizer.learning_rate", "seed"]) == 0
    assert "the best of 8 runs by optimizer.learning_rate, seed" in capsys.readouterr().out
    assert [row["bits_per_byte"] for row in json.loads((sweep / "runs.json").read_text())] == [2.1, 2.2]
