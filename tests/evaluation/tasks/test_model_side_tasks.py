"""Tasks that look at layers, states and parts of a model: what each reports of one small run, and what it refuses."""

import json
import re

import pytest
from matplotlib import image

from longmix.data.synthetic.street_math import KINDS, question
from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate
from longmix.evaluation.tasks.dsf import DSF
from longmix.evaluation.tasks.layers import Layers
from longmix.evaluation.tasks.locality import Locality
from longmix.evaluation.tasks.probe import Probe
from longmix.evaluation.tasks.prune import Prune
from longmix.evaluation.tasks.robustness import Robustness
from longmix.evaluation.tasks.streetmath import StreetMath


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


def test_layers_of_a_row_in_pieces_are_those_of_the_whole(compose_config, run_folder, tmp_path, monkeypatch):
    words = f"checkpoint={run_folder}", "task=layers", "task.layers.windows=1", "task.layers.length=200"
    config = compose_config(*words, "task.layers.block=50", f"output={tmp_path}", entry_point="evaluate")
    whole = evaluate(config)["layers"]
    monkeypatch.setattr("longmix.evaluation.prefill.TOKENS_AT_ONCE", 37)
    pieces = evaluate(config)["layers"]
    for one, other in zip(whole["layers"], pieces["layers"], strict=True):
        assert one["trace_covariance"]["mean"] == pytest.approx(other["trace_covariance"]["mean"], rel=1e-4)
    for one, other in zip(whole["blocks"], pieces["blocks"], strict=True):
        assert one["layers"][2] == pytest.approx(other["layers"][2], rel=1e-3)


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


def test_prune(evaluated, tmp_path, capsys):
    report = evaluated("prune", "task.prune.windows=2", "task.prune.margin=0.01", "max_tokens=240")
    assert len(report["trials"]) == 2 * 2 + 2 * sum(report["masks"]["mixer"]) and report["windows"] == 2
    assert [t["part"] for t in report["trials"]][:2] == ["layer 1 mlp", "layer 1 mixer"]
    assert report["removed"], "hardly anything is learned in two steps, so something costs nothing"
    assert [t["part"] for t in report["trials"] if t["removed"]] == [row["part"] for row in report["removed"]]
    shares = [row["parameters"] / report["parameters"] for row in report["removed"]]
    assert shares == sorted(shares) and 0 < shares[-1] < 1 and report["removed"][-1]["flops"] < report["flops"]
    assert report["loss"]["after"] <= report["loss"]["before"] + 0.01 and report["final"]["after"] > 0
    assert json.loads((tmp_path / "out/masks.json").read_text()) == report["masks"]
    assert "parts that were tried; loss of all windows" in capsys.readouterr().out


def test_robustness(evaluated, capsys):
    report = evaluated("robustness", "task.robustness.xi=[0.5,4]", "seq_len=[24,48]", "max_tokens=960")
    assert report["layers"] == 1 and list(report["lengths"]) == [24, 48]
    for found in report["lengths"].values():
        worst, random = found["worst"], found["random"]
        assert found["loss"] < worst["0.5"] < worst["4"] and random["4"] < worst["4"] and found["tokens"] == 960
    assert "under a change of the scores" in capsys.readouterr().out


def test_robustness_needs_layers_of_softmax_attention(compose_config, run_folder, tmp_path):
    words = f"checkpoint={run_folder}", "task=robustness", "task.robustness.layers=[0]", f"output={tmp_path}"
    with pytest.raises(ConfigError, match=r"task\.robustness\.layers=\[0\]: layer 0, GatedDeltaNet, has no"):
        evaluate(compose_config(*words, entry_point="evaluate"))


