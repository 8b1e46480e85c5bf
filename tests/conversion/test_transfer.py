"""What a model with other mixers takes of a teacher's weights."""

from pathlib import Path

import pytest
import torch
from small_mixers import small_mixer

from longmix.composing import composed
from longmix.config import ModelConfig
from longmix.conversion.transfer import transfer
from longmix.model.build import build_model
from longmix.model.tuned_states_file import MARK, tune_states

FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/mixer").glob("*.yaml"))
SMALL = ("model.num_layers=2", "model.d_model=32", "model.num_heads=2", "model.mlp_hidden=16")
ROLES = ("query", "key", "value", "output")


def model_of(*words, seed=0, small=None):
    node = dict(composed("train", [*SMALL, *words]).content)
    if small:
        node["mixer"] = small_mixer(node["mixer"], small)
    torch.manual_seed(seed)
    config = ModelConfig.of(node)
    return build_model(config, 47).double(), config


def given(student, teacher):
    (model, _), (other, config) = student, teacher
    before = {name: x.clone() for name, x in model.state_dict().items()}
    return transfer(model, other.state_dict(), config), before, model.state_dict(), other.state_dict()


@pytest.mark.parametrize("mixer", ["flash", "flash+gated_deltanet"])
def test_the_same_mixers_are_the_same_model(mixer):
    student, teacher = model_of(f"mixer={mixer}", seed=1), model_of(f"mixer={mixer}")
    report, _, after, theirs = given(student, teacher)
    assert not report.new and not report.repeated and set(report.taken) == set(theirs)
    assert all(torch.equal(after[name], x) for name, x in theirs.items())
    tokens = torch.randint(47, (2, 20))
    assert torch.equal(student[0](tokens).hidden, teacher[0](tokens).hidden)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FILES)
def test_every_mixer_takes_what_fits_and_says_what_is_new(name):
    student = model_of(f"mixer={name}", seed=1, small=16)
    report, before, after, theirs = given(student, model_of("mixer=flash"))
    assert sorted([*report.taken, *report.repeated, *report.widened, *report.new]) == sorted(after)
    assert sum(report.parameters.values()) == sum(x.numel() for x in after.values())
    for place in report.taken:
        assert torch.equal(after[place], theirs[place])
    for place in report.new:
        assert torch.equal(after[place], before[place])
    outside = {place for place in after if ".mixer." not in place}
    assert all(place in report.taken for place in outside & set(theirs) if after[place].shape == theirs[place].shape)
    assert all(
        place.split(".mixer.")[1].partition(".")[0] in student[0].mixers()[0].roles
        for place in report.taken
        if ".mixer." in place
    )
    tokens = torch.randint(47, (2, 32))
    output = student[0](tokens, tokens)
    (output.token_losses.mean() + sum(output.losses.values())).backward()
    assert all(w.grad is None or bool(w.grad.isfinite().all()) for w in student[0].parameters())


@pytest.mark.parametrize("name", ["sliding_window", "moba", "parallax", "block_sparse"])
def test_a_mixer_of_the_same_projections_takes_them_all(name):
    report, _, _, _ = given(model_of(f"mixer={name}", seed=1), model_of("mixer=flash"))
    assert {f"blocks.1.mixer.{role}.weight" for role in ROLES} <= set(report.taken)


