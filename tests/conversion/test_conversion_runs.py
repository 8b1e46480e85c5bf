"""`convert=true`: runs that begin with a teacher's weights under other mixers."""

import pytest
import torch

import longmix
from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.errors import ConfigError
from longmix.reading import read_json

LOOP = ("logger=csv", "batch_size=2", "seq_len=32", "data.validation_tokens=256", "trainer=cpu", "max_steps=2")
SIZES = ("model.num_layers=2", "model.d_model=32", "model.mlp_hidden=32")
STAGES = "stages=[{objective:layers,max_steps:2},{objective:logits,max_steps:1},{max_steps:1}]"


@pytest.fixture(scope="module")
def train(shared_cache):
    return lambda folder, *words: longmix.train([*LOOP, f"data.cache_dir={shared_cache}", *words], folder=folder).folder


@pytest.fixture(scope="module")
def teacher(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("teacher") / "run", *SIZES, "mixer=flash")


def state(run, step):
    return load_checkpoint(run / f"checkpoints/step-{step:08d}")


def converted(train, folder, teacher, *words):
    limits = ("max_steps=null", "max_tokens=null", "loop.checkpoint_every=1", "loop.keep_checkpoints=9")
    return train(folder, f"checkpoint={teacher}", "convert=true", "mixer=gla+flash", STAGES, *limits, *words)


def test_a_conversion_with_its_stages_goes_on_bit_for_bit(train, teacher, tmp_path):
    run = converted(train, tmp_path / "a", teacher)
    report = read_json(run / "transfer.json")
    assert report["taken"] and report["new"] and "of the" in report["summary"]
    began = load_checkpoint(CheckpointStore(teacher / "checkpoints").latest())["model"]
    after = state(run, 2)["model"]  # what layers taught
    assert torch.equal(after["blocks.1.mixer.query.weight"], began["blocks.1.mixer.query.weight"])
    assert torch.equal(after["blocks.0.mlp.up.weight"], began["blocks.0.mlp.up.weight"])
    assert any(name.startswith("blocks.0.mixer.decay") for name in after)
    again = converted(train, tmp_path / "b", teacher, f"resume={run}/checkpoints/step-00000003")
    one, other = (state(folder, 4)["model"] for folder in (run, again))
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    loaded = longmix.load(run, device="cpu")
    assert [type(mixer).__name__ for mixer in loaded.model.mixers()] == ["GLA", "Flash"]


def test_the_identity_begins_with_the_loss_of_its_teacher(train, teacher, tmp_path):
    run = train(tmp_path / "same", f"checkpoint={teacher}", "convert=true", "mixer=flash")
    taught, summary = (read_json(folder / "summary.json") for folder in (teacher, run))
    assert summary["validation_transferred"]["loss"] == taught["validation"]["loss"]
    assert summary["validation_transferred"]["step"] == 0 and summary["validation"]["step"] == 2
    assert "validation_transferred" not in taught


def test_what_the_transfer_left_is_kept_through_a_stop(train, teacher, tmp_path):
    words = (f"checkpoint={teacher}", "convert=true", "mixer=gla", "loop.checkpoint_every=1")
    once = train(tmp_path / "once", *words)
    again = train(tmp_path / "again", *words, f"resume={once}/checkpoints/step-00000001")
    one, other = (read_json(run / "summary.json")["validation_transferred"] for run in (once, again))
    assert one == other and one["step"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("convert=true", "mixer=gla"), "give checkpoint=RUN"),
        (("convert=true", "checkpoint=RUN"), "needs the mixer"),
        (("convert=true", "checkpoint=RUN", "mixer=gla", "model.d_model=64"), "model.d_model comes from checkpoint"),
        (("checkpoint=RUN", "mixer=gla"), "mixer comes from checkpoint"),
    ],
)
def test_what_cannot_be_converted_is_refused(train, teacher, tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        train(tmp_path / "no", *(word.replace("RUN", str(teacher)) for word in words))


def test_nothing_to_learn_is_refused_before_there_is_a_folder(train, teacher, tmp_path):
    words = f"checkpoint={teacher}", "convert=true", "mixer=flash"
    for more, said in (
        (("objective=layers",), "^objective=layers: every layer"),
        (("max_steps=null", "max_tokens=null", STAGES), r"^stages\[0\]: objective=layers: every layer"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(tmp_path / "no", *words, *more)
    assert not (tmp_path / "no").exists()
