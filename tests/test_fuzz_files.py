"""Every kind of file that longmix reads, damaged at random places: refused by name in one line, or read as it was.

Two kinds of damage. Bytes change: then a file with a digest is either refused or, where the change means nothing
(a blank in JSON), read as before. Or the content changes and the digest is made anew, as somebody hostile would: then
what is read may be anything, but no other exception than a LongmixError comes up. Long: `fuzz(kind, folder, 20_000)`.
"""

import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longmix.checkpoints import CheckpointStore, load_checkpoint, save_tensors
from longmix.checkpoints.tensors import pieces
from longmix.checkpoints.verify import facts_of
from longmix.config import ModelConfig, resolved
from longmix.data import prepared as remote
from longmix.data.prepared import PreparedData, prepared_tokenizer
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.sealed_folder import read_manifest
from longmix.data.tokens.tokenizers import ByteTokenizer, TokenizerFile
from longmix.distributed.agreement import Processes
from longmix.errors import LongmixError
from longmix.files import sha256_of_json
from longmix.generation.session import Session
from longmix.model.build import build_model, model_from_checkpoint
from longmix.model.tuned_states_file import load_states, save_states, tune_states
from longmix.reading import read_yaml
from longmix.restore import restore

CASES = 40
"""Of each kind in the suite."""

VALUES = [
    None,
    True,
    0,
    -1,
    3,
    10**9,
    10**30,
    0.5,
    float("nan"),
    1e300,
    "",
    "x",
    "a" * 5000,
    "\x1b[2J\n",
    [],
    [1],
    {},
    {"a": {"b": 1}},
    {"_target_": "os.system"},
    [[[[[[]]]]]],
]


class Words:
    name, splits = "words", ("train",)

    def documents(self, split: str):
        return iter([f"document number {number} " * 8 for number in range(12)])

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "Words"}


@dataclass
class Kind:
    """One kind of file.

    Attributes:
        make: writes good files into a folder.
        load: reads them and returns what can be compared.
        sealed: a change of bytes is never read as something else.
        change: changes the content of good files at random and makes the digests anew.
    """

    make: Callable[[Path], None]
    load: Callable[[Path], Any]
    sealed: bool = True
    change: Callable[[Path, random.Random], None] | None = None


