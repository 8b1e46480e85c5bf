"""Activations that are kept in 8 bits: the rounding, what comes of it, and what it saves."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from longmix.mixers.flash import Flash
from longmix.mixers.gated_deltanet import GatedDeltaNet
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.rwkv7 import RWKV7
from longmix.model import packing
from longmix.model.backbone import LanguageModel
from longmix.model.packing import codes_of, group_size, packed, restored
from longmix.model.rwkv_blocks import RWKVBlocks
from longmix.model.saved import Int8Linear
from longmix.model.sharing import Sharing

FOLDER = Path(__file__).parents[1] / "fixtures/model_side"
SIZES = {"d_model": 64, "num_layers": 2, "num_heads": 2, "mlp_hidden": 160}
TOKENS = torch.randint(50, (2, 96), generator=torch.Generator().manual_seed(1))
IDS = (torch.arange(96) >= 37).int().expand(2, -1).contiguous()
MODELS = {
    "flash": (Flash, {}),
    "mlstm_tfla": (MLSTMTFLA, {}),
    "gated_deltanet": (GatedDeltaNet, {}),
    "rwkv7": (partial(RWKV7, head_dim=32), {"block": RWKVBlocks()}),
    "shared": (Flash, {"share": Sharing(["query", "key"], 1)}),
}


def model(kind=Flash, **options) -> LanguageModel:
    """In which nothing begins at zero."""
    torch.manual_seed(0)
    net = LanguageModel(lambda shape, index: kind(shape, index), 50, **{**SIZES, **options})
    for weight in net.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return net


def gradients(net: LanguageModel, mixed: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
        losses = net(TOKENS, TOKENS, document_ids=IDS).token_losses
    losses.mean().backward()
    return losses.detach(), {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}


def by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[groups, numbers], as Mesa orders them: groups of channels, or heads where there is an axis of them."""
    if x.ndim == 4:
        return x.transpose(0, 1).reshape(groups, -1)
    return x.unflatten(-1, (groups, -1)).permute(2, 0, 1, 3).reshape(groups, -1)


@pytest.mark.parametrize("name", ["mesa_quantise", "mesa_quantise_heads"])
def test_codes_are_those_of_the_authors_with_both_ends_kept(name):
    found = np.load(FOLDER / f"{name}.npz")
    groups, most = int(found["groups"]), int(found["levels"]) - 1
    beyond = 0
    for update in range(3):
        x, low, width = (torch.from_numpy(found[f"{key}{update}"]) for key in ("x", "low", "range"))
        low, step = low[:, None], width[:, None] / most
        codes = codes_of(by_group(x, groups) - low, step, torch.tensor(0.5), 0, most)
        assert torch.equal(codes.to(torch.uint8), torch.from_numpy(found[f"codes{update}"]))
        again = torch.from_numpy(found[f"restored{update}"])
        assert torch.allclose(codes * step + low, by_group(again, groups), rtol=1e-12, atol=1e-12)
        beyond += int((found[f"restored{update}"] != found[f"restored_wrapped{update}"]).sum())
    assert beyond  # the cases have numbers beyond the range


def test_rounding_has_no_bias_and_errs_by_less_than_a_step():
    torch.manual_seed(0)
    x = torch.randn(40, 160) * torch.logspace(-3, 3, 40)[:, None]
    x[3] = 0.0
    x[:, 7] = 0.0
    total = torch.zeros_like(x)
    draws = 200
    for _ in range(draws):
        kept = packed(x)
        steps = kept.scale.repeat_interleave(group_size(160), -1)
        again = restored(kept.codes, kept.scale, torch.float32)
        assert ((again - x).abs() <= steps * 1.0001).all()
        assert (again[x == 0] == 0).all()
        total += again
    error = (total / draws - x)[steps > 0] / steps[steps > 0]
    assert float(error.abs().mean()) < 2 * 0.4 / draws**0.5
    assert abs(float(error.mean())) < 4 * 0.5 / (draws * error.numel()) ** 0.5
    assert kept.codes.dtype == torch.int8 and kept.scale.shape == (40, 2)
    assert packed(torch.randn(31, 128)) is None


