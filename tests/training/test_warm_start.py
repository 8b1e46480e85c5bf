"""Training that begins from a checkpoint: all weights on other data, or states before documents alone."""

import logging
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from longmix.checkpoints import CheckpointStore, find_checkpoint, load_checkpoint
from longmix.config import OriginRecord, TrainConfig, plain, read
from longmix.distributed.agreement import Processes
from longmix.errors import CheckpointError, ConfigError
from longmix.evaluation.run import evaluate
from longmix.invocation import Invocation
from longmix.model.build import build_model, model_from_checkpoint
from longmix.model.tuned_states_file import MARK
from longmix.training.identity import changes
from longmix.training.resume import find_start
from longmix.training.run import train
from longmix.training.warm_start import Origin, begin, begins_from

LOOP = ("logger=csv", "batch_size=2", "seq_len=32", "max_steps=4", "data.validation_tokens=256", "trainer=cpu")
SMALL = ("model.num_layers=2", "model.d_model=32", "model.mlp_hidden=32")
MIXERS = {
    "rwkv7": ("mixer=rwkv7", "mixer.head_dim=16"),
    "mlstm-exp": ("mixer=mlstm_tfla", "mixer.gate=exp", "mixer.input_bias=0"),
    "hybrid": ("mixer=mlstm_tfla+flash", "mixer.mlstm_tfla.input_bias=0", "tokenizer=bpe", "tokenizer.vocab_size=300"),
    "flash": ("mixer=flash",),
}


@pytest.fixture(scope="module")
def run(composed):
    """`run(folder, "seq_len=32", ...)` trains in a new folder and returns it."""

    def train_in(folder: Path, *overrides: str) -> Path:
        folder.mkdir(exist_ok=True)
        try:
            train(composed([*LOOP, *overrides], "train", folder))
        finally:
            HydraConfig.instance().cfg = None
        return folder

    return train_in