def flat(value: Any) -> Any:
    """Tensors as bytes, so that `==` compares."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: flat(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [flat(part) for part in value]
    return value


def damaged_bytes(content: bytes, drawn: random.Random) -> bytes:
    """One change of bytes of one of several kinds."""
    size = len(content)
    place = drawn.randrange(size + 1)
    changed = bytearray(content)
    kind = drawn.choice(
        ["bit", "bit", "bit", "byte", "run", "zeros", "cut", "more", "twice", "without", "empty", "noise"]
    )
    if kind == "bit" and size:
        changed[place % size] ^= 1 << drawn.randrange(8)
    elif kind == "byte" and size:
        changed[place % size] = drawn.randrange(256)
    elif kind in ("run", "zeros"):
        end = min(size, place + drawn.randrange(1, 600))
        changed[place:end] = drawn.randbytes(end - place) if kind == "run" else bytes(end - place)
    elif kind == "cut":
        del changed[place:]
    elif kind == "more":
        changed += drawn.randbytes(drawn.randrange(1, 200))
    elif kind == "twice":
        changed[place:place] = changed[max(0, place - 50) : place]
    elif kind == "without":
        del changed[place : place + drawn.randrange(1, 100)]
    elif kind == "empty":
        changed.clear()
    else:
        changed[:] = drawn.randbytes(size)
    return bytes(changed)


def damage(folder: Path, drawn: random.Random) -> None:
    path = drawn.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
    kind = drawn.random()
    if kind < 0.9:
        path.write_bytes(damaged_bytes(path.read_bytes(), drawn))
    elif kind < 0.95:
        path.unlink()
    else:
        other = drawn.choice([other for other in sorted(folder.rglob("*")) if other.is_file()])
        path.write_bytes(other.read_bytes())


def mutate(node: Any, drawn: random.Random) -> None:
    """Replace, remove or add one entry at a random place of nested dicts and lists."""
    while isinstance(node, dict | list) and node:
        key = drawn.choice(list(node)) if isinstance(node, dict) else drawn.randrange(len(node))
        if isinstance(node[key], dict | list) and node[key] and drawn.random() < 0.75:
            node = node[key]
            continue
        kind = drawn.random()
        if kind < 0.2:
            del node[key]
        elif kind < 0.3 and isinstance(node, dict):
            node[drawn.choice(["", "x", "../x", "a/b"])] = copy.deepcopy(drawn.choice(VALUES))
        elif isinstance(node[key], torch.Tensor) and kind < 0.7:
            tensor = node[key]
            changes = [
                tensor[..., :-1] if tensor.ndim else tensor[None],
                tensor.double(),
                tensor.int(),
                tensor.to("meta"),
            ]
            changes += [torch.full_like(tensor, 3), tensor[None], tensor.reshape(-1).expand(10**6, -1)]
            node[key] = drawn.choice(changes)
        else:
            node[key] = copy.deepcopy(drawn.choice(VALUES))
        return


def mutated(content: dict[str, Any], drawn: random.Random) -> dict[str, Any]:
    content = copy.deepcopy(content)
    for _ in range(drawn.choice([1, 1, 1, 2, 4])):
        mutate(content, drawn)
    return content


@pytest.fixture(scope="module")
def kinds(composed, tmp_path_factory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("base")
    words = ["model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_hidden=16", "trainer=cpu"]
    return all_kinds(resolved(composed([*words, "mixer=mlstm_tfla"], "train", folder)))


def all_kinds(node: dict[str, Any]) -> dict[str, Kind]:
    """Every kind, for a model of a configuration."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    model = build_model(ModelConfig.of(node), 257).eval()
    tuned = copy.deepcopy(model)
    tune_states(tuned)
    state = {"step": 1, "config": node, "tokenizer": tokenizer.state(), "model": model.state_dict(), "optimizers": []}
    tuned_state = {**state, "model": tuned.state_dict()}
    first = Session(model, 2)
    first.prefill([torch.arange(5), torch.arange(5)])
    generation: list[dict[str, Any]] = []

    def whole(folder: Path) -> None:
        CheckpointStore(folder).save(state, {})

    def sharded(folder: Path) -> None:
        tensors = {f"model/{name}": weight for name, weight in state["model"].items()}
        rest = {**state, "model": {}}
        CheckpointStore(folder).save_sharded(pieces(tensors, 0, 1), {}, rest, {}, Processes())

    def change_whole(folder: Path, drawn: random.Random) -> None:
        path = folder / "step-00000001" / "state.pt"
        save_plain(path, mutated(state, drawn))
        seal_info(path, {"format": 1, "step": 1})

    def change_sharded(folder: Path, drawn: random.Random) -> None:
        path = folder / "step-00000001" / "run.pt"
        save_plain(path, mutated(torch.load(path, weights_only=True), drawn))
        info = json.loads((path.parent / "info.json").read_text())
        info["files"]["run.pt"] = facts_of(path)
        (path.parent / "info.json").write_text(json.dumps(mutated(info, drawn) if drawn.random() < 0.5 else info))

    def restored(folder: Path) -> Any:
        done = restore(folder / "step-00000001")
        return flat([done.step, done.written, dict(done.model.state_dict()), done.tokenizer.state()])

    def states(folder: Path) -> Any:
        again = copy.deepcopy(model)
        load_states(again, folder / "states.pt", ModelConfig.of(node))
        return flat(dict(again.state_dict()))

    def change_states(folder: Path, drawn: random.Random) -> None:
        path = folder / "states.pt"
        save_tensors(path, mutated(torch.load(path, weights_only=True), drawn))

    def session(folder: Path) -> Any:
        again, about = Session.load(folder / "saved", model, torch.device("cpu"))
        return flat([about, again.logits, again.length, again.batch, again.state_bytes()])

    def save_session(folder: Path) -> None:
        first.save(folder / "saved", {"ids": [[1, 2], [3, 4]]})
        generation.append(torch.load(folder / "saved", weights_only=True))

    def tokens(folder: Path) -> None:
        prepare(Words(), tokenizer, "train", folder, Preparation(300))

    def data(folder: Path) -> PreparedData:
        return PreparedData(
            str(folder), tokenizer, seq_len=16, batch_size=2, seed=0, cache_dir=str(folder.parent / "cache")
        )

    def read_tokens(folder: Path) -> Any:
        opened = data(folder).token_file("train")
        own = prepared_tokenizer(str(folder))
        return flat([np.asarray(opened.tokens), np.asarray(opened.offsets), opened.manifest, own.state()])

    def change_manifest(folder: Path, drawn: random.Random) -> None:
        (path,) = folder.glob("*/manifest.json")
        content = mutated(read_manifest(path), drawn)
        path.write_text(json.dumps({**content, "manifest_sha256": sha256_of_json(content)}))

    def read_remote(folder: Path) -> Any:
        remote._verified.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(remote, "local_path", lambda url: None)
            patched.setattr("longmix.data.corpora.retry.FIRST_PAUSE_SECONDS", 0.0)
            shutil.rmtree(folder.parent / "cache", ignore_errors=True)
            opened = data(folder).token_file("train")
            return flat([np.asarray(opened.tokens), np.asarray(opened.offsets), opened.manifest])

    def library(folder: Path) -> None:
        BpeTokenizer(280).prepare(Words(), folder / "made")
        (path,) = (folder / "made").glob("*/tokenizer.json")
        shutil.move(path, folder / "tokenizer.json")
        shutil.rmtree(folder / "made")

    def change_library(folder: Path, drawn: random.Random) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), drawn)))

    def tuned(folder: Path) -> None:
        save_states(folder / "states.pt", ModelConfig.of(tuned_state["config"]), tuned_state["model"])

    def yaml(folder: Path) -> None:
        from omegaconf import OmegaConf

        OmegaConf.save(OmegaConf.create(node), folder / "config.yaml")

    return {
        "whole": Kind(whole, restored, change=change_whole),
        "sharded": Kind(sharded, restored, change=change_sharded),
        "states": Kind(tuned, states, change=change_states),
        "generation": Kind(
            save_session,
            session,
            change=lambda folder, drawn: save_tensors(folder / "saved", mutated(generation[-1], drawn)),
        ),
        "tokens": Kind(tokens, read_tokens, change=change_manifest),
        "remote-tokens": Kind(tokens, read_remote, change=change_manifest),
        "tokenizer-json": Kind(
            library, lambda folder: TokenizerFile(str(folder / "tokenizer.json")).state(), False, change_library
        ),
        "config-yaml": Kind(yaml, lambda folder: read_yaml(folder / "config.yaml"), False),
    }  # fmt: skip