def test_locality(evaluated, capsys):
    words = "task.locality.blocks=[8,24,48]", "seq_len=[24,48]", "max_tokens=960"
    report = evaluated("locality", *words)
    usual = evaluated("loss", *words[1:])
    for length, found in report["lengths"].items():
        assert found["loss"] == pytest.approx(usual["lengths"][length]["loss"], rel=1e-5)
        assert found["tokens"] == usual["lengths"][length]["tokens"]
        for kind in ("with_anchor", "without_anchor"):
            assert list(found[kind]) == [8, 24, 48]
            assert found[kind][8] != pytest.approx(found["loss"], rel=1e-7)
            assert found[kind][48] == pytest.approx(found["loss"], rel=1e-6)  # the window is one block
        assert found["with_anchor"][8] != pytest.approx(found["without_anchor"][8], rel=1e-7)
        first = {name: rows[0]["loss"] for name, rows in found["by_position"].items()}
        same = {name: loss for name, loss in first.items() if name != "8 without anchor"}  # 16 tokens, two blocks of 8
        assert len(same) == 6 and max(same.values()) == pytest.approx(min(same.values()), rel=1e-6)
        assert first["8 without anchor"] != pytest.approx(first["8"], rel=1e-7)
    assert "read in blocks" in " ".join(capsys.readouterr().out.split())
    for settings, message in (
        ({"blocks": []}, "task.blocks"),
        ({"blocks": 0}, "at least 1"),
        ({"blocks": [8, 4], "anchor": 5}, "from 1 to the smallest block, 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            Locality(**settings)


@pytest.mark.parametrize("label", ["next", "document", "year"])
def test_probe(evaluated, label, capsys):
    words = "length=8", f"label={label}", "passages=96", "epochs=2", "layer=[-1,1]", "queries=4", "classes=3"
    report = evaluated("probe", *(f"task.probe.{word}" for word in words), "split=test")
    assert [(row["layer"], row["name"]) for row in report["layers"]] == [(-1, "embedding"), (1, "Flash")]
    assert all(0 <= row[pool] <= 1 for row in report["layers"] for pool in ("probe", "mean", "last"))
    assert report["fitted"] > report["held_out"] > 10 and 0 < report["floor"] < 1
    named = {"next": ["letter", "digit"], "document": ["document 0"], "year": ["from 1995"]}[label]
    assert report["classes"][: len(named)] == named or label == "document"
    assert "whose class of" in capsys.readouterr().out


def test_streetmath(evaluated, monkeypatch, capsys):
    report = evaluated("streetmath", "task.streetmath.questions=1", "task.streetmath.shots=0")
    assert len(report["answers"]) == 6 and report["max_tokens"] == 24
    assert all(sum(shares.values()) == pytest.approx(1) for shares in report["kinds"].values())
    assert all("\n" not in answer["text"] and len(answer["text"]) <= 24 for answer in report["answers"])
    assert "these shares say little" in capsys.readouterr().out


def test_streetmath_judges_what_was_written(compose_config, run_folder, tmp_path, monkeypatch):
    def exactly(subject, prompts, most):
        return [f"{question(kind, 0, n).exact * (1 if n else 1.1):.9f}" for kind in KINDS for n in range(2)]

    monkeypatch.setattr("longmix.evaluation.tasks.streetmath._answers", exactly)
    words = f"checkpoint={run_folder}", "task=streetmath", "task.streetmath.questions=2", f"output={tmp_path}"
    report = evaluate(compose_config(*words, entry_point="evaluate"))["streetmath"]
    assert report["shares"]["Exact math"] == report["shares"]["Good approximation"] == 0.5


@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        (StreetMath, {"shots": -1}, "task.shots=-1 must be from 0"),
        (Probe, {"label": "yeer"}, "task.label=yeer is unknown. Did you mean year?"),
        (Probe, {"layer": "first"}, "task.layer=first is no layer"),
        (Probe, {"queries": 0}, "task.queries=0 must be from 1"),
        (Robustness, {"xi": 0.0}, "task.xi=0.0 must be a number above 0"),
        (Robustness, {"xi": []}, "task.xi=[] must be a number above 0"),
        (Prune, {"margin": -1.0}, "task.margin=-1.0 must be at least 0"),
        (Prune, {"channels": 0}, "task.channels=0 must be from 1"),
        (DSF, {"length": 1}, "task.length=1 must be from 2"),
        (DSF, {"windows": 0}, "task.windows=0 must be from 1"),
        (Layers, {"tokens": 1}, "task.tokens=1 must be from 2"),
        (Layers, {"block": 1}, "task.block=1 must be from 2"),
    ],
)
def test_impossible_settings_are_refused(task, setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        task(**setting)
