"""FSDP in bf16-mixed gathers the weights of products in two bytes each, which changes nothing that is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sliced import VOCABULARY, rows
from small_mixers import small_mixer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from longmix.config import ModelConfig
from longmix.mixers.gla import GLA
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.recipe import recipe_of
from longmix.training import strategies
from longmix.training.strategies import names_of_product_weights

FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))


def model_of(node: dict) -> LanguageModel:
    """In which nothing begins at zero."""
    torch.manual_seed(3)
    model = build_model(ModelConfig.of(node), VOCABULARY)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


@pytest.fixture
def small_node(node_of):
    def node(name: str) -> dict:
        found = node_of(name)
        found["model"] |= {"d_model": 32, "mlp_hidden": 18, "num_layers": 2}
        found["mixer"] = small_mixer(found["mixer"], 4)
        return found

    return node


def computed(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Outputs and all gradients in bf16-mixed."""
    tokens, targets, ids = rows(packed=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        output = model(tokens, targets, document_ids=ids)
    (output.token_losses.mean() + sum(output.losses.values())).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"hidden": output.hidden.detach(), "losses": output.token_losses.detach(), **gradients}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FILES)
def test_autocast_rounds_the_same_weights_before_every_use(small_node, name):
    """A gate that fails here needs `set_recipe(weight, Recipe("scalar"))`, as every gate."""
    node = small_node(name)
    model, rounded = model_of(node), model_of(node)
    names = names_of_product_weights(model)
    for weight_name in names:
        weight = rounded.get_parameter(weight_name)
        weight.data = weight.data.bfloat16().float()
    found = computed(rounded)
    for key, wanted in computed(model).items():
        assert torch.equal(found[key], wanted), key
    matrices = {name for name, weight in model.named_parameters() if recipe_of(weight).role == "matrix"}
    assert names == matrices | {"head.weight"}


class GatheredBytes(TorchDispatchMode):
    """Adds up the bytes of gathered tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "allgather" in func._overloadpacket.__name__:
            self.total += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def gathered(group: dist.ProcessGroup, node: dict, products: torch.dtype | None) -> int:
    """Bytes that one process has gathered after a step's forward and backward pass."""
    model = model_of(node)
    strategies.shard(model, DeviceMesh.from_group(group, "cpu"), products)
    with GatheredBytes() as counted:
        computed(model)
    return counted.total


def bytes_wanted(model: LanguageModel, size: int, rounded: set[str]) -> int:
    """Each block is gathered twice, what is around them once, and shards are filled up to equal sizes."""
    total = 0
    for name, weight in model.named_parameters():
        each = 2 if name in rounded else 4
        passes = 2 if name.startswith("blocks.") else 1
        total += passes * each * size * -(-weight.shape[0] // size) * weight.shape[1:].numel()
    return total


@pytest.mark.parametrize("name", ["flash", "gla", "mlstm_tfla", "nsa"])
def test_a_step_gathers_matrices_in_two_bytes(pool, small_node, name):
    node = small_node(name)
    model = model_of(node)
    names = names_of_product_weights(model)
    share = sum(model.get_parameter(key).numel() for key in names) / sum(w.numel() for w in model.parameters())
    for size in (2, 4):
        wanted = bytes_wanted(model, size, names)
        for found in pool.run(size, gathered, node, torch.bfloat16):
            assert wanted <= found <= wanted + 2 * size * 5  # an odd number is filled up
        (whole, *_) = pool.run(size, gathered, node, None)
        assert whole == bytes_wanted(model, size, set())
        assert found < whole * (1 - 0.4 * share)


def weights_seen(group: dist.ProcessGroup, node: dict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights in the forward pass, and those that are saved behind it."""
    model = model_of(node)
    strategies.shard(model, DeviceMesh.from_group(group, "cpu"), torch.bfloat16)
    seen = {}

    def note(module: nn.Module, _inputs: Any) -> None:
        seen.update({names[module] + name: x.detach().clone() for name, x in module.named_parameters(recurse=False)})

    names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    for module in names:
        module.register_forward_pre_hook(note)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model(*rows(packed=False)[:1])
    seen["head.weight"] = model.head.weight.detach().clone()  # behind the last pass it stays whole
    return seen, {name: strategies.whole(weight) for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_weights_of_products_arrive_rounded_and_others_and_saved_ones_exact(pool, small_node, size):
    node = small_node("rwkv7")
    model = model_of(node)
    names = names_of_product_weights(model)
    for seen, saved in pool.run(size, weights_seen, node):
        assert seen.keys() == {name for name, _ in model.named_parameters()}
        for name, weight in seen.items():
            whole = model.get_parameter(name).detach()
            assert torch.equal(weight, whole.bfloat16().float() if name in names else whole), name
        assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())


class Theirs(GLA):
    """A mixer of another package."""


def test_how_other_packages_use_their_weights_is_not_known():
    def model(mixer, **settings):
        return LanguageModel(mixer, 13, d_model=16, num_layers=1, num_heads=2, mlp_hidden=8, **settings)

    mlp = {f"blocks.0.mlp.{name}.weight" for name in ("gate", "up", "down")}
    assert names_of_product_weights(model(Theirs)) == mlp | {"head.weight"}
    assert names_of_product_weights(model(Theirs, tie_head=True)) == mlp
    assert names_of_product_weights(model(GLA)) > mlp | {"head.weight"}


def mistaken(group: dist.ProcessGroup, node: dict) -> str:
    model = model_of(node)
    with pytest.MonkeyPatch.context() as patch:
        from longmix.distributed import rounded_gather

        own = rounded_gather._own_weights
        patch.setattr(rounded_gather, "_own_weights", lambda module: own(module)[::-1])
        strategies.shard(model, DeviceMesh.from_group(group, "cpu"), torch.bfloat16)
    with pytest.raises(RuntimeError) as error:
        computed(model)
    return str(error.value)


def test_an_unknown_order_of_weights_is_refused(pool, small_node):
    for found in pool.run(2, mistaken, small_node("flash")):
        assert "in an order that longmix does not know" in found
