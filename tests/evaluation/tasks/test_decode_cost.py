"""`evaluate.py task=decode_cost`: what it counts, measures and refuses."""

import json

import pytest
import torch
from matplotlib import image

from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate
from longmix.evaluation.tasks.decode_cost import measure, with_flash
from longmix.generation.session import Session
from longmix.mixers.parts.states import held_bytes

WIDTH, LAYERS, HEADS = 64, 2, 4


def tokens(length: int) -> torch.Tensor:
    return torch.randint(20, (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["flash", "gated_deltanet"])
def test_what_is_measured_is_the_session(small_model, name):
    model = small_model(name, dtype=torch.float32)
    session = Session(model, 1)
    session.prefill([tokens(37)])
    found = measure(model, tokens(39), context=37, steps=3)
    assert found["state_bytes"] == found["counted_state_bytes"] == model.state_bytes(37)
    assert sum(held_bytes(session.state)) == session.state_bytes() > found["state_bytes"]
    assert 0 < found["milliseconds"] < 60_000


def test_flash_in_its_place_has_its_caches(small_model):
    model = small_model("rwkv7", dtype=torch.float32)
    changed = with_flash(model)
    shift = LAYERS * WIDTH * 4  # what the channel mixing of RWKV-7's block remembers
    assert changed.state_bytes(100) == LAYERS * 2 * WIDTH * 4 * 100 + shift
    assert [type(mixer).__name__ for mixer in model.mixers()] == ["RWKV7"] * 2


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    return run_training("mixer=mlstm_tfla", "seq_len=32", "max_steps=1", f"data.cache_dir={shared_cache}")


@pytest.fixture
def costed(compose_config, run_folder, tmp_path):
    def run(*overrides: str) -> dict:
        words = f"checkpoint={run_folder}", "task=decode_cost", f"output={tmp_path}/out", *overrides
        return evaluate(compose_config(*words, entry_point="evaluate"))["decode_cost"]

    return run


@pytest.mark.slow
def test_the_task_counts_and_measures(costed, tmp_path, capsys):
    report = costed("task.decode_cost.steps=2", "task.decode_cost.contexts=[4096,1024]")
    assert [row["context"] for row in report["counted"]] == [1024, 4096]
    first, last = report["counted"]
    assert first["total"] == last["total"] == pytest.approx(last["parameters"] + last["mixing"])
    assert last["mixing"] == last["mixing_flops"] + report["intensity"] * last["state_bytes"]
    assert report["flash"][1]["held_bytes"] == 2 * 2 * 32 * 4096
    assert report["cheaper_than_flash"] == 1024 and report["mixing_dominates"] is None
    assert [row["context"] for row in report["measured"]] == [8, 32]
    for row in report["measured"]:
        assert row["milliseconds"] > 0 and row["state_bytes"] == row["counted_state_bytes"] == 4 * 4 * 4 * 8
    (saved,) = (tmp_path / "out").glob("decode_cost_*_step1_*.json")
    assert json.loads(saved.read_text()).items() >= report.items()
    assert image.imread(saved.with_suffix(".png"))[..., :3].std() > 0.05
    assert "mixing costs less than flash attention's: from 1,024 tokens" in capsys.readouterr().out


def test_nothing_need_be_measured(costed, run_folder):
    report = costed("task.decode_cost.measured=[]", "task.decode_cost.dtype=float32", "task.decode_cost.batch=8")
    assert report["measured"] == [] and len(report["counted"]) == 7
    weights = json.loads((run_folder / "summary.json").read_text())["parameters"]["non_embedding"]
    assert report["counted"][0]["weight_bytes"] == 4 * weights / 8


@pytest.mark.parametrize(
    "words",
    ["contexts=[0]", "contexts=[]", "measured=[8,0]", "batch=0", "steps=0", "hardware=abacus", "dtype=int8"],
)
def test_impossible_settings_are_refused(costed, words):
    with pytest.raises(ConfigError, match=rf"task\.decode_cost\.{words.split('=')[0]}="):
        costed(f"task.decode_cost.{words}")
