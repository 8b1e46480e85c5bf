"""Averaged weights: the formula, the run that was killed, and each command that takes them. The runs have dropout."""

import json
import math
import os
import signal

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from longmix.checkpoints import CheckpointStore, load_checkpoint, read_info
from longmix.errors import CheckpointError, ConfigError, Interrupted
from longmix.evaluation.run import evaluate
from longmix.metrics import read_metrics
from longmix.restore import restore
from longmix.training import run as run_module
from longmix.training.averaging import WeightAverage
from longmix.training.module import TrainingModule

WORDS = ["seq_len=32", "max_steps=6", "loop.log_every=3", "loop.validate_every=3", "loop.checkpoint_every=3"]
WORDS += ["trainer.num_threads=1", "mixer=flash", "model.tie_head=true", "loop.ema_decay=0.6"]
WORDS += ["model.embedding_dropout=0.2", "model.residual_dropout=0.2", "mixer.attention_dropout=0.2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_average_follows_its_formula_and_weights_come_back_bit_for_bit(dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).to(dtype)
    model.bias.requires_grad_(False)
    average = WeightAverage(0.6)
    average.begin(model)
    expected = model.weight.detach().double().clone()
    for step in range(1, 9):
        with torch.no_grad():
            model.weight += torch.randn(2, 3).to(dtype)
        average.update(model)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert list(average.values) == ["weight"] and average.updates == 8
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(average.values["weight"].double(), expected, rtol=0, atol=tolerance)
    own = model.weight.detach().clone()
    with average.in_place(model):
        assert torch.equal(model.weight, average.values["weight"].to(dtype))
    assert torch.equal(model.weight, own)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shared_cache, composed):
    """Folders of a run, and of one that a signal ended after its second step and that went on."""
    place = tmp_path_factory.mktemp("averages")
    tiny = ["logger=csv", "batch_size=2", "data.validation_tokens=256", "model.num_layers=1", "model.d_model=32"]
    tiny += ["model.mlp_hidden=32", "trainer=cpu", f"data.cache_dir={shared_cache}"]

    def train(name: str, *words: str) -> None:
        try:
            run_module.train(composed([*tiny, *WORDS, *words], "train", place / "runs" / name))
        finally:
            HydraConfig.instance().cfg = None

    train("whole")
    original = TrainingModule._accumulate

    def signals(self, batch):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingModule, "_accumulate", signals)
        with pytest.raises(Interrupted):
            train("killed")
    train("killed", "resume=auto")
    train("without", "loop.ema_decay=null")
    return place / "runs"


def state_of(folder) -> dict:
    return load_checkpoint(CheckpointStore(folder / "checkpoints").latest())


def test_a_killed_run_goes_on_bit_for_bit_and_the_average_changes_no_weight(runs):
    whole, killed = state_of(runs / "whole"), state_of(runs / "killed")
    assert whole["ema_updates"] == killed["ema_updates"] == 6
    assert whole["ema"].keys() == whole["model"].keys()  # a tied head by both of its names
    for part in ("ema", "model"):
        assert all(torch.equal(tensor, killed[part][name]) for name, tensor in whole[part].items())
    assert not torch.equal(whole["ema"]["head.weight"], whole["model"]["head.weight"])
    without = state_of(runs / "without")
    assert "ema" not in without and not any("ema" in name for name in without)
    assert all(torch.equal(tensor, without["model"][name]) for name, tensor in whole["model"].items())
    logged = [read_metrics(runs / name) for name in ("whole", "killed")]
    for rows in logged:
        averaged = [
            row["validation_ema/loss"] for row in rows if not math.isnan(row.get("validation_ema/loss", math.nan))
        ]
        assert len(averaged) == 2
    assert logged[0][-1]["validation_ema/loss"] == logged[1][-1]["validation_ema/loss"]


def test_commands_take_the_averaged_weights(runs, compose_config, tmp_path):
    state = state_of(runs / "whole")
    validation = read_info(runs / "whole/checkpoints/step-00000006")["validation"]
    restored = restore(runs / "whole", weights="ema", device="cpu")
    assert all(torch.equal(weight, state["ema"][name]) for name, weight in restored.model.named_parameters())
    assert restored.model.head.weight is restored.model.embedding.weight
    digests = {restored.digest(), restore(runs / "whole", device="cpu").digest()}
    assert len(digests) == 2
    words = [f"checkpoint={runs / 'whole'}", "device=cpu", "weights=ema", "max_tokens=256", f"output={tmp_path}"]
    report = evaluate(compose_config(*words, entry_point="evaluate"))["loss"]
    (written,) = tmp_path.glob("loss_*.json")
    assert json.loads(written.read_text())["averaged"] == "ema"
    assert report["lengths"][32]["loss"] == pytest.approx(validation["ema_loss"], rel=1e-6)
    with pytest.raises(CheckpointError, match=r"has no averaged weights, so weights=ema cannot be had"):
        restore(runs / "without", weights="ema", device="cpu")
    with pytest.raises(ConfigError, match=r"loop\.ema_decay=1\.0 must be above 0 and below 1, or null to keep none"):
        run_module.train(compose_config("loop.ema_decay=1"))
