"""`evaluate.py task=causality`: its report of a model and its layers, and what it refuses."""

import json

import pytest

from longmix.checkpoints import find_checkpoint
from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:mixer.mode")
def test_the_task_convicts_the_published_routing(run_training, shared_cache, compose_config, tmp_path, capsys):
    """Its window holds the rows that are audited, so that only the scale model shows what it does in longer ones."""
    mixer = ("mixer=routing", "mixer.mode=sequence_topk", f"data.cache_dir={shared_cache}")
    words = (f"checkpoint={run_training(*mixer)}", "task=causality", f"output={tmp_path}/out")
    report = evaluate(compose_config(*words, entry_point="evaluate"))["causality"]
    leaks = {part: {finding["kind"] for finding in findings} for part, findings in report["findings"].items()}
    assert "selection" in leaks["scale model"] and "selection" not in leaks["model"]
    assert report["entropy"]["loss"] < report["entropy"]["entropy"] - 3 * report["entropy"]["error"]
    assert not report["causal"] and "BELOW THE ENTROPY" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    return run_training("mixer=sparse_flash+rwkv7", "mixer.rwkv7.head_dim=16", f"data.cache_dir={shared_cache}")


@pytest.mark.slow
def test_the_task_reports_model_and_layers(run_folder, compose_config, tmp_path, capsys):
    words = (f"checkpoint={run_folder}", "task=causality", "task.causality.entropy_steps=3", f"output={tmp_path}/out")
    report = evaluate(compose_config(*words, entry_point="evaluate"))["causality"]
    assert report["causal"] and list(report["findings"]) == ["model", "layer 0 SparseFlash", "scale model"]
    written = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert written["findings"]["model"][0]["probe"] == "last token"
    assert written["entropy"]["entropy"] == pytest.approx(2.0794, abs=1e-4) and written["entropy_length"] == 8
    assert next((tmp_path / "out").glob("*.png")).stat().st_size > 10_000
    assert "causal: nothing leaks" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["task.causality.length=7"], ["task.causality.entropy_length=1"], ["task.causality.entropy_steps=-1"]],
)
def test_impossible_settings_are_refused(run_folder, compose_config, tmp_path, words):
    with pytest.raises(ConfigError, match=words[0].partition("=")[0].replace(".", r"\.")):
        evaluate(
            compose_config(
                f"checkpoint={find_checkpoint(run_folder)}", "task=causality", *words, entry_point="evaluate"
            )
        )
