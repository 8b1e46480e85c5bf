"""Shared projections and activations in 8 bits: every strategy computes what one process computes."""

import pytest
import torch
from sliced import VOCABULARY
from strategic import trained

from longmix.config import ModelConfig
from longmix.model import packing
from longmix.model.build import build_model

SHARE = {"names": ["query", "value"], "atoms": 2}
CASES = {
    "shared": ({"share": SHARE}, 2.0**-8),
    "shared-mlp-int8": ({"share": SHARE | {"coefficients": "mlp"}, "saved_activations": "int8"}, 0.03),
}
"""The settings of a model, and the most by which gradients may differ: those of 8 bits by their noise besides."""


def trained_from(group, node, strategy):
    torch.manual_seed(3)
    model = build_model(ModelConfig.of(node), VOCABULARY)
    before, packing.LEAST_NUMBERS = packing.LEAST_NUMBERS, 256
    try:
        return trained(group, model, strategy)
    finally:
        packing.LEAST_NUMBERS = before


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("settings", "bound"), CASES.values(), ids=CASES)
def test_every_strategy_trains_as_one_process(pool, node_of, settings, bound):
    node = node_of("flash")
    share = node["model"]["share"] | settings["share"]
    node["model"] |= {"d_model": 32, "num_layers": 3, **settings, "share": share}
    alone = trained_from(None, node, "single")
    total = torch.nn.utils.get_total_norm(list(alone.gradients.values()))
    for strategy in ("ddp", "fsdp", "slices"):
        for run in pool.run(2, trained_from, node, strategy):
            assert run.losses == pytest.approx(alone.losses, rel=2e-3), strategy
            assert run.gradients.keys() == alone.gradients.keys()
            off = [run.gradients[name] - gradient for name, gradient in alone.gradients.items()]
            assert float(torch.nn.utils.get_total_norm(off) / total) < bound, strategy
