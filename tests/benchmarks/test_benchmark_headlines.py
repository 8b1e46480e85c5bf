"""`python -m benchmarks.headlines`: arms of a part compute the same where they claim to, and a run leaves its files."""

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks import headlines as benchmark


@pytest.fixture
def inputs():
    return benchmark.Inputs(1, 37, 3, 16, torch.device("cpu"), torch.float64)


def test_a_bias_in_columns_is_the_dense_bias(inputs):
    calls = benchmark.bias(inputs, 5)
    for ours, dense in zip(calls["columns"](), calls["dense bias"](), strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-11)


def test_samples_that_share_a_prompt_are_the_copies(inputs):
    calls = benchmark.samples(inputs, 4)
    shared, copied = calls["shared"](), calls["a copy for each"]()
    assert shared.shape == (4, 1, 3, 16)
    torch.testing.assert_close(shared, copied, rtol=0, atol=1e-12)


def test_a_window_sees_the_nearest_and_attention_all(inputs):
    calls = benchmark.window(inputs, 7)
    query, key, value = (x.detach().transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    distance = torch.arange(37)[:, None] - torch.arange(37)
    for name, mask in (("all keys", distance >= 0), ("window", (distance >= 0) & (distance < 7))):
        wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
        torch.testing.assert_close(calls[name]()[0], wanted, rtol=0, atol=1e-12)


def test_recurrences_are_what_they_are_called(inputs):
    calls = benchmark.recurrences(inputs)
    query, key, value = (x.detach() for x in (inputs.query, inputs.key, inputs.value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * 16**-0.5
    forget = F.logsigmoid(inputs.forget.detach()).cumsum(1).transpose(1, 2)
    decay = (forget[..., None] - forget[..., None, :]).tril()
    gates = inputs.gate.detach().transpose(1, 2)[..., None, :]
    for name, weights in (
        ("linear attention", scores),
        ("scalar decay (SSD)", scores * decay.exp()),
        ("mLSTM, sig", scores * (decay + F.logsigmoid(gates)).exp()),
        ("mLSTM, exp", scores * (decay + gates).exp()),
    ):
        weights = weights.tril()
        if name == "mLSTM, exp":
            weights = weights / weights.sum(-1, keepdim=True).abs().clamp_min(1)
        wanted = torch.einsum("bhij,bjhd->bihd", weights, value)
        torch.testing.assert_close(calls[name]()[0], wanted, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_a_run_leaves_records_a_table_and_a_picture(tmp_path, capsys):
    words = ["--lengths", "32", "--length", "48", "--windows", "8", "64", "--samples", "2", "--heads", "1"]
    assert benchmark.main([*words, "--seconds", "0.01", "--out", str(tmp_path), "--device", "cpu"]) == 0
    (path,) = tmp_path.glob("headlines_cpu_*.json")
    records = json.loads(path.read_text())["results"]
    assert [(record["part"], record["point"]) for record in records] == [
        *[("recurrences", 32)] * 5,
        *[("window", 8)] * 2,  # a window of more than the row is left out
        *[("bias", 32)] * 2,
        *[("samples", 2)] * 2,
    ]
    assert all(record["median_ms"] >= record["least_ms"] > 0 and record["times"] > 0 for record in records)
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out and path.with_suffix(".png").exists()


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["nothing"])
    assert "there is no part nothing" in capsys.readouterr().err
