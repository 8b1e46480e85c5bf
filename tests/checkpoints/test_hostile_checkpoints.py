"""Checkpoints whose hashes are right and whose content is not: each is one line that names the checkpoint."""

import copy
import json
import os
import resource
import time
from pathlib import Path

import pytest
import torch

from longmix.checkpoints import CheckpointStore, find_checkpoint, load_checkpoint, open_checkpoint
from longmix.config import ModelConfig, resolved
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import CheckpointError, LongmixError
from longmix.model.build import build_model
from longmix.restore import restore

LIBRARY = {"kind": "library", "separator": "<|endoftext|>"}
REGEX = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((((("}, "behavior": "Isolated", "invert": False},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}


def nested(depth: int) -> dict:
    node: dict = {}
    for _ in range(depth):
        node = {"a": node}
    return node


def weight(name, change):
    return lambda state: state["model"].update({name: change(state["model"][name])})


def config(**settings):
    """Change settings by dotted names with two underscores for the dot."""

    def apply(state):
        for key, value in settings.items():
            *parents, last = key.split("__")
            node = state["config"]
            for parent in parents:
                node = node[parent]
            node[last] = value

    return apply


HEAD, EMBEDDING = "head.weight", "embedding.weight"
HOSTILE = {
    **{f"no-{key}": lambda state, key=key: state.pop(key) for key in ("step", "config", "tokenizer", "model")},
    **{
        f"{key}-{name}": lambda state, key=key, value=value: state.update({key: value})
        for key in ("step", "config", "tokenizer", "model")
        for name, value in (("list", []), ("text", "x"), ("none", None), ("tensor", torch.ones(2)), ("empty", {}))
    },
    **{f"config-without-{key}": lambda state, key=key: state["config"].pop(key) for key in ("model", "mixer", "data")},
    "negative-step": lambda state: state.update(step=-1),
    "true-step": lambda state: state.update(step=True),
    "number-as-key": lambda state: state["config"].update({3: 4}),
    "number-as-weight-name": lambda state: state["model"].update({3: torch.ones(1)}),
    "tensor-in-config": config(seed=torch.tensor(3)),
    "text-as-seq-len": config(seq_len="64"),
    "deep-config": lambda state: state["config"].update(data=nested(200)),
    "stages-text": config(stages="x"),
    "stages-texts": config(stages=["x"]),
    "stages-mapping": config(stages={"seq_len": 4}),
    "layers": config(model__num_layers=10**9),
    "layers-text": config(model__num_layers="1"),
    "layers-none": config(model__num_layers=None),
    "layers-float": config(model__num_layers=1e30),
    "width": config(model__d_model=10**9),
    "hidden": config(model__mlp_hidden=10**12),
    "hidden-overflow": config(model__mlp_hidden=10**30),
    "heads": config(mixer__num_heads=10**9),
    "heads-0": config(model__num_heads=0),
    "target-number": config(model___target_=5),
    "target-empty": config(mixer___target_=""),
    "target-class": config(mixer___target_="longmix.data.tokens.tokenizers.ByteTokenizer"),
    "unknown-key": config(mixer__colour="red"),
    "eps-nan": config(model__norm_eps=float("nan")),
    "extra-weight": lambda state: state["model"].update(more=torch.ones(1)),
    "missing-weight": lambda state: state["model"].pop(HEAD),
    "weight-text": lambda state: state["model"].update({HEAD: "x"}),
    "weight-shape": weight(HEAD, lambda x: x[:, :-1]),
    "weight-scalar": weight(EMBEDDING, lambda x: x.sum()),
    "weight-int": weight(HEAD, lambda x: x.int()),
    "weight-sparse": weight(HEAD, lambda x: x.to_sparse()),
    "weight-meta": weight(HEAD, lambda x: x.to("meta")),
    "weight-expanded": weight(HEAD, lambda x: x[:1, :1].expand(10**9, 10**6)),
    "fewer-rows": lambda state: [weight(name, lambda x: x[:100])(state) for name in (HEAD, EMBEDDING)],
    "no-rows": lambda state: [weight(name, lambda x: x[:0])(state) for name in (HEAD, EMBEDDING)],
    "kind": lambda state: state.update(tokenizer={"kind": "bytds"}),
    "kind-list": lambda state: state.update(tokenizer={"kind": []}),
    "numbers-text": lambda state: state.update(tokenizer={"kind": "numbers", "vocab_size": "x"}),
    "numbers-huge": lambda state: state.update(tokenizer={"kind": "numbers", "vocab_size": 10**12}),
    "numbers-negative": lambda state: state.update(tokenizer={"kind": "numbers", "vocab_size": -5}),
    "library-number": lambda state: state.update(tokenizer={**LIBRARY, "json": 5}),
    "library-empty": lambda state: state.update(tokenizer={**LIBRARY, "json": "{}"}),
    "library-deep": lambda state: state.update(tokenizer={**LIBRARY, "json": "[" * 10**6}),
    "library-regex": lambda state: state.update(tokenizer={**LIBRARY, "json": json.dumps(REGEX)}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, composed):
    """A checkpoint's state, as training writes it but for the optimizers."""
    folder = tmp_path_factory.mktemp("base")
    words = ["model.d_model=32", "model.num_layers=1", "model.num_heads=2", "model.mlp_hidden=32", "trainer=cpu"]
    node = resolved(composed(words, "train", folder))
    model, tokenizer = build_model(ModelConfig.of(node), 257), ByteTokenizer()
    return {"step": 1, "config": node, "tokenizer": tokenizer.state(), "model": model.state_dict(), "optimizers": []}


def assert_one_line(checkpoint, act):
    with pytest.raises(LongmixError) as caught:
        act()
    text = str(caught.value)
    assert str(checkpoint) in text
    assert "\n" not in text
    assert len(text) < 1000
    assert "AttributeError" not in text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_checkpoint_with_another_content_is_one_line_with_its_name(base, tmp_path, change, capfd):
    state = copy.deepcopy(base)
    change(state)
    store = CheckpointStore(tmp_path / "checkpoints")
    checkpoint = store.save({**state, "step": 1}, {})
    torch.save(state, checkpoint / "state.pt")
    reseal(checkpoint)
    began = time.process_time()
    assert_one_line(checkpoint, lambda: restore(str(checkpoint)))
    assert time.process_time() - began < 30
    assert capfd.readouterr().err.count("\n") <= 1


def reseal(checkpoint, **more):
    from longmix.checkpoints.verify import facts_of

    info = {"format": 1, "step": 1, **facts_of(checkpoint / "state.pt"), **more}
    (checkpoint / "info.json").write_text(json.dumps(info))


INFOS = {
    "list": "[]",
    "number": "5",
    "deep": "[" * 100_000,
    "deep-object": '{"a":' * 100_000,
    "empty": "",
    "not-utf8": b"\xff\xfe",
    "nul": b"\0" * 100,
    "format-list": '{"format": []}',
    "format-true": '{"format": true}',
    "format-huge": '{"format": 1' + "0" * 5000 + "}",
    "no-sha": '{"format": 1, "bytes": 5}',
    "sha-number": '{"format": 1, "bytes": 5, "sha256": 7}',
    "files-list": '{"format": 2, "files": []}',
    "files-none": '{"format": 2, "files": null}',
    "files-facts": '{"format": 2, "files": {".metadata": 3}}',
    "files-up": '{"format": 2, "files": {"../state.pt": {"bytes": 1, "sha256": "x"}}}',
    "files-absolute": '{"format": 2, "files": {"/etc/passwd": {"bytes": 1, "sha256": "x"}}}',
    "no-files": '{"format": 2}',
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("content", INFOS.values(), ids=INFOS)
def test_any_info_is_one_line_with_its_name(base, tmp_path, content):
    checkpoint = CheckpointStore(tmp_path / "checkpoints").save(base, {})
    (checkpoint / "info.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for act in (load_checkpoint, open_checkpoint):
        assert_one_line(checkpoint, lambda act=act: act(checkpoint))


@pytest.mark.timeout(60)
def test_what_is_no_file_is_one_line_and_never_waited_for(base, tmp_path):
    for name in ("info.json", "state.pt"):
        for kind, make in (
            ("fifo", os.mkfifo),
            ("folder", os.mkdir),
            ("loop", lambda path: path.symlink_to(path.name)),
            ("device", lambda path: path.symlink_to("/dev/zero")),
        ):
            checkpoint = CheckpointStore(tmp_path / f"{name}-{kind}").save(base, {})
            (checkpoint / name).unlink()
            make(checkpoint / name)
            assert_one_line(checkpoint, lambda checkpoint=checkpoint: load_checkpoint(checkpoint))


def test_a_link_to_the_weights_is_followed(base, tmp_path):
    checkpoint = CheckpointStore(tmp_path / "checkpoints").save(base, {})
    (checkpoint / "state.pt").rename(tmp_path / "elsewhere.pt")
    (checkpoint / "state.pt").symlink_to(tmp_path / "elsewhere.pt")
    assert restore(checkpoint).step == 1


def test_the_folder_of_a_run_is_understood_and_never_to_be_deleted(base, tmp_path):
    run = tmp_path / "runs" / "kv3"
    checkpoint = CheckpointStore(run / "checkpoints").save(base, {})
    for path in (run, str(run), run / "checkpoints", checkpoint, str(checkpoint)):
        assert load_checkpoint(path)["step"] == 1
        assert open_checkpoint(path).checkpoint == checkpoint
        assert restore(path).checkpoint == checkpoint
        assert restore(path, device="cpu").checkpoint == checkpoint
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "file"):
        for act in (load_checkpoint, open_checkpoint, restore, find_checkpoint):
            with pytest.raises(CheckpointError, match=str(path)) as caught:
                act(path)
            assert "elete" not in str(caught.value)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_in_memory_is_one_line(base, tmp_path):
    state = {**base, "more": torch.zeros(1 << 28, dtype=torch.uint8)}
    checkpoint = CheckpointStore(tmp_path / "checkpoints").save(state, {})
    status = Path("/proc/self/status").read_text()
    used = int(next(line for line in status.splitlines() if line.startswith("VmSize")).split()[1]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 26), hard))
    try:
        assert_one_line(checkpoint, lambda: load_checkpoint(checkpoint))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert load_checkpoint(checkpoint)["step"] == 1
