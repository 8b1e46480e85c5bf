"""`python -m benchmarks.extension`: every kind of positions on the same tokens, in JSON, a table and a picture."""

import json
import math

import pytest

import longmix
from benchmarks import extension
from longmix.mixers.parts.rotary import Rotary

WORDS = ("logger=csv", "trainer=cpu", "batch_size=2", "seq_len=32", "max_steps=1", "data.validation_tokens=256")
SMALL = ("model.num_layers=2", "model.d_model=32", "model.mlp_hidden=32", "loop.validate_every=null")


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_cache):
    folder = tmp_path_factory.mktemp("runs") / "hybrid"
    words = (*WORDS, *SMALL, f"data.cache_dir={shared_cache}", "mixer=mlstm_tfla+flash")
    return longmix.train(words, folder=folder).folder


def test_measures_every_kind_and_the_runs_besides(run, tmp_path, capsys):
    words = [str(run), "--lengths", "32", "64", "--tokens", "256", "--out", str(tmp_path), "--also", f"again={run}"]
    assert extension.main(words) == 0
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    records = {(record["name"], record["length"]): record for record in content["results"]}
    names = ["as it is", "interpolation", "YaRN", "larger base", "again"]
    assert list(records) == [(name, length) for name in names for length in (32, 64)]
    losses = {name: records[name, 64]["loss"] for name in names}
    assert losses["again"] == losses["as it is"]
    assert len(set(losses.values())) == 4
    assert records["YaRN", 64]["mixer"] == {
        "flash": {"rotary_scaling": "yarn", "rotary_factor": 2.0, "rotary_original_length": 32}
    }
    lines = file.with_suffix(".md").read_text().splitlines()
    assert lines[0].startswith(
        "| positions | perplexity at 32 | perplexity at 64 | loss at 32 | loss at 64 | loss past 32"
    )
    past = [row for row in records["YaRN", 64]["by_position"] if row["start"] >= 32]
    expected = math.fsum(row["loss"] * row["tokens"] for row in past) / sum(row["tokens"] for row in past)
    assert lines[4] == lines[4][: lines[4].rindex("| ", 0, -2)] + f"| {expected:.4f} |"
    assert file.with_suffix(".png").stat().st_size > 5000
    assert "written:" in capsys.readouterr().out


def test_the_larger_base_turns_the_slowest_pair_as_far_as_in_training():
    rotary = Rotary(10_000.0, 64)
    larger = Rotary(extension.settings_for("larger base", rotary, 8.0, 512)["rotary_base"], 64)
    slowest = [float(found.frequencies("cpu")[-1]) for found in (rotary, larger)]
    assert slowest[1] * 8 == pytest.approx(slowest[0], rel=1e-5)


@pytest.mark.parametrize("given", ["runs/a", "=runs/a", "YaRN=runs/a"])
def test_what_cannot_be_a_name_is_one_line(given, capsys):
    with pytest.raises(SystemExit) as ended:
        extension.main(["runs/a", "--lengths", "8", "--also", given])
    assert ended.value.code == 2
    assert "must be NAME=CHECKPOINT" in capsys.readouterr().err
