"""`evaluate.py task=attention`: what it reports, draws and refuses."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from matplotlib import image
from rich.console import Console

from longmix.analysis.attention_statistics import signed_shares
from longmix.analysis.effective_attention import layer_inputs, mixing
from longmix.errors import ConfigError
from longmix.evaluation.run import evaluate
from longmix.evaluation.tasks.attention import COLUMNS, Attention, Shown, _analysed, _reported, _table, analyse
from longmix.evaluation.tasks.attention_pictures import (
    CELLS,
    LayerMaps,
    draw_comparison,
    draw_map,
    draw_model,
    evenly,
    shrunk,
)
from longmix.evaluation.tasks.base import Answer
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import SwiGLU
from longmix.reporting.plots import new_figure


def test_a_heat_map_keeps_the_largest_entry_of_a_cell():
    length = 2 * CELLS + 5
    shares = torch.zeros(1, length, length)
    shares[0, 10, 4], shares[0, 11, 4], shares[0, length - 1, length - 1] = -0.5, 0.25, 0.125
    small = shrunk(shares)
    assert small.shape[1] <= CELLS and small[0, 3, 1] == -0.5 and small[0, -1, -1] == 0.125
    assert small.abs().sum() == 0.625
    assert torch.equal(shrunk(shares[:, :CELLS, :CELLS]), shares[:, :CELLS, :CELLS])
    assert evenly(5) == [0, 1, 2, 3, 4] and evenly(24, 4) == [0, 8, 15, 23]


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache):
    words = "mixer=flash+rwkv7", "mixer.rwkv7.head_dim=16", "model.num_layers=2", "seq_len=40"
    return run_training(*words, f"data.cache_dir={shared_cache}")


@pytest.fixture(scope="module")
def other_folder(run_training, shared_cache):
    return run_training("mixer=sparse_flash", "seq_len=32", f"data.cache_dir={shared_cache}")


def test_colours_are_logarithmic_and_tell_signs():
    shares = torch.tensor([[1.0, 0.0, 0.0], [-0.01, 0.01, 0.0], [1e-5, -1.0, 0.0]])
    _, (axes,) = new_figure(1)
    shown = draw_map(axes, shares, 3, "")
    assert shown.get_array().tolist() == [pytest.approx(row) for row in ([1, 0, 0], [-0.5, 0.5, 0], [0, -1, 0])]
    colours = shown.cmap(shown.norm(shown.get_array()))
    assert colours[0, 0, 0] > colours[0, 0, 2] and colours[2, 1, 0] < colours[2, 1, 2]  # red and blue


class TestTask:
    @pytest.fixture
    def analysed(self, compose_config, run_folder, tmp_path):
        def run(*overrides: str) -> dict:
            words = f"checkpoint={run_folder}", "task=attention", f"output={tmp_path}/out", *overrides
            return evaluate(compose_config(*words, entry_point="evaluate"))["attention"]

        return run

    @pytest.mark.slow
    def test_reports_every_layer_and_head_of_one_checkpoint_beside_another(
        self, analysed, run_folder, other_folder, tmp_path, capsys
    ):
        report = analysed(f"task.attention.others=[{other_folder}]", "task.attention.windows=2")
        own, other = report["models"].values()
        assert report["length"] == 40 and report["windows"] == 2
        assert [(layer["mixer"], len(layer["heads"])) for layer in own["layers"]] == [("Flash", 2), ("RWKV7", 2)]
        assert [layer["mixer"] for layer in other["layers"]] == ["SparseFlash"]
        assert own["layers"][0]["heads"][0]["negative_mass"] == 0 < own["layers"][1]["heads"][0]["negative_mass"]
        for layer in own["layers"]:
            assert sum(layer["heads"][1]["histogram"]) == pytest.approx(1)
        (comparison,) = (tmp_path / "out").glob("attention_comparison_*_validation_step2_*.json")
        (single,) = set((tmp_path / "out").glob("attention_*.json")) - {comparison}
        alone = json.loads(single.read_text())
        assert list(alone["models"]) == [run_folder.name] and alone["models"][run_folder.name] == own
        both = json.loads(comparison.read_text())
        assert both["models"] == report["models"]
        for path in (single, comparison):
            assert image.imread(path.with_suffix(".png"))[..., :3].std() > 0.05
        assert "effective attention of" in capsys.readouterr().out

    @pytest.mark.slow
    def test_the_same_checkpoint_twice_has_two_names(self, analysed, run_folder):
        report = analysed(f"task.attention.others=[{run_folder},{run_folder}]", "task.attention.length=8")
        first, *others = report["models"].values()
        name = run_folder.name
        assert list(report["models"]) == [name, f"{name} step 2", f"{name} step 2 (3)"]
        assert all(other == first for other in others)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["task.attention.length=1"], r"task\.attention\.length=1 must be from 2"),
            (["task.attention.length=100000"], r"task\.attention\.length=100000 must be"),
            (["task.attention.windows=0"], r"task\.attention\.windows=0 must be from 1"),
        ],
    )
    def test_impossible_settings_are_refused(self, analysed, words, message):
        with pytest.raises(ConfigError, match=message):
            analysed(*words)

    def test_another_tokenizer_is_refused(self, analysed, run_training, tmp_path):
        for split in ("train", "validation"):
            (tmp_path / split).mkdir()
            (tmp_path / split / "text.txt").write_text("to be or not to be, that is the question. " * 40 + split)
        sources = f"data.corpus.path={tmp_path}/train", f"data.corpus.validation={tmp_path}/validation"
        words = "tokenizer=bpe", "tokenizer.vocab_size=270", "seq_len=16", "max_steps=1"
        folder = run_training("data=text", *sources, *words, f"data.cache_dir={tmp_path}/cache")
        with pytest.raises(ConfigError, match="has another tokenizer"):
            analysed(f"task.attention.others=[{folder}]")

    def test_a_leaky_other_is_refused(self, analysed, run_training, shared_cache):
        words = "mixer=routing", "mixer.mode=sequence_topk", "mixer.clusters=2", "seq_len=16", "max_steps=1"
        with pytest.warns(UserWarning, match="sequence_topk"):
            folder = run_training(*words, f"data.cache_dir={shared_cache}")
            with pytest.raises(ConfigError, match="later tokens decide what Routing computes"):
                analysed(f"task.attention.others=[{folder}]")


def test_a_name_that_could_be_markup_or_a_formula(capsys):
    heads = [dict.fromkeys(COLUMNS, 1.0) | {"histogram": [1.0]}]
    layers = [LayerMaps("Flash", torch.ones(1, 4, 4), heads)]
    name = "[/red]$x^{$\x1b[31m"
    Console().print(_table(name, layers))
    assert r"[/red]$x^{$\x1b[31m" in capsys.readouterr().out.replace("\n", "")
    for figure in (draw_comparison({name: layers, "b": layers}, 4, "t"), draw_model(layers, 4, name)):
        figure.savefig(io.BytesIO(), format="png")


def test_the_first_window_is_drawn_and_all_are_averaged(small_model):
    model = small_model("flash")
    windows = torch.randint(20, (2, 1, 24), generator=torch.Generator().manual_seed(0))
    batches = [{"tokens": window, "document_ids": None, "targets": window} for window in windows]
    both, first, second = analyse(model, batches), analyse(model, batches[:1]), analyse(model, batches[1:])
    assert torch.equal(both[1].shares, first[1].shares) and not torch.equal(both[1].shares, second[1].shares)
    mean = (first[1].heads[2]["entropy"] + second[1].heads[2]["entropy"]) / 2
    assert both[1].heads[2]["entropy"] == pytest.approx(mean)


@pytest.mark.parametrize(("pattern", "unseen"), [("tensor+flash", 0), ("flash+nsa", 1)])
def test_layers_that_cannot_be_seen_into_are_left_out_by_name(small_model, pattern, unseen, capsys):
    model = small_model(pattern)
    window = torch.randint(20, (1, 24), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": window, "document_ids": None, "targets": window}
    layers = _analysed("mine", SimpleNamespace(model=model, device="cpu"), [batch])
    name, seen = type(model.mixers()[unseen]).__name__, layers[1 - unseen]
    assert [layer.reason is None for layer in layers] == [unseen == 1, unseen == 0]
    x, options = layer_inputs(model, batch)[1 - unseen]
    with torch.no_grad():
        matrix = mixing(model.mixers()[1 - unseen], x, **options).matrix()
    assert torch.equal(seen.shares, shrunk(signed_shares(matrix[0])))
    report = _reported(SimpleNamespace(step=2), layers)
    assert report["layers"][unseen]["heads"] == [] and name in report["layers"][unseen]["reason"]
    answer = Answer(
        {"split": "validation", "length": 24, "models": {"mine": report}}, shown=Shown({"mine": layers}, [])
    )
    assert {key.rpartition("_")[2] for key in Attention().measures(answer)} == {str(1 - unseen)}
    for part in Attention().tables(answer):
        Console(width=300).print(part)
    assert f"mine: layer {unseen} is left out: {name} neither calls" in capsys.readouterr().out
    drawn = Attention().figure(answer)
    assert f"layers left out: {unseen} {name}" in drawn.get_suptitle()
    titles = {axes.get_title(loc="left").partition(",")[0] for axes in drawn.axes} - {"", "mass by distance"}
    assert titles == {f"layer {1 - unseen}"}
    both = draw_comparison({"mine": layers, "whole": [seen, seen]}, 24, "t")
    both.savefig(io.BytesIO(), format="png")
    maps = [axes.get_title(loc="left").split("\n")[-1].partition(",")[0] for axes in both.axes if axes.images]
    assert sorted(maps) == sorted(["layer 0", "layer 1", f"layer {1 - unseen}"])


def test_a_mixer_that_cannot_be_seen_into_is_named():
    model = LanguageModel(
        lambda shape, index: SwiGLU(shape, 8), 20, d_model=16, num_layers=1, num_heads=2, mlp_hidden=8
    )
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    batch = {"tokens": tokens, "document_ids": None, "targets": tokens}
    with pytest.raises(
        ConfigError, match="task=attention cannot see into mine: SwiGLU neither calls its engine by `call_engine`"
    ):
        _analysed("mine", SimpleNamespace(model=model, device="cpu"), [batch])
