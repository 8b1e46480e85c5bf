import pytest
import torch

from longmix.errors import ConfigError
from longmix.training.hardware import TrainerSettings, peak_flops, peak_memory_bytes


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Some GPU of tomorrow", None),
    ],
)
def test_peak_by_device_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops(torch.device("cuda"), "bf16-mixed") == peak
    assert peak_flops(torch.device("cuda"), "32-true") is None


def test_no_peak_is_claimed_for_a_cpu():
    assert peak_flops(torch.device("cpu"), "32-true") is None


@pytest.mark.slow
def test_peak_memory_is_that_of_this_process():
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(before // 4 + 50_000_000, dtype=torch.float32)
    assert peak_memory_bytes(torch.device("cpu")) > before
    del block


REFUSED = {
    "devices": ({"devices": 0}, "trainer.devices=0"),
    "micro": ({"micro_batch_size": 0}, "trainer.micro_batch_size=0"),
    "single-two": ({"devices": 2}, "trainer.strategy=single"),
    "timeout": ({"timeout": 0}, "trainer.timeout=0 must be seconds above 0"),
    "slices": ({"context_parallel": 0}, "trainer.context_parallel=0"),
    "slices-divide": ({"strategy": "ddp", "devices": 4, "context_parallel": 3}, "trainer.context_parallel=3 .* 4 proc"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_impossible_settings_are_refused_by_name(change, words):
    with pytest.raises(ConfigError, match=words):
        TrainerSettings(accelerator="cpu", **change)


def test_no_gpu_is_said_plainly(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        TrainerSettings(accelerator="gpu")


@pytest.mark.parametrize(
    ("batch", "devices", "micro", "words"),
    [(3, 2, None, "batch_size=3"), (1, 2, None, "batch_size=1"), (8, 2, 3, "trainer.micro_batch_size=3")],
)
def test_batches_that_do_not_divide_are_refused(batch, devices, micro, words):
    settings = TrainerSettings(accelerator="cpu", strategy="ddp", devices=devices, micro_batch_size=micro)
    with pytest.raises(ConfigError, match=words):
        settings.check_batch(batch)


@pytest.mark.parametrize(
    ("shared", "slices", "fits", "does_not"), [(1, 1, 4, 6), (2, 2, 2, 3), (None, 4, 1, 0)], ids=["own", "pairs", "all"]
)
def test_processes_that_share_rows_count_as_one(shared, slices, fits, does_not):
    settings = TrainerSettings(accelerator="cpu", strategy="ddp", devices=4, context_parallel=shared)
    assert settings.slices == slices
    settings.check_batch(fits)
    with pytest.raises(ConfigError, match=f"batch_size={does_not} does not divide"):
        settings.check_batch(does_not)


def test_precision_follows_the_device(monkeypatch):
    assert TrainerSettings(accelerator="cpu").precision_in_use == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TrainerSettings(accelerator="gpu").precision_in_use == "bf16-mixed"


def test_blocks_are_compiled_on_a_gpu_unless_said_otherwise(monkeypatch):
    assert not TrainerSettings(accelerator="cpu").compiles
    assert TrainerSettings(accelerator="cpu", compile=True).compiles
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert TrainerSettings().compiles
    assert not TrainerSettings(compile=False).compiles
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not TrainerSettings(compile=False).compiles
    with pytest.raises(ConfigError, match=r"trainer\.compile needs Triton on a GPU, .* set trainer\.compile=false"):
        TrainerSettings()
