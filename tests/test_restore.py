"""A model that is rebuilt from its checkpoint stands in memory once, with the configuration as it was written."""

import gc

import torch
import yaml

from longmix.config import plain
from longmix.restore import restore


def live_bytes() -> int:
    gc.collect()
    kinds = torch.Tensor, torch.nn.Parameter  # and none without memory, such as fake tensors
    tensors = [item for item in gc.get_objects() if type(item) in kinds and item.device.type == "cpu"]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_weights_are_held_once(run_training, tiny_overrides):
    folder = run_training(*tiny_overrides, "seq_len=32", "model.d_model=64")
    before = live_bytes()
    restored = restore(folder)
    weights = sum(weight.nbytes for weight in restored.model.parameters())
    assert weights <= live_bytes() - before < 1.5 * weights


def test_the_configuration_is_there_as_written_and_typed(run_training, tiny_overrides):
    folder = run_training(*tiny_overrides, "seq_len=32")
    restored = restore(folder)
    assert restored.step == 2
    assert restored.written == yaml.safe_load((folder / "config.yaml").read_text())
    typed = plain(restored.config)
    assert typed == {name: restored.written[name] for name in typed} and typed["seq_len"] == 32
