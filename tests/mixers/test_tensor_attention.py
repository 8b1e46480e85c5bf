"""Tensor attention against its definition."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.tensor import TensorAttention

ORACLES = Path(__file__).parents[1] / "fixtures/model_side"
PARTS = ("q", "k1", "k2", "v1", "v2")


@pytest.mark.parametrize("name", ["tensor_attention", "tensor_attention_window"])
def test_outputs_and_gradients_are_the_oracles(name):
    given = {key: torch.tensor(x) for key, x in np.load(ORACLES / f"{name}.npz").items()}
    tensors = query, k1, k2, v1, v2 = [given[part].requires_grad_() for part in PARTS]
    shape = ModelShape(query.shape[2] * query.shape[3], 1, query.shape[2])
    mixer = TensorAttention(shape, 0, window_1=int(given["window_1"]), window_2=int(given["window_2"]))
    mixed, _ = mixer.attend(Rows(query, k2, v2, key_labels=torch.cat((k1, v1), -1)))
    found = (mixed, *torch.autograd.grad(mixed, tensors, given["grad_o"]))
    for each, part in zip(found, ("o", *(f"grad_{part}" for part in PARTS)), strict=True):
        torch.testing.assert_close(each, given[part], rtol=0, atol=1e-12 * float(given[part].abs().max()))


@pytest.mark.parametrize("name", ["window_1", "window_2"])
def test_a_window_has_the_token_itself(name):
    with pytest.raises(ConfigError, match=rf"mixer\.{name}=0 must be at least 1"):
        TensorAttention(ModelShape(8, 1, 1), 0, **{name: 0})