def test_key_heads_are_repeated_for_a_student_with_more():
    teacher = model_of("mixer=flash", "mixer.num_kv_heads=1")
    student = model_of("mixer=flash", seed=1)
    report, _, after, theirs = given(student, teacher)
    assert set(report.repeated) == {f"blocks.{i}.mixer.{role}.weight" for i in (0, 1) for role in ("key", "value")}
    one = theirs["blocks.0.mixer.key.weight"]
    assert torch.equal(after["blocks.0.mixer.key.weight"], torch.cat((one, one)))
    tokens = torch.randint(47, (2, 20))
    torch.testing.assert_close(student[0](tokens).hidden, teacher[0](tokens).hidden, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet", "mlstm_tfla"])
def test_a_recurrence_takes_grouped_heads(mixer):
    words = (f"mixer={mixer}", "mixer.key_factor=1", "mixer.num_heads=2")
    report, _, after, theirs = given(model_of(*words, seed=1), model_of("mixer=flash", "mixer.num_kv_heads=1"))
    assert set(report.repeated) == {f"blocks.{i}.mixer.{role}.weight" for i in (0, 1) for role in ("key", "value")}
    one = theirs["blocks.0.mixer.value.weight"]
    assert torch.equal(after["blocks.0.mixer.value.weight"], torch.cat((one, one)))
    assert {f"blocks.{i}.mixer.{role}.weight" for i in (0, 1) for role in ("query", "output")} <= set(report.taken)


def test_wider_heads_begin_with_the_teachers_channels():
    """Twice as many channels in each of two heads, and grouped heads of the teacher stand twice besides."""
    words = ("mixer=gated_deltanet", "mixer.key_factor=2", "mixer.value_factor=2", "mixer.num_heads=2")
    report, before, after, theirs = given(model_of(*words, seed=1), model_of("mixer=flash", "mixer.num_kv_heads=1"))
    assert set(report.widened) == {f"blocks.{i}.mixer.{role}.weight" for i in (0, 1) for role in ROLES}
    assert "widened: query, key, value, output" in report.line and not report.repeated
    for role in ROLES:
        name = f"blocks.1.mixer.{role}.weight"
        first, own, old = (x[name].T if role == "output" else x[name] for x in (theirs, after, before))
        taught = (
            first.unflatten(0, (-1, 16)).expand(2, -1, -1) if role in ("key", "value") else first.unflatten(0, (2, 16))
        )
        own, old = own.unflatten(0, (2, 32)), old.unflatten(0, (2, 32))
        assert torch.equal(own[:, :16], taught)
        assert torch.equal(own[:, 16:], old[:, 16:] if role in ("key", "value") else torch.zeros_like(taught))


@pytest.mark.parametrize("words", [("mixer.num_heads=4",), ("mixer.num_heads=4", "mixer.key_factor=0.25")])
def test_heads_that_do_not_fit_are_new(words):
    """Narrower ones."""
    report, before, after, _ = given(model_of("mixer=gla", *words, seed=1), model_of("mixer=flash"))
    name = "blocks.0.mixer.key.weight"
    assert name in report.new and torch.equal(after[name], before[name])


def test_more_heads_of_all_kinds_give_the_same_outputs():
    """Each head stands twice, and the output of both copies is half of each."""
    teacher = model_of("mixer=flash")
    student = model_of("mixer=flash", seed=1)
    wide = student[0].mixers()[0]
    theirs = {
        name.removeprefix("blocks.0.mixer."): x for name, x in teacher[0].state_dict().items() if "s.0.mixer" in name
    }
    for name in ("query", "key", "value"):
        setattr(wide, name, torch.nn.Linear(32, 64, bias=False).double())
    wide.output = torch.nn.Linear(64, 32, bias=False).double()
    wide.num_heads = wide.num_kv_heads = 4
    taken = wide.taken_from(teacher[0].mixers()[0], theirs)
    wide.load_state_dict(taken)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(wide(x).y, teacher[0].mixers()[0](x).y, rtol=1e-12, atol=1e-12)


def test_parts_of_nsa_begin_with_the_same_keys():
    _, _, after, theirs = given(model_of("mixer=nsa", seed=1), model_of("mixer=flash"))
    own, one = after["blocks.0.mixer.key.weight"], theirs["blocks.0.mixer.key.weight"]
    assert torch.equal(own, torch.cat((one, one, one)))


def test_recurrences_of_other_kinds_share_projections_alone():
    """Decays of the same shape stand for other things in other mixers."""
    report, _, _, _ = given(model_of("mixer=kda", seed=1), model_of("mixer=rwkv7", small=16))
    assert not [name for name in report.taken if ".decay." in name]
    same, _, _, _ = given(model_of("mixer=kda", seed=1), model_of("mixer=kda"))
    assert not same.new


PAIRS = {
    "gla to mlstm_tfla": (("mixer=gla", "mixer.num_heads=2"), ("mixer=mlstm_tfla", "mixer.num_heads=2")),
    "gated_deltanet to kda": (("mixer=gated_deltanet", "mixer.num_heads=2"), ("mixer=kda", "mixer.num_heads=2")),
    "flash to a window and a recurrence": (("mixer=flash",), ("mixer=sliding_window+gla", "mixer.gla.key_factor=1")),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_other_pairs_take_what_has_the_same_shape(pair):
    old, new = pair
    student, teacher = model_of(*new, seed=1), model_of(*old)
    report, before, after, theirs = given(student, teacher)
    for index in (0, 1):
        for role in ROLES:
            place = f"blocks.{index}.mixer.{role}.weight"
            fits = theirs[place].shape == before[place].shape
            assert (place in report.taken) == fits
            expected = theirs[place] if fits else before[place]
            assert place in report.widened or torch.equal(after[place], expected)
    taken = {place.split(".")[-2] for place in report.taken if ".mixer." in place}
    assert {"value", "output"} <= taken
    tokens = torch.randint(47, (2, 20))
    student[0](tokens, tokens).token_losses.mean().backward()
    assert all(bool(w.grad.isfinite().all()) for w in student[0].parameters() if w.grad is not None)


def with_tuned_states(model):
    """A model whose states before documents are not zero."""
    for name in tune_states(model[0], 8):
        torch.nn.init.normal_(model[0].get_parameter(name))
    return model


@pytest.mark.parametrize(("words", "kept"), [("mixer=gla", (0, 1)), ("mixer=gla+flash", (0,)), ("mixer=kda", ())])
def test_tuned_states_stay_with_layers_that_keep_their_class(words, kept):
    teacher = with_tuned_states(model_of("mixer=gla"))
    student = model_of(words, seed=1)
    report, _, after, theirs = given(student, teacher)
    found = {name for name in after if MARK in name}
    assert found == {name for name in theirs if MARK in name and int(name.split(".")[1]) in kept}
    assert found <= set(report.taken) and all(torch.equal(after[name], theirs[name]) for name in found)
    tokens = torch.randint(47, (2, 20))
    same = torch.equal(student[0](tokens).hidden, teacher[0](tokens).hidden)
    assert same == (len(kept) == 2)
