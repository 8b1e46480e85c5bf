"""What passes a module is a pytree: `tree_leaves` finds every tensor of it, as FSDP's hooks need before torch 2.12."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_mixers import small_mixer
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from longmix.config import ModelConfig, resolved
from longmix.mixers.parts.base import MixerOutput
from longmix.mixers.parts.metrics import Entropy, LargestShare, Mean, MeanProduct, Measure, Occupied, RootMeanSquare
from longmix.model.backbone import LanguageModel, ModelOutput
from longmix.model.blocks import BlockState
from longmix.model.build import build_model

FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))
SMALL = ("model.num_layers=2", "model.d_model=32", "model.num_heads=2", "model.mlp_hidden=16")


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor that attributes and items of `value` lead to, whatever its class; those of modules aside."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from tensors(part)
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module | type):
        yield from tensors(vars(value))


def passes(model: LanguageModel) -> list[tuple[str, object]]:
    """What each module of the model is given and returns, with documents, with a state, and as it is generated from."""
    seen: list[tuple[str, object]] = []
    for module in model.modules():
        name = type(module).__name__
        module.register_forward_hook(lambda _, *passed, name=name: seen.append((name, passed)), with_kwargs=True)
    tokens = torch.arange(24).view(2, 12)
    ids = (torch.arange(12) // 7).int().expand(2, -1)
    model(tokens, tokens)
    state = model(tokens, tokens, document_ids=ids, state=model.init_state(2)).state
    model(tokens[:, :1], state=state)
    return seen


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FILES)
def test_every_tensor_that_passes_a_module_is_found(name, compose_config):
    node = resolved(compose_config(f"mixer={name}", *SMALL))
    node["mixer"] = small_mixer(node["mixer"], 4)
    seen = passes(build_model(ModelConfig.of(node), 24))
    kinds = {type(part) for _, passed in seen for part in passed}
    assert {MixerOutput, ModelOutput} <= kinds
    for module, passed in seen:
        found = {id(leaf) for leaf in tree_leaves(passed)}
        missing = [tensor.shape for tensor in tensors(passed) if id(tensor) not in found]
        assert not missing, module


@pytest.mark.parametrize("kind", [Mean, RootMeanSquare, MeanProduct, LargestShare, Entropy, Occupied])
def test_measures_come_back_from_their_leaves(kind):
    measure = kind(torch.ones(2, 2, dtype=torch.float64))
    doubled = tree_map(lambda leaf: 2 * leaf, measure)
    assert type(doubled) is kind
    assert torch.equal(doubled.sums, 2 * measure.sums)


@pytest.mark.parametrize("kind", [MixerOutput, ModelOutput, BlockState, Measure])
def test_all_fields_are_parts(kind):
    values = {field.name: torch.tensor(float(index)) for index, field in enumerate(dataclasses.fields(kind))}
    assert tree_leaves(kind(**values)) == list(values.values())
    assert vars(tree_map(lambda leaf: leaf, kind(**values))) == values