def huggingface(node: dict[str, Any]) -> Kind:
    """A folder as export writes it."""
    from longmix.interop.huggingface.export import export
    from longmix.interop.huggingface.load import import_folder

    kinds = all_kinds(node)

    def make(folder: Path) -> None:
        kinds["whole"].make(folder.parent / "run" / "checkpoints")
        folder.rmdir()
        export(folder.parent / "run", folder)
        (folder / "README.md").unlink()

    def load(folder: Path) -> Any:
        shutil.rmtree(folder.parent / "back", ignore_errors=True)
        import_folder(folder, folder.parent / "back")
        state = load_checkpoint(folder.parent / "back")
        return flat([state["model"], dict(model_from_checkpoint(state).state_dict())])

    def change(folder: Path, drawn: random.Random) -> None:
        from longmix.interop.huggingface.seal import OWN_HASH

        name = drawn.choice(["config.json", "longmix.json", "tokenizer.json", "tokenizer_config.json"])
        content = json.loads((folder / "longmix.json").read_text())
        if name == "longmix.json":
            content = mutated(content, drawn)
        else:
            (folder / name).write_text(json.dumps(mutated(json.loads((folder / name).read_text()), drawn)))
            content["files"][name] = facts_of(folder / name)
        content.pop(OWN_HASH, None)
        (folder / "longmix.json").write_text(json.dumps({**content, OWN_HASH: sha256_of_json(content)}))

    return Kind(make, load, change=change)


def save_plain(path: Path, content: Any) -> None:
    torch.save(content, path)


def seal_info(path: Path, about: dict[str, Any]) -> None:
    (path.parent / "info.json").write_text(json.dumps({**about, **facts_of(path)}))


@dataclass
class Outcome:
    """What came of the cases of a kind."""

    refused: int = 0
    same: int = 0
    other: int = 0


def fuzz(kind: Kind, folder: Path, cases: int, seed: int = 0, hostile: bool = False) -> Outcome:
    """Damage `cases` times, one after the other; an AssertionError names the case that went wrong."""
    good, work = folder / "good", folder / "place" / "work"
    good.mkdir(parents=True)
    kind.make(good)
    shutil.copytree(good, work)
    wanted = kind.load(work)
    outcome = Outcome()
    for case in range(cases):
        drawn = random.Random(f"{seed} {case}")
        shutil.rmtree(work)
        shutil.copytree(good, work)
        if hostile and kind.change is not None:
            kind.change(work, drawn)
        else:
            damage(work, drawn)
        try:
            found = kind.load(work)
        except LongmixError as error:
            text = str(error)
            assert str(folder) in text, f"case {case}: no file named: {text}"
            assert "\n" not in text, f"case {case}: {text}"
            assert "\x1b" not in text, f"case {case}: {text}"
            assert len(text) < 2000, f"case {case}: {text}"
            outcome.refused += 1
        except BaseException as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
        else:
            outcome.same += found == wanted
            outcome.other += found != wanted
            assert hostile or not kind.sealed or found == wanted, f"case {case}: read as something else"
    return outcome


KINDS = ["whole", "sharded", "states", "generation", "tokens", "remote-tokens", "tokenizer-json", "config-yaml"]


@pytest.mark.parametrize("hostile", [False, True], ids=["bytes", "resealed"])
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_by_name_or_read_as_they_were(kinds, tmp_path, name, hostile):
    if hostile and kinds[name].change is None:
        pytest.skip("it has no digest")
    with warnings.catch_warnings(action="ignore"):
        outcome = fuzz(kinds[name], tmp_path, CASES, hostile=hostile)
    assert outcome.refused > CASES // 4


@pytest.mark.slow
def test_damaged_exported_folders(composed, tmp_path):
    pytest.importorskip("transformers")
    words = ["model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_hidden=16", "trainer=cpu"]
    kind = huggingface(resolved(composed([*words, "mixer=lightning"], "train", tmp_path)))
    for hostile, cases in ((False, CASES), (True, 10)):
        outcome = fuzz(kind, tmp_path / str(hostile), cases, hostile=hostile)
        assert outcome.refused > cases // 4
