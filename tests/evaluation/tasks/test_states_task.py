"""`evaluate.py task=states`: growth of states, what the task reports, and what it refuses."""

import json
import math

import pytest
import torch
from matplotlib import image

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.config import build
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate
from longmix.evaluation.tasks.states import EXPLODES, LayerStates, _without_size, exploding, grown, kind_of
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import Mixer, ModelShape
from longmix.mixers.parts.states import held_bytes
from longmix.model.build import model_from_checkpoint


class TestGrowth:
    def rows(self, *sizes: tuple[int, list[float]]) -> list[dict]:
        return [{"position": position, "rms": rms} for position, rms in sizes]

    def test_is_the_most_of_any_head_since_the_trained_length(self):
        rows = self.rows((8, [5.0, 5.0]), (16, [2.0, 1.0]), (24, [9.0, 9.0]), (32, [4.0, 3.0]))
        assert grown(rows, trained=16) == grown(rows, trained=23) == 3.0
        assert grown(rows[:2], trained=16) is None and grown(rows, trained=4) is None

    def test_of_states_that_overflowed_is_infinite(self):
        assert grown(self.rows((8, [1.0]), (16, [math.inf])), trained=8) == math.inf
        assert grown(self.rows((8, [1.0]), (16, [math.nan])), trained=8) == math.inf
        assert grown(self.rows((8, [0.0]), (16, [1.0])), trained=8) == math.inf

    def test_positions_are_binned_and_averaged(self):
        layer = LayerStates("RWKV7", "recurrent")
        layer.sizes = [(position, torch.tensor([float(position)]).log()) for position in (3, 8, 9, 16)]
        assert [row["position"] for row in layer.by_position(8)] == [8, 16]
        assert [row["rms"][0] for row in layer.by_position(8)] == pytest.approx([5.5, 12.5])

    @pytest.mark.parametrize(("growth", "told"), [(EXPLODES / 2, False), (2 * EXPLODES, True), (math.inf, True)])
    def test_an_explosion_is_pointed_out(self, growth, told):
        layer = {
            "mixer": "RWKV7",
            "kind": "recurrent",
            "bytes": {32: 64},
            "growth": growth,
            "gates": [{"half_life": 3.0}],
        }
        layer["states"] = self.rows((32, [1.0]))
        lines = list(exploding({"trained_seq_len": 8, "layers": [layer]}))
        assert [line.startswith("layer 0 RWKV7: a state EXPLODES") for line in lines] == [True] * told


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    words = "mixer=rwkv7+sliding_window", "mixer.rwkv7.head_dim=16", "mixer.sliding_window.window=9", "seq_len=24"
    return run_training(*words, "model.num_layers=2", f"data.cache_dir={shared_cache}")


@pytest.fixture
def monitored(compose_config, tmp_path):
    def run(folder, *overrides: str) -> dict:
        words = f"checkpoint={folder}", "task=states", f"output={tmp_path}/out", *overrides
        return evaluate(compose_config(*words, entry_point="evaluate"))["states"]

    return run


@pytest.mark.slow
@torch.no_grad()
def test_the_task_reports_what_the_model_holds(monitored, run_folder, tmp_path, capsys):
    report = monitored(run_folder, "task.states.windows=1", "task.states.points=16")
    assert report["length"] == 8 * 24 and report["trained_seq_len"] == 24
    recurrent, window = report["layers"]
    assert recurrent["mixer"] == "RWKV7" and "states" not in window
    assert [row["position"] for row in recurrent["states"]] == list(range(12, 193, 12))

    checkpoint = load_checkpoint(find_checkpoint(run_folder))
    model = model_from_checkpoint(checkpoint).eval()
    ids = first_window(checkpoint, 96)
    state = model(ids, state=model.init_state(1)).state
    wanted = state[0].mixer.carried.square().mean((0, 2, 3)).sqrt()
    assert recurrent["states"][7]["rms"] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert recurrent["bytes"][96] == held_bytes(state[0])[0]
    # In float32: keys and values of 8 tokens, and the token that the channel mixing of RWKV-7's block looks back on.
    assert list(window["bytes"].values()) == [4 * 32 * (2 * 8 + 1)] * 16

    before, last = recurrent["states"][1]["rms"], recurrent["states"][-1]["rms"]
    assert recurrent["growth"] == pytest.approx(max(b / a for a, b in zip(before, last, strict=True)))
    assert [set(head) for head in recurrent["gates"]] == [
        {"half_life_low", "half_life", "half_life_high", "removal"}
    ] * 2
    (saved,) = (tmp_path / "out").glob("states_*_validation_step2_*.json")
    written = json.loads(saved.read_text())
    assert written["layers"][0]["states"] == recurrent["states"]
    assert image.imread(saved.with_suffix(".png"))[..., :3].std() > 0.05
    assert "RWKV7" in capsys.readouterr().out


def first_window(checkpoint: dict, length: int) -> torch.Tensor:
    """The first tokens of the validation split, [1, length]."""
    tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    data = build(checkpoint["config"]["data"], "data", tokenizer=tokenizer, seq_len=length, batch_size=1, seed=0)
    return next(iter(data.evaluation_loader("validation", length)))["tokens"]


def test_a_model_without_recurrent_state_is_told_so(monitored, run_training, shared_cache, capsys):
    folder = run_training("mixer=flash", "seq_len=16", "max_steps=1", f"data.cache_dir={shared_cache}")
    report = monitored(folder, "task.states.windows=1", "task.states.points=4")
    assert "Flash: a softmax mixer has no recurrent state; the bytes of its cache are above" in capsys.readouterr().out
    assert list(report["layers"][0]["bytes"].values()) == [2 * 4 * 32 * length for length in (32, 64, 96, 128)]


def test_of_a_foreign_state_only_the_bytes_are_claimed():
    class Moving(Mixer):
        """Somebody's own mixer, neither recurrent nor softmax."""

    kinds = {mixer.__class__.__name__: kind_of(mixer) for mixer in (Moving(), Flash(ModelShape(16, 1, 2), 0))}
    assert kinds == {"Moving": "other", "Flash": "cache"}
    (words,) = _without_size([{"mixer": "Moving", "kind": "other"}, {"mixer": "RWKV7", "kind": "recurrent"}])
    assert words.startswith("of the state of Moving only the bytes are known: a mixer that derives from RecurrentMixer")
    assert "cache" not in words


@pytest.mark.parametrize("setting", ["length", "windows", "points"])
def test_impossible_settings_are_refused(monitored, run_folder, setting):
    with pytest.raises(ConfigError, match=rf"task\.states\.{setting}=0 must be from 1"):
        monitored(run_folder, f"task.states.{setting}=0")
