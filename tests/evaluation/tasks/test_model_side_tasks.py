"""Tasks that look at layers, states and parts of a model: what each reports of one small run, and what it refuses."""

import json

import pytest
from matplotlib import image

from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    words = "mixer=gated_deltanet+flash", "seq_len=24", "model.num_layers=2", "model.num_heads=2"
    return run_training(*words, "mixer.gated_deltanet.num_heads=2", f"data.cache_dir={shared_cache}")


@pytest.fixture
def evaluated(compose_config, run_folder, tmp_path):
    """Evaluate the run by one task; its report, which the file and the picture beside it agree with."""

    def run(task: str, *words: str) -> dict:
        place = f"checkpoint={run_folder}", f"task={task}", f"output={tmp_path}/out"
        report = evaluate(compose_config(*place, *words, entry_point="evaluate"))[task]
        (saved,) = (tmp_path / "out").glob(f"{task}_*.json")
        written = json.loads(saved.read_text())
        assert {key: written[key] for key in report} == json.loads(json.dumps(report))
        assert image.imread(saved.with_suffix(".png"))[..., :3].std() > 0.05
        return report

    return run


def test_layers(evaluated, capsys):
    words = "task.layers.windows=3", "task.layers.tokens=16", "task.layers.block=12", "task.layers.length=24"
    report = evaluated("layers", *words)
    assert [layer["name"] for layer in report["layers"]] == ["embedding", "GatedDeltaNet", "Flash"]
    assert report["tokens"] == 16 and report["windows"] == 3
    assert "cosine" not in report["layers"][0] and -1 <= report["layers"][1]["cosine"]["mean"] <= 1
    assert all(layer["spectral_entropy"]["error"] > 0 for layer in report["layers"])
    assert [(block["start"], block["end"], block["windows"]) for block in report["blocks"]] == [(0, 12, 3), (12, 24, 3)]
    assert set(report["blocks"][0]["layers"][2]) < set(report["layers"][2])
    assert "GatedDeltaNet" in capsys.readouterr().out


def test_dsf(evaluated, capsys):
    report = evaluated("dsf", "task.dsf.windows=1")
    memory, attention = report["layers"]
    assert report["holds"] and memory["error"] < 1e-10 and attention["error"] < 1e-10
    assert memory["state_size"] == 8 and memory["state_entries"] == 2 * 8 * 16  # two heads, keys of 8, values of 16
    assert attention["state_size"] == 2 * 24 and attention["state_entries"] * 4 == attention["bytes"]
    assert 0 < memory["decay_product"] < 1 and memory["half_life"] > 0
    assert attention["decay_product"] is None and attention["half_life"] is None
    assert 1 <= attention["effective_rank"] <= 24 and 0 < attention["first_token_mass"] < 1
    assert "Phi v is the output of every layer, to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "word", "message"),
    [
        ("dsf", "length=1", r"task\.dsf\.length=1 must be from 2"),
        ("dsf", "windows=0", r"task\.dsf\.windows=0 must be from 1"),
        ("layers", "tokens=1", r"task\.layers\.tokens=1 must be from 2"),
        ("layers", "block=1", r"task\.layers\.block=1 must be from 2"),
    ],
)
def test_impossible_settings_are_refused(compose_config, run_folder, task, word, message):
    words = f"checkpoint={run_folder}", f"task={task}", f"task.{task}.{word}"
    with pytest.raises(ConfigError, match=message):
        evaluate(compose_config(*words, entry_point="evaluate"))
