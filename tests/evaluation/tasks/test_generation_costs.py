"""What generations cost, mixer beside mixer: rows, who is cheaper from where on, equal coverage, drawings."""

import pytest
import torch

from longmix.analysis.generation_cost import generation_cost
from longmix.evaluation.tasks.generation_costs import Generations, draw_generations, generation_tables, panels_of
from longmix.reporting.plots import new_figure

INTENSITY = 200.0


@pytest.fixture
def costs(small_model):
    asked = Generations([4, 64], [3, 30], [1, 5], batch=1, shared_prompt=True, intensity=INTENSITY)
    names = {"this": "sliding_window", "flash": "flash", "rwkv7": "rwkv7"}
    return asked.costs({name: small_model(mixer, dtype=torch.bfloat16) for name, mixer in names.items()})


def test_rows_are_the_costs_of_each_model_and_size(costs):
    rows = costs.rows()
    assert len(rows) == 3 * 2 * 2 * 2
    for row in rows:
        cost = generation_cost(costs.models[row["mixer"]], row["context"], row["generated"], row["samples"])
        assert row["total"] == cost.total(INTENSITY) and row["held_bytes"] == cost.held_bytes
        assert row["parameters"] + row["mixing"] == pytest.approx(row["total"], rel=1e-12)


def test_who_is_cheaper_is_so_from_that_context_on_and_not_before(costs):
    found = costs.break_even()
    assert any(row["context"] > 1 for row in found)
    for row in found:
        sizes = row["generated"], row["samples"]
        for context, cheaper in ((row["context"] - 1, False), (row["context"], True), (64, True)):
            if context > 0:
                one, other = (costs.total(row[key], context, *sizes) for key in ("cheaper", "dearer"))
                assert (one < other) == cheaper, (row, context)
    won = [(row["cheaper"], row["dearer"], row["generated"], row["samples"]) for row in found]
    assert len(set(won)) == len(won) and ("flash", "this") not in [pair[:2] for pair in won]


def test_equal_coverage_takes_the_fewest_samples(costs):
    correct = {"flash": [4, 1], "this": [2, 0], "rwkv7": [8, 8]}
    covered = {(row["mixer"], row["samples"]): row["coverage"] for row in costs.covered(correct, 8)}
    assert covered["flash", 1] == pytest.approx(5 / 16) and covered["rwkv7", 5] == 1
    rows = [row for row in costs.at_equal_coverage(correct, 8) if (row["context"], row["generated"]) == (64, 30)]
    assert [(row["mixer"], row["samples"]) for row in rows] == [
        ("flash", 1),
        ("this", 3),  # of 8 attempts 2 were right: 0.625 / 2 of 2 samples is not enough, 0.732 / 2 of 3 is
        ("rwkv7", 1),
        ("flash", 5),
        ("this", None),
        ("rwkv7", 1),
    ]
    for row in rows:
        found = None if row["samples"] is None else costs.total(row["mixer"], 64, 30, row["samples"])
        assert row["total"] == found


def report_of(costs, correct):
    return {
        "generations": costs.rows(),
        "break_even": costs.break_even(),
        "coverage": costs.covered(correct, 8),
        "equal_coverage": costs.at_equal_coverage(correct, 8),
    }


@pytest.mark.parametrize("correct", [{}, {"flash": [4, 1], "this": [2, 0]}], ids=["", "scores"])
def test_tables_and_pictures_show_every_mixer(costs, correct):
    report = report_of(costs, correct)
    tables = list(generation_tables(report))
    assert len(tables) == (4 if correct else 3)
    text = "\n".join(str(cell) for table in tables for column in table.columns for cell in column.cells)
    assert all(name in text for name in costs.models)
    _, panels = new_figure(panels_of(report))
    draw_generations(panels, report)
    assert [len(axes.lines) for axes in panels] == [3, 3, 2][: panels_of(report)]
    flash = [row["total"] for row in report["generations"] if (row["mixer"], row["samples"]) == ("flash", 5)]
    drawn = panels[0].lines[1].get_ydata()
    assert list(drawn) == [flash[1] / 1e9, flash[3] / 1e9]
    assert panels[0].get_title() == "5 samples of 30 tokens"
