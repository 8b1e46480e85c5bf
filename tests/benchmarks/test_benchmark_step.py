"""`python -m benchmarks.step`: the loops train the same model, and their laps are compared."""

import json

import pytest
import torch

from benchmarks import step
from benchmarks.step_loops import PLAIN, TRAINER, Both, PlainModel, Rows, Settings, optimizer_of, plain_laps

SMALL = ("model.num_layers=2", "model.d_model=32", "model.num_heads=2", "model.mlp_hidden=48")


def settings(optimizer="adamw", **options):
    words = ("model=tiny", "mixer=flash", f"optimizer={optimizer}", *SMALL)
    return Settings(words, **{"seq_len": 40, "batch_size": 3, "steps": 4, "lap": 2} | options)


def text(count=500):
    return torch.randint(60, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_the_plain_model_has_our_loss_and_our_gradients():
    model, config = settings().model(60)
    model.double()
    plain = PlainModel.of(model, config)
    (rows,) = settings(steps=1).batches(text())
    ours = model(rows[:, :-1], rows[:, 1:]).token_losses.mean()
    theirs = plain(rows)
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=0)
    for loss in (ours, theirs):
        loss.backward()
    others = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(others[name].grad, weight.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_muon_has_the_hidden_matrices_and_adamw_the_rest():
    model = PlainModel(60, 32, 2, 2, 48)
    both = optimizer_of(model, settings("muon").content)
    assert isinstance(both, Both)
    matrices, others = both.optimizers
    assert len(matrices.param_groups[0]["params"]) == 2 * 7
    assert sum(len(group["params"]) for group in both.param_groups) == len(list(model.parameters()))
    assert {w.ndim for group in others.param_groups for w in group["params"]} == {1, 2}  # embedding, head and norms


@pytest.mark.parametrize("optimizer", step.OPTIMIZERS)
def test_the_plain_loop_learns(optimizer):
    text, own = torch.arange(500, dtype=torch.uint8) % 7, settings(optimizer, steps=60, lap=30)
    trained, losses = PlainModel.of(*own.model(7)), []
    training = optimizer_of(trained, own.content)
    for rows in own.batches(text):
        loss = trained(rows)
        loss.backward()
        training.step()
        training.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert len(plain_laps(own, text)) == 2


def test_the_trainer_reads_the_same_rows():
    own = settings()
    rows = Rows(own, text())
    assert len(rows) == 12
    batches = torch.cat([batch[:, :-1] for batch in own.batches(text())])
    assert torch.equal(torch.stack([rows[i]["input_ids"] for i in range(12)]), batches)


def records():
    times = {step.OURS: 10.0, PLAIN: 12.0, TRAINER: 9.0}
    return [
        {
            "optimizer": "adamw",
            "length": 512,
            "batch_size": 16,
            "provider": name,
            "median_ms": ms,
            "round_ms": [ms, ms],
            "tokens_per_second": 8192e3 / ms,
        }
        for name, ms in times.items()
    ]


def test_the_table_says_how_much_faster_we_are():
    lines = step.table(records()).splitlines()
    assert lines[3] == "| adamw | 512 | plain PyTorch | 12.0 | 682,667 | 1.200x | 12.0 12.0 |"
    assert "0.900x" in lines[4]
    assert lines[-1] == "longmix is at least as fast in 1 of 2 comparisons."


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_the_trainer_is_left_out_without_what_it_needs(missing, monkeypatch, capsys):
    find = step.importlib.util.find_spec
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert step.loops_here() == [step.OURS, PLAIN]
    assert missing in capsys.readouterr().err
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: True)
    assert step.loops_here() == [step.OURS, PLAIN, TRAINER]


@pytest.mark.slow
def test_measures_all_loops(tmp_path, shared_cache, capsys):
    words = [f"--word={word}" for word in SMALL]
    words += [f"--of-run=data.cache_dir={shared_cache}", "--of-run=trainer=cpu", "--optimizers", "muon"]
    words += ["--lengths", "32", "--step-tokens", "64", "--rounds", "1", "--laps", "2", "--lap", "2"]
    assert step.main([*words, "--threads", "1", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())["results"]
    assert {record["provider"] for record in found} >= {step.OURS, PLAIN}
    assert all(record["median_ms"] > 0 and record["batch_size"] == 2 for record in found)
    assert file.with_suffix(".png").stat().st_size > 5000
    assert "comparisons" in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_that_fails_is_one_line(tmp_path, capsys):
    assert step.main(["--lengths", "32", "--word=model.d_model=31", "--out", str(tmp_path), "--rounds", "1"]) == 1
    assert "ended with" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
