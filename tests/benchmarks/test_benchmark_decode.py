"""`python -m benchmarks.decode`: the same weights and tokens, and what is made of the times."""

import json

import pytest
import torch

import longmix
from benchmarks import decode, decode_report
from benchmarks.decode_providers import DYNAMIC, OURS, STATIC, UNEQUAL, Ours, Theirs, exported

ENVIRONMENT = {"device": "cpu", "dtype": "fp32"}
WORDS = "--lengths 24 40 --batches 1 3 --samples 2 --samples-after 24 --recurrent gla --recurrent-lengths 16 32"


@pytest.fixture(scope="module")
def models():
    model, config = decode.models(None)
    return model.double(), exported(model, config)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_the_export_has_the_same_weights_and_chooses_the_same_tokens(models, static, copies, monkeypatch):
    model, theirs = models
    monkeypatch.setattr("benchmarks.decode_providers.PREFILL_TOKENS", 16)  # so that a static cache is read in pieces
    rows = decode.prompts(model, [30, 30])
    chosen = []
    with torch.no_grad():
        for provider in (Ours(model, copies), Theirs(theirs, static, copies)):
            tokens = [provider.prefill(rows, 9)]
            for _ in range(8):
                tokens.append(provider.step(tokens[-1]))
            chosen.append(torch.stack(tokens, 1))
    assert chosen[0].shape == (2 * copies, 9)
    assert torch.equal(*chosen)
    assert len(chosen[0].unique()) > 2


def test_a_rows_tokens_do_not_depend_on_the_other_lengths(models):
    assert decode.unequal(512, 8) == [512, 476, 439, 403, 366, 330, 293, 256]
    assert decode.unequal(512, 1) == [512]
    equal, other = (decode.prompts(models[0], lengths) for lengths in ([40, 40], [40, 20]))
    assert torch.equal(equal[0], other[0])
    assert torch.equal(equal[1][:20], other[1])


def record(name, length, milliseconds, **facts):
    same = {"pass": decode_report.STEP, "batch": 1, "same_tokens": None, "tokens": 1}
    return {**same, "provider": name, "length": length, "median_ms": milliseconds, **facts}


def test_growth_is_the_slope_over_lengths():
    lengths = (512, 4096, 16384)
    records = [record(OURS, n, 2 + 0.003 * n) for n in lengths] + [
        record(decode_report.READ, n, 0.0024 * n) for n in lengths
    ]
    assert decode_report.growth(records, OURS) == pytest.approx((2, 0.003))
    verdict = decode_report.growth_verdict(records)
    assert verdict["ratio"] == pytest.approx(0.8)
    assert verdict["verdict"] == "met"
    records += [record(OURS, n, 9 + 0.006 * n) for n in lengths]
    assert decode_report.growth_verdict(records)["verdict"] == "not met"
    assert decode_report.growth_verdict(records[:1])["verdict"] == "unmeasured"


@pytest.mark.parametrize(("ours", "share", "found"), [(2.0, 1.0, "met"), (2.6, 0.9, "not met")])
def test_bars_compare_with_the_better_cache(ours, share, found):
    records = [record(OURS, 512, ours), record(DYNAMIC, 512, 3.0, same_tokens=1.0)]
    records.append(record(STATIC, 512, 6.0, same_tokens=share))
    records.append(record(UNEQUAL, 512, 3.0))
    decode_report.add_speedups(records)
    assert records[0]["over_transformers"] == pytest.approx(3 / ours)
    assert records[3]["over_transformers"] is None
    options = decode.parse(["--out", "/tmp"])
    same, step, *_ = decode_report.verdicts(records, ENVIRONMENT, options)
    assert (same["verdict"], step["verdict"]) == (found, found)
    options.checkpoint = "runs/a"
    assert len(decode_report.verdicts(records, ENVIRONMENT, options)) == 1


@pytest.mark.slow
def test_a_run_leaves_records_table_and_picture(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        words = [*WORDS.split(), "--rounds", "2", "--tokens", "2", "--prefills", "1", "--out", str(tmp_path)]
        assert decode.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    records = content["results"]
    measured = {(r["pass"], r["provider"], r["batch"], r["length"]) for r in records}
    assert len(measured) == len(records) == 2 * 6 + 2 * 8 + 6 + 2 + 2
    assert ("step", UNEQUAL, 3, 40) in measured
    assert ("step of samples", STATIC, 2, 24) in measured
    assert {r["same_tokens"] for r in records if r["provider"] in (DYNAMIC, STATIC)} == {1.0}
    assert all(0 < r["least_ms"] <= r["median_ms"] for r in records)
    assert content["bars"][0]["verdict"] == "met"
    text = file.with_suffix(".txt").read_text()
    assert "met         the same tokens" in text
    assert f"{OURS}: " in text
    assert file.with_suffix(".png").stat().st_size > 5000
    assert "written:" in capsys.readouterr().out


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path, capsys):
    assert decode.main(["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("CheckpointError")


@pytest.mark.slow
def test_a_checkpoint_is_compared_by_its_tokens(tmp_path, shared_cache, capsys):
    data = ("data.validation_tokens=256", f"data.cache_dir={shared_cache}", "seq_len=32", "batch_size=2", "max_steps=1")
    model = ("model.num_layers=2", "model.d_model=32", "model.mlp_hidden=32", "mixer=flash", "mixer.num_kv_heads=2")
    words = ("logger=csv", "trainer=cpu", "loop.validate_every=null", *data, *model)
    run = longmix.train(words, folder=tmp_path / "run").folder
    threads = torch.get_num_threads()
    words = ["--lengths", "24", "--batches", "2", "--samples-after", "0", "--recurrent"]
    words += ["--rounds", "1", "--tokens", "3", "--prefills", "1"]
    try:
        assert decode.main(["--checkpoint", str(run), *words, "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert [bar["verdict"] for bar in content["bars"]] == ["met"]
    assert content["settings"]["checkpoint"] == str(run)
