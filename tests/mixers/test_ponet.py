"""PoNet in its streamable form: the numbers of the fixture with gradients, also in pieces, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.errors import ConfigError
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.rotary import token_positions
from longmix.mixers.ponet import PoNet

FIXTURE = np.load(Path(__file__).parents[1] / "fixtures/model_side/ponet_online.npz")
HEAD_FIRST = ("q", "k", "o")


def test_the_fixture_with_gradients():
    """Two documents of unlike length, of which neither ends with a segment."""
    given = {name: torch.from_numpy(FIXTURE[name]) for name in FIXTURE}
    inputs = [given[name].requires_grad_() for name in (*HEAD_FIRST, "segment", "local")]
    mixer = PoNet(ModelShape(6, 1, 2), 0, segment=int(given["segment_length"])).double()
    ids = given["document_ids"]
    parts = [part.transpose(1, 2).flatten(2) for part in inputs[:3]]
    found, _ = mixer.pooled(
        *parts,
        *inputs[3:],
        positions=token_positions(ids, None, None, ids.shape[1], ids.device),
        before=mixer.init_state(1),
        ids=ids,
    )
    torch.testing.assert_close(found, given["y"], rtol=0, atol=1e-12)
    grads = torch.autograd.grad((found * given["grad_y"]).sum(), inputs)
    for name, grad in zip((*HEAD_FIRST, "segment", "local"), grads, strict=True):
        torch.testing.assert_close(grad, given[f"grad_{name}"], rtol=0, atol=1e-12 * given[f"grad_{name}"].abs().max())


@pytest.mark.parametrize(("settings", "words"), [({"segment": 0}, "mixer.segment=0 must be at least 1")])
def test_impossible_settings_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        PoNet(ModelShape(6, 1, 2), 0, **settings)
