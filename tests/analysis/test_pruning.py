"""Greedy pruning: its decisions, and that a part left out adds nothing while the model's weights stay."""

import ast
import json
from pathlib import Path

import pytest
import torch

from longmix.analysis.pruning import Part, channel_exit, greedy, head_exit, masks, parts_of, savings, without

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures/model_side/pruning_greedy.json").read_text())
MIXERS = [
    "flash",
    "routing",
    "scatterbrain",
    "gated_deltanet",
    "gla",
    "nsa",
    "tensor",
    "mlstm_tfla",
    "retention",
    pytest.param("rwkv7", marks=pytest.mark.slow),
]


def part_of(text: str) -> Part:
    kind, *place = ast.literal_eval(text)
    return Part({"attention": "mixer"}.get(kind, kind), *place)


def loss_of(removed: frozenset[Part]) -> float:
    single = {part_of(name): value for name, value in FIXTURE["single"].items()}
    pairs = {frozenset(map(part_of, names.split("|"))): value for names, value in FIXTURE["pairs"].items()}
    return (
        FIXTURE["base"]
        + sum(single[part] for part in removed)
        + sum(value for pair, value in pairs.items() if pair <= removed)
    )


@pytest.mark.parametrize("run", FIXTURE["runs"], ids=lambda run: f"margin {run['eps']}")
def test_decisions(run):
    found = greedy([FIXTURE["heads"]] * FIXTURE["layers"], loss_of, run["eps"])
    assert found.removed == tuple(map(part_of, run["removed"])) and found.loss == pytest.approx(run["loss"])
    assert [(t.part, t.removed) for t in found.trials] == [(part_of(t["tried"]), t["removed"]) for t in run["log"]]
    assert [t.loss for t in found.trials] == pytest.approx([t["loss"] for t in run["log"]], abs=1e-9)


def test_the_best_follows_down_and_the_margin_is_not_spent_twice():
    """0.9 and then 0.95 are within 0.1 of the best so far; 1.02 is within 0.1 of the last alone."""
    losses = {0: 1.0, 1: 0.9, 2: 0.95, 3: 1.02}
    found = greedy([0, 0], lambda removed: losses[len(removed)], 0.1, groups=[0, 0])
    assert [str(part) for part in found.removed] == ["layer 1 mlp", "layer 1 mixer"] and found.loss == 0.95
    assert not greedy([1], lambda removed: float("nan") if removed else 1.0, 0.1).removed, "no loss without a number"


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_what_is_left_out_adds_nothing(small_model, name):
    model = small_model(name)
    tokens = torch.randint(20, (2, 17), generator=torch.Generator().manual_seed(0))
    whole, block = model(tokens).hidden, model.blocks[1]
    leave, heads = head_exit(block.mixer)
    every = [Part("head", 1, number) for number in range(heads)]
    seen = {}
    watch = block.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output.y))
    with without(model, [Part("mixer", 1), Part("mlp", 1)]):
        model(tokens)
    assert torch.equal(seen["x"], seen["y"])
    watch.remove()
    with without(model, [Part("mixer", 1)]):
        mixerless = model(tokens).hidden
    with without(model, every):
        torch.testing.assert_close(model(tokens).hidden, mixerless, rtol=1e-12, atol=1e-12)
    width = leave.in_features // heads
    kept = leave.weight.clone()
    leave.weight[:, :width] = 0
    cut = model(tokens).hidden
    leave.weight.copy_(kept)
    with without(model, every[:1]):
        torch.testing.assert_close(model(tokens).hidden, cut, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(tokens).hidden, whole)


def test_heads_of_values_count_where_several_share_the_keys_of_one(small_model):
    """Each of them alone adds what its own columns of the output's weight make of it."""
    model = small_model("gated_deltanet", "mixer.num_heads=2", "mixer.num_value_heads=4")
    assert parts_of(model, None)[0] == [4, 4] and len(masks(model, [])["heads"][0]) == 4
    mixer = model.blocks[0].mixer
    one = savings(model, [Part("head", 0, 3)], 64)
    assert one.parameters == round(sum(weight.numel() for weight in mixer.parameters()) / 4)
    x = torch.randn(1, 9, model.embedding.embedding_dim, dtype=torch.float64)
    whole, parts = mixer(x).y, torch.zeros((), dtype=torch.float64)
    for number in range(4):
        with without(model, [Part("head", 0, number)]):
            parts = parts + whole - mixer(x).y
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_groups_of_channels_and_what_is_saved(small_model):
    model = small_model("flash")
    tokens = torch.randint(20, (1, 9), generator=torch.Generator().manual_seed(0))
    _, channels = channel_exit(model.blocks[0].mlp)
    groups = [Part("channels", 0, number) for number in range(-(-channels // 5))]
    with without(model, groups, 5):
        found = model(tokens).hidden
    with without(model, [Part("mlp", 0)]):
        torch.testing.assert_close(found, model(tokens).hidden)
    mlp = sum(weight.numel() for weight in model.blocks[0].mlp.parameters())
    assert savings(model, groups, 64, 5).parameters == mlp
    norm = model.blocks[0].mlp_norm.weight.numel()
    assert savings(model, [Part("mlp", 0)], 64).parameters == mlp + norm
    assert savings(model, [Part("mlp", 0)], 64).flops == model.blocks[0].mlp.flops(64)
    told = masks(model, [Part("head", 1, 2), groups[1]], 5)
    assert told["heads"] == [[1, 1, 1, 1], [1, 1, 0, 1]] and told["channels"][0][:3] == [1, 0, 1]
