"""The damage of each layer: by definition in plain code, and without a trace in what was there before."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from longmix.composing import composed
from longmix.config import Choice, ModelConfig, TrainConfig, plain
from longmix.config import read as read_config
from longmix.conversion.transfer import transfer
from longmix.mixers.parts.between_steps import finish_step
from longmix.model.build import build_model
from longmix.recipe import recipe_of
from longmix.training.damage import LEARNING_RATE, learn, measure
from longmix.training.identity import changes

VOCABULARY, LENGTH, STEPS = 31, 20, 3
SMALL = ("model.num_layers=3", "model.d_model=32", "model.num_heads=2", "model.mlp_hidden=16", "mixer=flash")


@pytest.fixture(scope="module")
def teacher():
    config = ModelConfig.of(composed("train", [*SMALL]).content)
    torch.manual_seed(3)
    net = build_model(config, VOCABULARY).double()
    for weight in net.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return net.eval().requires_grad_(False), config


def choice(*words):
    return Choice.of("mixer", composed("train", [*words]).content["mixer"])


def batches(count, seed):
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(VOCABULARY, (1, LENGTH + 1), generator=drawn)
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "document_ids": None}


HELD_OUT = next(batches(1, 9))


def loss(net):
    with torch.no_grad():
        output = net(HELD_OUT["tokens"], HELD_OUT["targets"])
    return output.token_losses.mean().item()


def walked(net, tokens, layer=None, mixer=None):
    """The hidden states, and the input of each mixer, with another mixer in one layer."""
    x, inputs = net.embedding(tokens), []
    for index, block in enumerate(net.blocks):
        inputs.append(block.mixer_norm(x))
        x = x + (mixer if index == layer else block.mixer)(inputs[-1]).y
        x = x + block.mlp(block.mlp_norm(x)).y
    return net.norm(x), inputs


def loss_by_definition(net, layer=None, mixer=None):
    with torch.no_grad():
        hidden, _ = walked(net, HELD_OUT["tokens"], layer, mixer)
        return F.cross_entropy((hidden @ net.head.weight.T)[0], HELD_OUT["targets"][0]).item()


def learned_alone(net, mixer, layer, share):
    """One mixer learns its layer's output, in a loop of its own."""
    groups = [{"params": [w], "lr": LEARNING_RATE * recipe_of(w).learning_rate_multiplier} for w in mixer.parameters()]
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in enumerate(batches(STEPS, 4)):
        with torch.no_grad():
            given = walked(net, batch["tokens"])[1][layer]
            wanted = net.blocks[layer].mixer(given).y
        error = (mixer(given).y - wanted).square().sum() / wanted.square().sum()
        optimizer.zero_grad()
        (share * error).backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / STEPS)
        optimizer.step()


@pytest.mark.parametrize("steps", [0, pytest.param(STEPS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("words", [("mixer=sliding_window", "mixer.window=3"), ("mixer=gla",)], ids=" ".join)
def test_damage_is_the_loss_with_one_layer_converted(teacher, words, steps):
    net, config = teacher
    new = choice(*words)
    found = measure(net, config, new, batches(STEPS, 4), loss, steps=steps, seed=5)
    torch.manual_seed(5)
    student = build_model(ModelConfig(mixer=new, model=config.model), VOCABULARY).double()
    transfer(student, net.state_dict(), config)
    expected = []
    for layer, mixer in enumerate(student.mixers()):
        if steps:
            learned_alone(net, mixer, layer, 1 / 3)
        expected.append(loss_by_definition(net, layer, mixer))
    assert found.before == pytest.approx(loss_by_definition(net), abs=1e-12)
    assert list(found.losses) == pytest.approx(expected, abs=1e-10)
    assert found.of_layers == pytest.approx([each - found.before for each in expected], abs=1e-10)
    assert found.learned == steps * LENGTH and min(map(abs, found.of_layers)) > 1e-5


@pytest.mark.slow
def test_a_measurement_leaves_teacher_and_random_numbers_as_they_were(teacher):
    net, config = teacher
    before, mixers = copy.deepcopy(net.state_dict()), [id(mixer) for mixer in net.mixers()]
    torch.manual_seed(1)
    expected = torch.randn(4)
    torch.manual_seed(1)
    first = measure(net, config, choice("mixer=gla"), batches(STEPS, 4), loss, steps=STEPS, seed=5)
    assert torch.equal(torch.randn(4), expected)
    assert [id(mixer) for mixer in net.mixers()] == mixers
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    assert measure(net, config, choice("mixer=gla"), batches(STEPS, 4), loss, steps=STEPS, seed=5) == first


def test_the_same_mixer_does_no_damage(teacher):
    net, config = teacher
    found = measure(net, config, choice("mixer=flash"), batches(STEPS, 4), loss, steps=STEPS, seed=5)
    assert found.of_layers == [0.0, 0.0, 0.0] and found.learned == 0


@pytest.mark.slow
def test_a_command_means_the_run_that_has_measured_which_layers():
    """`resume=auto` without a name looks for the run of its configuration before anything is measured."""

    def config(pattern, keep):
        node = composed("train", ["mixer=gla+flash", "checkpoint=x", "convert=true", f"keep={keep}"]).content
        node["mixer"] = {**node["mixer"], "pattern": pattern}
        return read_config(TrainConfig, node)

    asked = config(["flash", "gla", "gla"], 1)
    assert set(changes(plain(config(["gla", "flash", "gla"], 1)), asked)) == {"checkpoint"}
    for other in (config(["gla", "flash", "flash"], 2), config(["gla", "flash", "flash"], 1)):
        assert set(changes(plain(other), asked)) & {"keep", "mixer.pattern"}
    named = config(["flash", "gla", "gla"], "[0]")
    assert "mixer.pattern" in changes(plain(config(["gla", "flash", "gla"], "[0]")), named)


def test_statistics_of_mixers_move_as_the_mixers_learn(teacher):
    """As in training, where they move after each step: means of keys over the steps so far."""
    net, config = teacher
    new = choice("mixer=sparse_flash", "mixer.window=4")
    torch.manual_seed(0)
    student = build_model(ModelConfig(mixer=new, model=config.model), VOCABULARY).double()
    transfer(student, net.state_dict(), config)
    with torch.no_grad():
        given = [walked(net, batch["tokens"])[1][0] for batch in batches(STEPS, 4)]
    wanted = student.mixers()[0].train().key_center
    first = copy.deepcopy(student)
    first.mixers()[0](given[0])
    finish_step(first, True, lambda seen: seen)
    learn(student, net, batches(STEPS, 4), 1, nullcontext)
    torch.testing.assert_close(wanted.value, first.mixers()[0].key_center.value, rtol=1e-12, atol=0)
    learn(student, net, batches(STEPS, 4), STEPS, nullcontext)
    assert wanted.updates == 1 + STEPS
