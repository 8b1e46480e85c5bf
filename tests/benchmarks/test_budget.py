"""What a layer of every mixer costs may only fall: operators, engine calls, saved bytes; and none waits."""

import json

import pytest
import torch

from benchmarks import budget

BUDGET = json.loads(budget.BUDGET.read_text())


def test_every_mixer_has_a_budget_without_synchronisations():
    assert sorted(BUDGET) == budget.mixers()
    waits = {(mixer, kind) for mixer, kinds in BUDGET.items() for kind in kinds if kinds[kind]["synchronisations"]}
    assert not waits


# rwkv7 mixes six inputs of its projections from two tokens each; every one of them is kept.
@pytest.mark.parametrize(
    ("mixer", "times"), [("deltanet", 1.05), ("gated_deltanet", 1.05), ("kda", 1.11), ("gla", 1.05), ("rwkv7", 1.25)]
)
def test_the_delta_rule_keeps_little_more_than_attention(mixer, times):
    for kind, figures in BUDGET[mixer].items():
        assert figures["saved_bytes"] <= times * BUDGET["flash"][kind]["saved_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", budget.mixers())
def test_no_figure_of_a_layer_rises(mixer):
    assert not budget.over(budget.measured(mixer), BUDGET[mixer])


def test_a_budget_that_is_exceeded_is_named():
    found = {"plain": {"operators": 12.0, "saved_bytes": 7.0}}
    assert budget.over(found, {"plain": {"operators": 11.0, "saved_bytes": 8.0}}) == [
        "plain rows: operators 12 is above 11"
    ]


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
