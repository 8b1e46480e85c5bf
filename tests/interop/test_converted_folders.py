"""A Hugging Face folder as a teacher: it comes in, gets other mixers in stages, and goes out again."""

import pytest
import torch
from hf_folders import foreign, loaded, logits_of, tokens

import longmix
from benchmarks import conversion
from longmix.interop.huggingface.export import export
from longmix.interop.huggingface.load import import_folder
from longmix.reading import read_json

LOOP = ("logger=csv", "batch_size=2", "seq_len=32", "data.validation_tokens=256", "trainer=cpu")
STAGES = "stages=[{objective:layers,max_steps:2},{objective:logits,max_steps:1},{max_steps:1}]"


@pytest.fixture(params=["Llama", "Qwen3", "Mistral"])
def teacher(request, tmp_path):
    """The checkpoint that a folder became."""
    foreign(tmp_path / "folder", request.param, tie_word_embeddings=request.param == "Qwen3")
    import_folder(tmp_path / "folder", tmp_path / "imported")
    return tmp_path / "imported"


def converted(teacher, folder, cache, *words):
    given = (f"checkpoint={teacher}", "convert=true", f"data.cache_dir={cache}", *words)
    return longmix.train([*LOOP, *given], folder=folder)


@pytest.mark.slow
def test_its_layers_learn_and_go_out_again(teacher, tmp_path, shared_cache):
    words = ("mixer=gla+flash", "max_steps=null", "max_tokens=null", STAGES)
    run = converted(teacher, tmp_path / "run", shared_cache, *words)
    report = read_json(run.folder / "transfer.json")
    assert not [name for name in report["new"] if not name.startswith("blocks.0.mixer.")]
    assert report["parameters"].keys() == {*report["taken"], *report["repeated"], *report["new"]}
    assert sum(report["parameters"].values()) == run.summary["parameters"]["total"]
    export(run.folder, tmp_path / "out")
    ids = tokens(2, 20)
    ours = run.load(device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "out")(ids).logits, logits_of(ours, ids), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_its_own_mixer_leaves_its_loss(teacher, tmp_path, shared_cache):
    run = converted(teacher, tmp_path / "run", shared_cache, "mixer=flash", "max_steps=1")
    words = {"data": "sotu", "data.cache_dir": str(shared_cache), "output": str(tmp_path)}
    again = longmix.load(teacher, device="cpu").evaluate("loss", seq_len=32, max_tokens=256, **words)
    (found,) = again["lengths"].values()
    summary = read_json(run.folder / "summary.json")
    assert summary["validation_transferred"]["loss"] == pytest.approx(found["loss"], rel=1e-6)


@pytest.mark.slow
def test_the_benchmark_takes_a_teacher_that_says_nothing_of_data(teacher, tmp_path, shared_cache, capsys):
    """With --check nothing is measured and nothing written."""
    words = [
        "--word",
        f"data.cache_dir={shared_cache}",
        "--word",
        "data.validation_tokens=256",
        "--word",
        "trainer=cpu",
    ]
    given = [str(teacher), "gla+flash", *words, "--length", "128", "--step-tokens", "128"]
    given += ["--ways", "text", "--tokens", "0", "0", "128", "--needles", "1", "--runs", str(tmp_path / "runs")]
    assert conversion.main([*given, "--check"]) == 0
    assert "gla+flash, scratch" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    assert conversion.main([*given, "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    (record,) = read_json(path)["results"]
    assert record["tokens_seen"] == [0, 128] and record["needle_gain"] is not None
