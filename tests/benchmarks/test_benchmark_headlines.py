"""`python -m benchmarks.headlines`: arms of a part compute the same where they claim to, and a run leaves its files."""

import json
import re

import pytest
import torch
from torch.nn import functional as F

from benchmarks import headlines as benchmark
from benchmarks.results import ROOT


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


PAGE = (ROOT / "docs/headlines.md").read_text(encoding="utf-8")


def row(name: str) -> str:
    """The row of the page's first table that begins with this paper."""
    return next(line for line in PAGE.splitlines() if line.startswith(f"| **{name}"))


def measured(file: str, part: str, arm: str) -> list[str]:
    """How many times as fast an arm is at each point, as the page rounds it."""
    (path,) = (ROOT / "benchmarks/results").glob(file)
    records = json.loads(path.read_text())["results"]
    return [f"{record['times']:.1f}" for record in records if (record["part"], record["arm"]) == (part, arm)]


@pytest.mark.parametrize(
    ("name", "file", "part", "arm", "from_point"),
    [
        ("TFLA", "*_09-45-54.json", "recurrences", "mLSTM, exp", 0),
        ("TFLA", "*_09-45-54.json", "recurrences", "mLSTM, sig", 0),
        ("TFLA", "*_09-45-54.json", "recurrences", "linear attention", 0),
        ("TFLA", "*_09-45-54.json", "recurrences", "scalar decay (SSD)", 0),
        ("Neighborhood", "*_09-49-55.json", "window", "window", 0),
        ("FlashBias", "*_09-49-55.json", "bias", "columns", 0),
        ("Bifurcated", "*_09-56-57.json", "samples", "shared", 1),
    ],
)
def test_the_page_has_what_was_measured(name, file, part, arm, from_point):
    *first, last = measured(f"headlines_cpu{file}", part, arm)[from_point:]
    assert f"{', '.join(first)}, {last}x" in row(name) or f"{', '.join(first)} and {last}x" in row(name)


def test_the_error_of_scatterbrain_is_that_of_its_results():
    content = json.loads((ROOT / "benchmarks/results/scatterbrain_cpu_2026-11-21_15-12-15.json").read_text())
    errors = {(r["tokens"], r["method"], r["features"], r["radius"]): r["error"] for r in content["results"]}
    for tokens in ("independent", "neighbours alike"):
        ratios = []
        for radius in (0.25, 1, 2, 4, 6, 8):
            alone = min(errors[tokens, "performer", 64, radius], errors[tokens, "local", 0, radius])
            ratios.append(f"{alone / errors[tokens, 'scatterbrain', 64, radius]:.1f}")
        assert f"{', '.join(ratios[:-1])} and {ratios[-1]} times" in row("Scatterbrain")


def test_every_file_that_the_page_names_is_committed():
    files = re.findall(r"`(?:benchmarks/results/|docs/)?([\w.-]+\.json)`", PAGE)
    assert len(files) >= 8
    for file in files:
        assert (ROOT / "benchmarks/results" / file).exists() or (ROOT / "docs" / file).exists(), file
