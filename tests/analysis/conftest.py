"""Small models of every mixer, for the tests of what looks into them."""

import functools
from collections.abc import Callable

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from small_mixers import small_mixer

from longmix.config import Node, resolved
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model

VOCABULARY = 20


@pytest.fixture(scope="session")
def small_config(composed, tmp_path_factory) -> Callable[..., Node]:
    """The resolved configuration of a small model, composed once a session since that takes longer than the model."""
    folder = tmp_path_factory.mktemp("small")

    @functools.cache
    def compose(*overrides: str) -> Node:
        sizes = ("model.d_model=64", "model.num_layers=2", "model.num_heads=4", "model.mlp_hidden=32")
        config = resolved(composed([*sizes, *overrides], "train", folder))
        HydraConfig.instance().cfg = None
        if "pattern" not in config["mixer"]:
            config["mixer"] = small_mixer(config["mixer"], 8)
        return config

    return compose


@pytest.fixture
def small_model(small_config) -> Callable[..., LanguageModel]:
    """`small_model("flash")` is a model of 2 layers with that mixer, with no weight at zero, in evaluation mode."""

    def build(mixer: str, *overrides: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
        torch.manual_seed(3)
        model = build_model(small_config(f"mixer={mixer}", *overrides), VOCABULARY)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.abs().max() > 0:
                    parameter.normal_(std=0.2)
        return model.to(dtype).eval()

    return build