@pytest.fixture(scope="module")
def bits_per_byte(composed):
    """`bits_per_byte(checkpoint, corpus, output, "states=PATH", ...)` evaluates."""

    def evaluated(checkpoint: Path, corpus: list[str], output: Path, *words: str) -> float:
        config = composed([f"checkpoint={checkpoint}", f"output={output}", *corpus, *words], "evaluate", output)
        report = evaluate(config)["loss"]
        HydraConfig.instance().cfg = None
        (figures,) = report["lengths"].values()
        return figures["bits_per_byte"]

    return evaluated


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, list[str]]:
    """Overrides for two styles of text."""
    root, cache = tmp_path_factory.mktemp("corpora"), tmp_path_factory.mktemp("cache")
    styles = {"prose": "the cat sat on the mat and looked at the dog. ", "code": "for i in range(10): x[i] = i ** 2\n"}
    for style, line in styles.items():
        (root / style).mkdir()
        for number in range(8):
            (root / style / f"{number}.txt").write_text(line * (5 + number))
    return {
        style: [
            "data=text",
            f"data.corpus.path={root}/{style}",
            "data.corpus.validation_fraction=0.3",
            f"data.cache_dir={cache}",
        ]
        for style in styles
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpora, run):
    """`trained("rwkv7")`: the folder of a run with this entry of `MIXERS`."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("trained") / name
            made[name] = run(folder, *SMALL, *MIXERS[name], "max_steps=60", *corpora["prose"])
        return made[name]

    return get


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(find_checkpoint(folder))["model"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rwkv7", "mlstm-exp", "hybrid"])
def test_tuned_states_alone_change_and_lower_the_loss(name, trained, corpora, tmp_path, run, bits_per_byte):
    base = trained(name)
    tuned = run(
        tmp_path / "tuned",
        "experiment=state_tuning",
        f"checkpoint={base}",
        "optimizer.learning_rate=0.1",
        "max_steps=30",
        *(["tuning.features=8", "tuning.decorrelation=0.01"] if name == "hybrid" else []),
        *corpora["code"],
    )
    before, after = weights(base), weights(tuned)
    added = set(after) - set(before)
    assert added and all(".tuned." in key for key in added)
    assert all(torch.equal(after[key], weight) for key, weight in before.items())
    assert all(after[key].abs().max() > 1e-3 for key in added if key.endswith("memory"))

    saved = torch.load(tuned / "states.pt", weights_only=True)["states"]
    assert {key: state.shape for key, state in saved.items()} == {key: after[key].shape for key in added}
    assert (tuned / "states.pt").stat().st_size < find_checkpoint(tuned).joinpath("state.pt").stat().st_size / 4

    plain = bits_per_byte(base, corpora["code"], tmp_path / "a")
    stated = bits_per_byte(base, corpora["code"], tmp_path / "b", f"states={tuned}")
    whole = bits_per_byte(tuned, corpora["code"], tmp_path / "c")
    assert stated == whole < plain - 0.01


def test_every_document_begins_from_the_tuned_state(trained):
    model = model_from_checkpoint(load_checkpoint(find_checkpoint(trained("rwkv7")))).double()
    for mixer in model.mixers():
        mixer.tune_states()
        torch.nn.init.normal_(mixer.tuned.initial["memory"])
        mixer.double()
    tokens = torch.randint(256, (2, 20))
    ids = torch.repeat_interleave(torch.arange(2), torch.tensor([7, 13])).expand(2, -1).int()
    packed = model(tokens, document_ids=ids).hidden
    torch.testing.assert_close(packed[:, 7:], model(tokens[:, 7:]).hidden, rtol=0, atol=1e-12)
    state, pieces = model.init_state(2), []
    for piece in (slice(0, 3), slice(3, 4), slice(4, 11), slice(11, 20)):
        output = model(tokens[:, piece], state=state, document_ids=ids[:, piece])
        state = output.state
        pieces.append(output.hidden)
    torch.testing.assert_close(torch.cat(pieces, 1), packed, rtol=0, atol=1e-12)


def test_all_weights_go_on_from_the_checkpoint(trained, corpora, tmp_path, run):
    """At a learning rate next to nothing the loss is the checkpoint's."""
    base = trained("hybrid")
    again = run(
        tmp_path / "on", f"checkpoint={base}", "optimizer=adamw", "optimizer.learning_rate=1e-12", *corpora["prose"]
    )
    ours, theirs = weights(again), weights(base)
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=1e-10)
    saved = load_checkpoint(find_checkpoint(again))
    assert saved["config"]["mixer"] == load_checkpoint(find_checkpoint(base))["config"]["mixer"]
    assert saved["tokenizer"]["kind"] == "library"


@pytest.fixture
def base(trained, tmp_path) -> Path:
    """A copy of a trained run, for tests that change it."""
    return Path(shutil.copytree(trained("rwkv7"), tmp_path / "runs" / "base"))


def train_on(base: Path) -> None:
    """As if the run had gone on: it has a newer checkpoint."""
    state = load_checkpoint(base)
    state["model"]["embedding.weight"] += 1
    CheckpointStore(base / "checkpoints").save(state | {"step": state["step"] + 1}, {})


