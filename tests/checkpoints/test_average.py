"""The mean of a run's last checkpoints, of either form, and what it is good for."""

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from longmix.checkpoints import CheckpointStore, load_checkpoint, read_info
from longmix.checkpoints.__main__ import main
from longmix.checkpoints.average import last_checkpoints
from longmix.restore import restore
from longmix.training.run import train

WORDS = ["logger=csv", "batch_size=2", "data.validation_tokens=64", "model.num_layers=2", "model.d_model=32"]
WORDS += ["model.mlp_hidden=32", "trainer=cpu", "seq_len=32", "max_steps=3", "loop.checkpoint_every=1"]
WORDS += ["loop.keep_checkpoints=3", "model.tie_head=true", "mixer=flash+sparse_flash", "mixer.sparse_flash.buckets=4"]
WORDS += ["loop.ema_decay=0.9", "trainer.num_threads=1"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, shared_cache, composed):
    """`begun(name, words)` trains a run and returns its folder."""
    place = tmp_path_factory.mktemp("runs")

    def run(name: str, *words: str):
        try:
            train(composed([*words, f"data.cache_dir={shared_cache}"], "train", place / name))
        finally:
            HydraConfig.instance().cfg = None
        return place / name

    return run


@pytest.fixture(scope="module", params=["false", "true"], ids=["whole", "sharded"])
def folder(request, begun):
    return begun(f"run-{request.param}", *WORDS, f"loop.sharded_checkpoints={request.param}")


@pytest.mark.parametrize(("weights", "part"), [("trained", "model"), ("ema", "ema")])
def test_it_is_the_mean_and_models_and_runs_begin_from_it(folder, weights, part, begun, tmp_path, capsys):
    target = tmp_path / "mean"
    assert main(["average", str(folder), "--last", "3", "--output", str(target), "--weights", weights]) == 0
    assert f"wrote {target}" in capsys.readouterr().out
    states = [load_checkpoint(path) for path in CheckpointStore(folder / "checkpoints").all()]
    assert len(states) == 3
    mean = load_checkpoint(target)
    assert mean.keys() == {"step", "config", "tokenizer", "data_fingerprint", "versions", "model"}
    assert mean["model"].keys() == states[-1]["model"].keys()
    for name, tensor in mean["model"].items():
        parts = [state[part].get(name, state["model"][name]) for state in states]
        expected = torch.stack([each.double() for each in parts]).mean(0)
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert mean["model"]["head.weight"].data_ptr() == mean["model"]["embedding.weight"].data_ptr()
    assert read_info(target)["averaged"] == {"steps": [1, 2, 3], "weights": weights}
    model = restore(target, device="cpu").model
    assert all(torch.equal(weight, mean["model"][name]) for name, weight in model.named_parameters())
    if (weights, folder.name) == ("ema", "run-false"):
        words = [word for word in WORDS if not word.startswith(("model", "mixer"))]
        assert (begun("next", *words, f"checkpoint={target}", "max_steps=1") / "summary.json").is_file()


def test_an_old_best_one_is_none_of_the_last(tmp_path, capsys):
    store = CheckpointStore(tmp_path / "run/checkpoints")
    for step in range(1, 6):
        store.save({"step": step, "model": {}}, {"validation": {"loss": float(step)}})
        store.prune(2)
    assert main(["average", str(tmp_path / "run"), "--last", "3"]) == 2
    assert (
        "holds 2 checkpoints and 1 older one, between which others were deleted, and last=3" in capsys.readouterr().err
    )
    assert [path.name for path in last_checkpoints(tmp_path / "run", 2)] == ["step-00000004", "step-00000005"]


def test_what_has_no_mean_is_refused(folder, begun, tmp_path, capsys):
    last = CheckpointStore(folder / "checkpoints").all()[-1]
    for words, message in [
        (["--last", "4"], r"holds 3 checkpoints, and last=4 needs so many"),
        (["--last", "0"], "last=0 must be at least 1"),
        (["--last", "1", "--output", str(folder)], "is there already"),
    ]:
        assert main(["average", str(folder), *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["average", str(last), "--last", "1"]) == 2
    assert "is one checkpoint; give the folder of a run" in capsys.readouterr().err
    if folder.name != "run-false":
        return
    other = begun("other", *WORDS, "model.mlp_hidden=40", "loop.ema_decay=null", "max_steps=1")
    assert main(["average", str(other), "--last", "1", "--weights", "ema"]) == 2
    assert "has no averaged weights" in capsys.readouterr().err
    mixed = tmp_path / "mixed/checkpoints"
    mixed.mkdir(parents=True)
    for path in (other / "checkpoints/step-00000001", folder / "checkpoints/step-00000002"):
        (mixed / path.name).symlink_to(path)
    assert main(["average", str(mixed.parent), "--last", "2"]) == 2
    assert "is of another model than" in capsys.readouterr().err
