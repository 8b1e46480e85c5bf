"""The export of RWKV-7, read and run by the authors' own package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longmix.errors import ConfigError
from longmix.interop.rwkv import rwkv_weights
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.rwkv7 import RWKV7
from longmix.model.backbone import LanguageModel
from longmix.model.rwkv_blocks import RWKVBlocks
from longmix.model.tuned_states_file import tune_states

THEIRS = """
import json, sys, torch
from rwkv.model import RWKV
model = RWKV(sys.argv[1], "cpu fp32")
weights = torch.load(sys.argv[1] + ".pth")
state = model.generate_zero_state()
for layer in range(model.n_layer):
    name = f"blocks.{layer}.att.time_state"
    if name in weights:
        state[3 * layer + 1] = weights[name].float()
tokens = json.loads(sys.argv[2])
whole, state = model.forward(tokens[:-1], state, full_output=True)
last, state = model.forward(tokens[-1:], state)
json.dump(torch.cat([whole, last[None]]).tolist(), open(sys.argv[3], "w"))
"""
"""The package reads its settings from the environment as it is imported, so it runs in a process of its own."""


def small(mixer=lambda shape, index: RWKV7(shape, index, head_dim=16), **options) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(
        mixer, 40, d_model=48, num_layers=3, num_heads=3, mlp_hidden=64, norm_eps=1e-5, block=RWKVBlocks(), **options
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("tuned", [False, True], ids=["plain", "tuned-states"])
def test_the_rwkv_package_computes_the_same(tmp_path, tuned):
    pytest.importorskip("rwkv", reason="the rwkv package is an optional oracle")
    model = small()
    if tuned:
        tune_states(model)
        for mixer in model.mixers():
            torch.nn.init.normal_(mixer.tuned.initial["memory"])
    torch.save(rwkv_weights(model), tmp_path / "model.pth")
    tokens = torch.randint(40, (17,)).tolist()
    subprocess.run(
        [sys.executable, "-c", THEIRS, str(tmp_path / "model"), json.dumps(tokens), str(tmp_path / "logits.json")],
        env={**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"},
        check=True,
        timeout=550,
        capture_output=True,
    )
    theirs = torch.tensor(json.loads(Path(tmp_path / "logits.json").read_text()))
    with torch.no_grad():
        ours = model.logits(model(torch.tensor([tokens])).hidden)[0]
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_states_are_transposed():
    model = small()
    tune_states(model)
    state = model.mixers()[1].tuned.initial["memory"]
    torch.nn.init.normal_(state)
    assert torch.equal(rwkv_weights(model)["blocks.1.att.time_state"], state.transpose(1, 2))


def test_every_weight_is_exported_once():
    model = small()
    exported = rwkv_weights(model)
    placeholders = sum(exported[f"blocks.0.att.{name}"].numel() for name in ("v0", "v1", "v2"))
    assert sum(weight.numel() for weight in exported.values()) - placeholders == model.parameter_counts()["total"]


def test_other_layers_are_refused():
    def mixed(shape: ModelShape, index: int):
        return Flash(shape, index) if index == 1 else RWKV7(shape, index, head_dim=16)

    with pytest.raises(ConfigError, match=r"layer 1 is not RWKV-7's; this format needs mixer=rwkv7 and block=rwkv7"):
        rwkv_weights(small(mixed))
