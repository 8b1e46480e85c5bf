"""Every file that longmix writes meets a full disk: one StorageError, the old file stays, nothing is left over."""

import json
import os
from pathlib import Path

import pytest
import torch

from longmix.checkpoints import CheckpointStore, save_tensors
from longmix.checkpoints.tensors import pieces
from longmix.config import ModelConfig, resolved
from longmix.data.prepared import download
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.distributed.agreement import Processes
from longmix.errors import StorageError
from longmix.files import replace_json, replace_text
from longmix.generation.session import Session
from longmix.model.build import build_model
from longmix.model.tuned_states_file import save_states

TEXTS = [f"document number {number} " * 20 for number in range(30)]


class Words:
    name, splits = "words", ("train",)

    def documents(self, split):
        return iter(TEXTS)

    def fingerprint(self):
        return {"kind": "Words"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, composed):
    """A run's folder, its model and its state."""
    folder = tmp_path_factory.mktemp("base")
    words = ["model.d_model=32", "model.num_layers=1", "model.num_heads=2", "model.mlp_hidden=32", "mixer=rwkv7"]
    node = resolved(composed([*words, "block=rwkv7", "mixer.head_dim=16", "trainer=cpu"], "train", folder))
    model, tokenizer = build_model(ModelConfig.of(node), 257), ByteTokenizer()
    state = {"step": 1, "config": node, "tokenizer": tokenizer.state(), "model": model.state_dict(), "optimizers": []}
    CheckpointStore(folder / "checkpoints").save(state, {})
    (folder / "remote.bin").write_bytes(bytes(300_000))
    return folder, model, state


def sharded(folder, trained):
    tensors = {f"model/{name}": weight for name, weight in trained[2]["model"].items()}
    rest = {**trained[2], "model": {}}
    store = CheckpointStore(folder)
    store.save_sharded(pieces(tensors, 0, 1), {}, {**rest, "more": "x" * 5000}, {}, Processes())


def run_file_of_shards(folder, trained):
    tensors = {"model/x": torch.zeros(1)}
    rest = {**trained[2], "model": {}, "more": "x" * 200_000}
    CheckpointStore(folder).save_sharded(pieces(tensors, 0, 1), {}, rest, {}, Processes())


def generation(folder, trained):
    session = Session(trained[1].eval(), 2)
    session.prefill([torch.arange(9)] * 2)
    session.save(folder / "saved", {})


def rwkv(folder, trained):
    from longmix.interop.rwkv import rwkv_weights

    save_tensors(folder / "out.pth", rwkv_weights(trained[1]))


def huggingface(folder, trained):
    pytest.importorskip("transformers")
    from longmix.interop.huggingface.export import export

    export(trained[0], folder / "exported")


def remote(folder, trained):
    download(f"file://{trained[0] / 'remote.bin'}", folder / "local.bin")


def metrics(folder, trained):
    from longmix.training.loggers import CsvLog

    log = CsvLog()
    log.open(folder, {}, "name", 1)


def tuned(folder, trained):
    state = trained[2]
    save_states(folder / "states.pt", ModelConfig.of(state["config"]), state["model"])


WRITERS = {
    "json": (lambda folder, trained: replace_json(folder / "x.json", ["x" * 3000]), 2000),
    "text": (lambda folder, trained: replace_text(folder / "x.txt", "x" * 3000), 2000),
    "states": (tuned, 500),
    "generation": (generation, 3000),
    "rwkv": (rwkv, 20_000),
    "checkpoint": (lambda folder, trained: CheckpointStore(folder).save(trained[2], {}), 20_000),
    "checkpoint-info": (lambda folder, trained: CheckpointStore(folder).save({"step": 1}, {"x": "x" * 9000}), 5000),
    "shards": (sharded, 20_000),
    "run-file-of-shards": (run_file_of_shards, 100_000),
    "huggingface-weights": (huggingface, 20_000),
    "huggingface-config": (huggingface, 100),
    "tokens": (lambda folder, trained: prepare(Words(), ByteTokenizer(), "train", folder, Preparation(10**6)), 5000),
    "tokens-in-pieces": (lambda folder, trained: prepare(Words(), ByteTokenizer(), "train", folder), 5000),
    "tokens-at-once": (lambda folder, trained: prepare(Words(), ByteTokenizer(), "train", folder), 0),
    "bpe": (lambda folder, trained: BpeTokenizer(300).prepare(Words(), folder), 2000),
    "remote-shard": (remote, 100_000),
    "metrics": (metrics, 5000),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("write", "size"), WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_storage_error_and_leaves_nothing(tmp_path, trained, limited_file_size, write, size):
    folder = tmp_path / "folder"
    folder.mkdir()
    if write is metrics:
        (folder / "metrics.csv").write_text("step,train/loss\n" + "1,2.5\n" * 2000)
    with limited_file_size(size), pytest.raises(StorageError) as caught:
        write(folder, trained)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    assert "File too large" in text
    left = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert left <= {Path("metrics.csv")}


@pytest.mark.parametrize("kind", ["text", "json"])
def test_an_existing_file_is_untouched(tmp_path, limited_file_size, kind):
    path = tmp_path / "x"
    path.write_text(json.dumps("old"))
    with limited_file_size(100), pytest.raises(StorageError):
        (replace_json if kind == "json" else replace_text)(path, "x" * 3000)
    assert json.loads(path.read_text()) == "old"
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208