class TestTheRunItBeganFromGoesOn:
    @pytest.mark.slow
    def test_an_unnamed_run_is_another_then(self, base, compose_config, tmp_path, monkeypatch, corpora, caplog):
        monkeypatch.chdir(tmp_path)
        caplog.set_level(logging.INFO)

        def begins(word: str) -> tuple[str, int]:
            config = read(TrainConfig, compose_config(*LOOP, f"checkpoint={word}", "resume=auto", *corpora["prose"]))
            config, _ = begins_from(config, Invocation.of_command())
            folder = tmp_path / "runs" / f"run{len(list((tmp_path / 'runs').iterdir()))}"
            with find_start(config, folder, named=False) as start:
                if not start.step:
                    config = start.config_of(config)
                    start.begin(config)
                    facts = {"data_fingerprint": {}, "run": {}, "steps_skipped": 0, "random": {}, "optimizers": []}
                    store = CheckpointStore(start.folder / "checkpoints")
                    store.save({"step": 4, "config": plain(config), **facts}, {})
                return start.folder.name, start.step

        first = find_checkpoint(base)
        assert begins("runs/base") == ("run1", 0)
        for word in ("runs/base", str(base), str(first.relative_to(tmp_path))):
            assert begins(word) == ("run1", 4), word
        train_on(base)
        assert begins("runs/base") == ("run2", 0)
        assert begins("runs/base") == ("run2", 4)
        assert begins(str(first)) == ("run1", 4)
        config = OmegaConf.load(tmp_path / "runs/run1/config.yaml")
        assert (config.checkpoint, config.origin.checkpoint) == ("runs/base", str(first))
        del config["origin"]  # as earlier versions wrote it
        OmegaConf.save(config, tmp_path / "runs/run1/config.yaml")
        shutil.rmtree(tmp_path / "runs/run2")
        assert begins("runs/base") == ("run2", 0)
        assert "run1 did not keep which weights it began from; resume=" in caplog.text

    def test_a_sweep_tells_them_apart_too(self, base, compose_config):
        configs = []
        for _ in range(2):
            config = read(TrainConfig, compose_config(*LOOP, f"checkpoint={base}", "resume=auto"))
            configs.append(begins_from(config, Invocation.of_command())[0])
            train_on(base)
        earlier, later = configs
        ((key, (was, now)),) = changes(plain(earlier), later, ("seed",)).items()
        assert (key, Path(was).name, Path(now).name) == ("checkpoint", "step-00000060", "step-00000061")
        assert changes(plain(earlier), earlier) == {}

    @pytest.mark.slow
    @pytest.mark.parametrize(("word", "how"), [("run", "on"), ("last", "on"), ("run", "gone"), ("step", "gone")])
    def test_a_named_run_is_continued(self, base, corpora, tmp_path, run, monkeypatch, how, word):
        monkeypatch.chdir(tmp_path)
        given = {"run": str(base), "last": "last", "step": str(find_checkpoint(base))}[word]
        words = (f"checkpoint={given}", *corpora["prose"])
        folder = run(tmp_path / "mine", *words, "max_steps=2")
        began = OmegaConf.load(folder / "config.yaml").origin
        train_on(base) if how == "on" else shutil.rmtree(base)
        run(folder, *words, "resume=auto", "max_steps=4")
        assert find_checkpoint(folder).name == "step-00000004"
        assert OmegaConf.load(folder / "config.yaml").origin == began
        other = f"checkpoint={tmp_path}/other"
        with pytest.raises(CheckpointError, match=r"began from .*, not from .*other; give checkpoint="):
            run(folder, other, *corpora["prose"], "resume=auto", "max_steps=5")

    def test_a_run_that_began_afresh_is_none_that_began_elsewhere(self, base, corpora, run):
        word = f"checkpoint={find_checkpoint(base)}"
        with pytest.raises(CheckpointError, match=r"began from fresh weights, not from .*; leave checkpoint out"):
            run(base, word, *corpora["prose"], "resume=auto", "max_steps=70")


def test_processes_that_found_different_weights_do_not_begin():
    class Others(Processes):
        def each(self, work):
            return [work(), OriginRecord("runs/a/checkpoints/step-00000006", "b")]

    record = OriginRecord("runs/a/checkpoints/step-00000003", "a")
    with pytest.raises(
        CheckpointError, match=r"Give one of its checkpoints, such as checkpoint=runs/a/.*step-00000006"
    ):
        Origin({}, None, record).check_same(Others())
    Origin({}, None, record).check_same(Processes())