def test_a_long_input_is_rounded_in_pieces(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    monkeypatch.setattr(packing, "SLICE_NUMBERS", 1000)
    kept = packed(x)
    again = restored(kept.codes, kept.scale, torch.float64)
    assert float((again - x).abs().max()) < float(kept.scale.max())


@pytest.mark.parametrize(("channels", "size"), [(128, 128), (768, 128), (352, 88), (2752, 86), (101, 101), (134, 67)])
def test_groups_divide_the_channels(channels, size):
    assert group_size(channels) == size


@pytest.mark.parametrize("mixed", [False, True], ids=["exact", "bf16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_same_and_gradients_point_the_same_way(name, mixed, monkeypatch):
    monkeypatch.setattr(packing, "LEAST_NUMBERS", 0)
    kind, options = MODELS[name]
    losses, expected = gradients(model(kind, **options), mixed)
    again, found = gradients(model(kind, saved_activations="int8", **options), mixed)
    assert torch.equal(losses, again)
    assert found.keys() == expected.keys()
    both = [torch.cat([each[name].flatten() for name in expected]) for each in (found, expected)]
    assert not torch.equal(*both)
    assert float(torch.cosine_similarity(*both, dim=0)) > 0.9995
    for weight, gradient in expected.items():
        if gradient.numel() > 100:
            cosine = torch.cosine_similarity(found[weight].flatten(), gradient.flatten(), dim=0)
            assert float(cosine) > 0.995, weight


def test_gradients_have_no_bias(monkeypatch):
    monkeypatch.setattr(packing, "LEAST_NUMBERS", 0)
    torch.manual_seed(0)
    x, weight = torch.randn(64, 128), torch.randn(32, 128)
    layer = Int8Linear(128, 32, bias=True)
    layer.weight.data.copy_(weight)
    total, single = 0.0, 0.0
    expected = None
    for _ in range(100):
        layer.zero_grad()
        layer(x.clone()).square().sum().backward()
        if expected is None:
            y = x @ weight.T + layer.bias.detach()
            expected = 2 * y.T @ x
            assert torch.allclose(layer.bias.grad, 2 * y.sum(0), rtol=1e-4, atol=1e-2)
        single += float((layer.weight.grad - expected).norm()) / 100
        total = total + layer.weight.grad / 100
    assert float((total - expected).norm()) < 1.5 * single / 100**0.5


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
@pytest.mark.parametrize("name", ["flash", "shared"])
def test_a_block_that_is_run_again_draws_the_same(name, checkpointing):
    kind, options = MODELS[name]
    _, expected = gradients(model(kind, saved_activations="int8", **options))
    _, found = gradients(model(kind, saved_activations="int8", activation_checkpointing=checkpointing, **options))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_what_is_kept_takes_half_and_layers_with_one_input_share_its_codes():
    seen: dict[str, dict[int, int]] = {}
    for word in ("exact", "int8"):
        net, kept = model(saved_activations=word), {}
        own = {weight.untyped_storage()._cdata for weight in net.parameters()}

        def note(x: torch.Tensor, own=own, kept=kept) -> torch.Tensor:
            if x.untyped_storage()._cdata not in own:
                kept[x.untyped_storage()._cdata] = x
            return x

        with saved_tensors_hooks(note, lambda x: x):
            output = net(TOKENS, TOKENS)
        seen[word] = {key: x.untyped_storage().nbytes() for key, x in kept.items()}
        codes = [x for x in kept.values() if x.dtype == torch.int8]
        # norm, q-k-v's input, q, k, output's input; norm, gate-up's input, gate, up
        assert len(codes) == (0 if word == "exact" else SIZES["num_layers"] * 9)
        del output
    assert sum(seen["int8"].values()) < 0.5 * sum(seen["exact"].values())


def test_evaluation_and_small_inputs_are_as_they_were():
    net = model(saved_activations="int8")
    assert net.draws() and not model().draws()
    assert {type(part) for part in net.modules()}.isdisjoint({nn.RMSNorm} & {type(part) for part in net.blocks})
    with torch.no_grad():
        state = torch.get_rng_state()
        assert torch.equal(net(TOKENS).hidden, model()(TOKENS).hidden)
        assert torch.equal(torch.get_rng_state(), state)
    small = TOKENS[:1, :16]
    losses = [each(small, small).token_losses for each in (net, model())]
    for each in losses:
        each.mean().backward()
    assert torch.equal(*losses)
    assert list(net.state_dict()) == list(model().state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "shared"])
def test_whole_blocks_compile(name):
    kind, options = MODELS[name]
    losses, expected = gradients(model(kind, **options))
    net = model(kind, saved_activations="int8", **options)
    for block in net.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    again, found = gradients(net)
    assert torch.allclose(losses, again, atol=1e-5)
    both = [torch.cat([each[name].flatten() for name in expected]) for each in (found, expected)]
    assert float(torch.cosine_similarity(*both, dim=0)) > 0.9995
