"""What a layer of every mixer costs may only fall: operators, launches, saved bytes, compiles; and none waits."""

import json
import math
import os

import pytest
import torch

from benchmarks import budget
from longmix_kernels.linear import launch as linear_launch

BUDGET = json.loads(budget.BUDGET.read_text())
FIGURES = {
    "forward_operators",
    "operators",
    "forward_engine_calls",
    "engine_calls",
    "launches",
    "synchronisations",
    "saved_bytes",
}
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


WAITS = {"combiner": 1}
"""How often a call that generates waits: the number of summaries is the shape of the state."""


def test_every_mixer_has_a_whole_budget_without_synchronisations():
    assert sorted(BUDGET) == budget.mixers()
    for mixer, kinds in BUDGET.items():
        assert {kind: set(figures) for kind, figures in kinds.items()} == {
            **dict.fromkeys(budget.KINDS, FIGURES),
            "generated": {"prompt_synchronisations", "token_synchronisations"},
            "all": {"specialisation_keys"},
        }, mixer
        assert set(kinds["generated"].values()) == {WAITS.get(mixer, 0)}, mixer
        assert not any(kinds[kind]["synchronisations"] for kind in budget.KINDS), mixer


def test_a_mixer_launches_exactly_if_it_calls_engines():
    for mixer, kinds in BUDGET.items():
        for kind in budget.KINDS:
            assert bool(kinds[kind]["launches"]) == bool(kinds[kind]["engine_calls"]), mixer
            assert kinds["all"]["specialisation_keys"] or not kinds[kind]["launches"], mixer


# rwkv7 mixes six inputs of its projections from two tokens each; every one of them is kept.
@pytest.mark.parametrize(
    ("mixer", "times"), [("deltanet", 1.05), ("gated_deltanet", 1.05), ("kda", 1.11), ("gla", 1.05), ("rwkv7", 1.25)]
)
def test_the_delta_rule_keeps_little_more_than_attention(mixer, times):
    for kind in budget.KINDS:
        assert BUDGET[mixer][kind]["saved_bytes"] <= times * BUDGET["flash"][kind]["saved_bytes"]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("mixer", budget.mixers())
def test_no_figure_of_a_layer_rises(mixer):
    assert not budget.over(budget.measured(mixer), BUDGET[mixer])


SUMMARIES = ("mixer.summaries=true", "mixer.num_features=0")


# The state has a key for each block that was left behind. How many there are is its shape, which the host has to know:
# it reads whether there are new ones, and then how many. Counting ends at the first, since fake tensors have no values.
@pytest.mark.parametrize(("words", "waits"), [((), 0), (SUMMARIES, 1)], ids=["sums", "summaries"])
def test_scatterbrain_waits_only_for_the_number_of_its_summaries(words, waits):
    found = budget.generation("scatterbrain", *words)
    assert found == {"prompt_synchronisations": waits, "token_synchronisations": waits}


def test_summaries_wait_for_nothing_in_training():
    with budget._model("scatterbrain", 2, *SUMMARIES) as (model, _):
        assert budget._of_a_step(model, True)["synchronisations"] == 0


def test_a_budget_that_is_exceeded_is_named():
    found = {"plain": {"operators": 12.0, "saved_bytes": 7.0}}
    assert budget.over(found, {"plain": {"operators": 11.0, "saved_bytes": 8.0}}) == [
        "plain rows: operators 12 is above 11"
    ]


@pytest.mark.slow
@compiles
def test_no_length_and_no_batch_size_adds_a_kernel():
    shapes = budget.SHAPES
    assert {batch for batch, _ in shapes} == {1, 2, 3}
    assert {math.gcd(length, 16) for _, length in shapes} == {1, 8, 16}
    assert budget.specialisation_keys("simple_gla", shapes) == budget.specialisation_keys("simple_gla", shapes[:1])


@compiles
def test_a_kernel_that_each_length_compiles_anew_is_counted(monkeypatch):
    monkeypatch.setattr(linear_launch, "gate", lambda x: x)  # batch rows of gates begin where their length says
    found = {"all": {"specialisation_keys": budget.specialisation_keys("simple_gla", [(2, 1008), (2, 1001)])}}
    assert budget.over(found, {"all": BUDGET["simple_gla"]["all"]})


def test_operators_that_wait_are_counted_and_views_are_not():
    with budget.Count() as count:
        x = torch.arange(4)
        x.view(2, 2).nonzero()
        x.sum().item()
    assert count.figures() == {"operators": 4, "engine_calls": 0, "synchronisations": 2}


def test_the_command_refuses_an_unknown_mixer(capsys):
    with pytest.raises(SystemExit, match="2"):
        budget.main(["flsh"])
    assert "unknown mixer flsh" in capsys.readouterr().err


def test_the_command_refuses_the_interpreter(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        budget.main(["flash"])
    assert "TRITON_INTERPRET=1 is set; unset it" in capsys.readouterr().err
