"""float32 on a GPU works, is slow, and is said to be so once a run."""

import warnings

import pytest
import torch

from longmix import notices, restore
from longmix.config import TrainConfig, read
from longmix.distributed.agreement import Processes
from longmix.model.build import build_model
from longmix.notices import LongmixWarning
from longmix.training import run
from longmix.training.hardware import TrainerSettings

MODEL = ("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_hidden=16", "seq_len=16")
SLOW = (
    "{} on a GPU: longmix's float32 kernels leave tensor cores unused; they are slow, and meant for checks. "
    "Give {}, which keeps weights, gates and states in float32."
)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def heard():
    """The notices that Python's warnings show."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield lambda: [str(item.message) for item in found if issubclass(item.category, LongmixWarning)]


def begin(compose_config, precision: str, accelerator: str) -> None:
    """What a run does before its first step."""
    config = read(TrainConfig, compose_config("mixer=gla", "trainer=cpu", *MODEL))
    settings = TrainerSettings(accelerator=accelerator, precision=precision, compile=False)
    run._module(config, build_model(config, 20), settings, Processes(), 0)


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_training_in_float32_on_a_gpu_is_noticed(gpu, heard, compose_config, accelerator):
    begin(compose_config, "32-true", accelerator)
    assert heard() == [SLOW.format("trainer.precision=32-true", "trainer.precision=bf16-mixed")]


@pytest.mark.parametrize(
    ("precision", "accelerator"), [("auto", "gpu"), ("bf16-mixed", "gpu"), ("bf16-true", "gpu"), ("32-true", "cpu")]
)
def test_other_precisions_and_places_are_not(gpu, heard, compose_config, precision, accelerator):
    begin(compose_config, precision, accelerator)
    assert heard() == []


@pytest.mark.parametrize(
    ("device", "precision", "said"),
    [("cuda", "float32", True), ("auto", "float32", True), ("cuda", "auto", False), ("cpu", "float32", False)],
)
def test_so_are_evaluation_and_generation(gpu, heard, device, precision, said):
    restore._device_and_precision(device, precision)
    assert heard() == [SLOW.format("precision=float32", "precision=bf16")] * said


def test_a_run_says_it_once(gpu, capsys, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    with warnings.catch_warnings():
        notices.show_in_one_line()
        for _ in range(3):
            restore._device_and_precision("cuda", "float32")
    assert capsys.readouterr().err == f"Warning: {SLOW.format('precision=float32', 'precision=bf16')}\n"
