"""Sizes of states, statistics of gates, and `evaluate.py task=states`."""

import json
import math

import pytest
import torch
from matplotlib import image

from longmix.analysis.effective_attention import engine_call
from longmix.analysis.states import gate_statistics, log_root_mean_square
from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.config import build
from longmix.data.tokens.tokenizers import tokenizer_from_state
from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate
from longmix.evaluation.tasks.states import EXPLODES, LayerStates, _without_size, exploding, grown, kind_of
from longmix.mixers.flash import Flash
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.parts.base import Mixer, ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory
from longmix.mixers.parts.looked_into import EngineCall
from longmix.mixers.parts.softmax import AttentionState
from longmix.mixers.parts.states import held_bytes
from longmix.mixers.rwkv7 import RWKV7
from longmix.model.build import model_from_checkpoint
from longmix_kernels.linear import LinearState

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)


def inputs(length: int = 20) -> torch.Tensor:
    return torch.randn(2, length, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class TestSizes:
    def test_are_root_mean_squares(self):
        memory = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        wanted = memory.double().square().mean((-2, -1)).sqrt()
        torch.testing.assert_close(log_root_mean_square(memory).exp(), wanted)

    def test_count_the_log_scale(self):
        memory, scale = torch.ones(1, 2, 4, 5), torch.tensor([[3.0, -200.0]])
        sizes = log_root_mean_square(LinearState(memory, torch.zeros(1, 2, 4), scale))
        torch.testing.assert_close(sizes, scale.double())

    def test_of_huge_tiny_and_no_states_are_numbers_or_minus_infinity(self):
        memory = torch.tensor([1e30, 1e-30, 0.0])[None, :, None, None].expand(1, 3, 4, 4)
        sizes = log_root_mean_square(memory)[0].tolist()
        assert sizes[:2] == pytest.approx([30 * math.log(10), -30 * math.log(10)]) and sizes[2] == -math.inf

    def test_bytes_leave_bookkeeping_apart(self):
        key = torch.zeros(2, 7, 3, 4)
        ids, position = torch.zeros(2, 7, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
        state = [AttentionState(key, key, None, ids, position), None, LinearState(key)]
        assert held_bytes(state) == (3 * key.nbytes, ids.nbytes + position.nbytes)


class TestGates:
    def call(self, **options) -> EngineCall:
        x = torch.zeros(2, 3, 2, 4)
        return EngineCall(engine_call, x, x, x, options, x)

    def test_a_constant_decay_has_its_half_life(self):
        heads = gate_statistics([self.call(log_decay=torch.tensor([math.log(0.5), 0.1 * math.log(0.5)]))])
        assert [head["half_life"] for head in heads] == pytest.approx([1.0, 10.0])
        assert heads[0] == {name: pytest.approx(1.0) for name in ("half_life_low", "half_life", "half_life_high")}

    def test_the_decay_is_a_geometric_mean_over_tokens_and_calls(self):
        first, second = torch.full((2, 3, 2), -1.0), torch.full((2, 3, 2), -3.0)
        heads = gate_statistics([self.call(log_decay=first), self.call(log_decay=second)])
        assert heads[1]["half_life"] == pytest.approx(math.log(2) / 2)

    def test_channels_give_quantiles_and_no_decay_gives_none(self):
        lives = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [math.inf] * 5])
        heads = gate_statistics([self.call(log_decay=(-math.log(2) / lives).expand(2, 3, 2, 5))])
        assert [heads[0][f"half_life{end}"] for end in ("_low", "", "_high")] == pytest.approx([1.4, 3.0, 4.6])
        assert heads[1]["half_life"] is None

    @torch.no_grad()
    def test_of_mixers_are_what_their_equations_say(self):
        torch.manual_seed(0)
        x = inputs()
        delta = GatedMemory(SHAPE, 0, decay="none", output_gate="none", num_heads=3).double()
        (call,) = [engine_call(delta, x)]
        strengths = (x @ delta.strength.weight.T).sigmoid().mean((0, 1))
        found = gate_statistics([call])
        assert [head["removal"] for head in found] == pytest.approx(strengths.tolist(), rel=1e-5)
        assert all(head["half_life"] is None and "input_gate" not in head for head in found)

        mlstm = MLSTMTFLA(SHAPE, 0, num_heads=3).double()
        gate = mlstm.input_gate
        wanted = (15 * ((x @ gate.weight.T + gate.bias) / 15).tanh()).sigmoid().mean((0, 1))
        found = gate_statistics([engine_call(mlstm, x)])
        assert [head["input_gate"] for head in found] == pytest.approx(wanted.tolist())
        forget = (15 * (mlstm.forget_gate.bias / 15).tanh()).sigmoid().log()
        assert [head["half_life"] for head in found] == pytest.approx((math.log(2) / -forget).tolist())

        rwkv = RWKV7(SHAPE, 0, head_dim=16).double()
        assert all(0 < head["removal"] < 1 for head in gate_statistics([engine_call(rwkv, x)]))


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
