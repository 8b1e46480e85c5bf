"""`summary.json`: what reports compare."""

import json

import pytest

from longmix.reporting.metrics import read_metrics


@pytest.fixture(scope="module")
def run(run_training, tiny_overrides):
    return run_training(*tiny_overrides, "mixer=retention*2+flash", "seq_len=32", "loop.log_every=1")


@pytest.fixture(scope="module")
def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_mixer_is_the_word_of_the_command_line(summary):
    assert summary["mixer"] == "retention*2+flash"


def test_peak_memory_is_the_largest_that_was_logged(run, summary):
    logged = [row["memory/peak_gib"] for row in read_metrics(run) if "memory/peak_gib" in row]
    assert len(logged) == 2
    assert summary["peak_memory_bytes"] / 2**30 == pytest.approx(max(logged), rel=1e-6)
    assert summary["peak_memory_bytes"] > 50e6  # torch alone takes more


def test_machine_and_costs(summary):
    assert summary["device"] == "CPU"
    assert summary["training_flops_per_token"] > 6 * summary["parameters"]["non_embedding"] / 2
    assert summary["tokens"] == 2 * summary["tokens_per_step"] == 128