def test_states_that_are_tuned_again_go_on_from_what_they_were(composed, tmp_path):
    def config(*words):
        return read(TrainConfig, composed([*LOOP, *SMALL, "mixer=gla", "trainable=states", *words], "train", tmp_path))

    tuned = config("tuning.features=8")
    model = build_model(tuned, 47)
    begin(model, tuned, None)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight) if MARK in name else None
    origin = Origin(model.state_dict(), None, None)
    again = build_model(tuned, 47)
    begin(again, tuned, origin)
    assert all(torch.equal(again.state_dict()[name], x) for name, x in model.state_dict().items())
    assert {name for name, weight in again.named_parameters() if weight.requires_grad} == {
        name for name, _ in model.named_parameters() if MARK in name
    }
    with pytest.raises(ConfigError, match="have a memory of 8 features; give"):
        begin(build_model(tuned, 47), config(), origin)


@pytest.mark.slow
def test_a_tuning_run_resumes_exactly(trained, corpora, tmp_path, run):
    words = ("experiment=state_tuning", f"checkpoint={trained('rwkv7')}", "loop.checkpoint_every=2", *corpora["code"])
    straight = run(tmp_path / "straight", *words)
    first = find_checkpoint(straight / "checkpoints" / "step-00000002")
    resumed = run(tmp_path / "resumed", *words, f"resume={first}")
    ours, theirs = weights(resumed), weights(straight)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (resumed / "states.pt").is_file()


@pytest.mark.slow
def test_what_comes_from_the_checkpoint_may_not_be_given(trained, corpora, tmp_path, run):
    with pytest.raises(ConfigError, match=r"mixer comes from checkpoint=.*leave one of the two out"):
        run(tmp_path / "a", f"checkpoint={trained('flash')}", "mixer=rwkv7", *corpora["prose"])
    with pytest.raises(ConfigError, match=r"model\.d_model comes from"):
        run(tmp_path / "b", f"checkpoint={trained('flash')}", "model.d_model=32", *corpora["prose"])


def test_clear_errors(trained, corpora, tmp_path, run):
    with pytest.raises(ConfigError, match="trainable='state' is not one of all, states"):
        run(tmp_path / "a", "trainable=state", *corpora["prose"])
    with pytest.raises(ConfigError, match="needs a mixer with a recurrent state, and the model's is Flash"):
        run(tmp_path / "b", "experiment=state_tuning", f"checkpoint={trained('flash')}", *corpora["prose"])
    with pytest.raises(CheckpointError, match="there is no"):
        run(tmp_path / "c", f"checkpoint={tmp_path}/absent", *corpora["prose"])


@pytest.mark.slow
def test_states_that_do_not_fit_are_refused(trained, corpora, tmp_path, run, bits_per_byte):
    tuned = run(
        tmp_path / "tuned", "experiment=state_tuning", f"checkpoint={trained('rwkv7')}", "max_steps=1", *corpora["code"]
    )
    trained_on = run(tmp_path / "on", f"checkpoint={trained('rwkv7')}", "max_steps=1", *corpora["code"])
    evaluation = (corpora["code"], tmp_path / "out")
    with pytest.raises(CheckpointError, match="of another model"):
        bits_per_byte(trained("mlstm-exp"), *evaluation, f"states={tuned}/states.pt")
    with pytest.raises(CheckpointError, match="holds no states"):
        bits_per_byte(trained("rwkv7"), *evaluation, f"states={tmp_path}/absent.pt")
    with pytest.raises(CheckpointError, match="tuned with other weights than these"):
        bits_per_byte(trained_on, *evaluation, f"states={tuned}/states.pt")
    os.truncate(tuned / "states.pt", 100)
    with pytest.raises(CheckpointError, match="holds no states"):
        bits_per_byte(trained("rwkv7"), *evaluation, f"states={tuned}/states.pt")
    assert math.isfinite(bits_per_byte(trained("rwkv7"), *evaluation))
