"""Hugging Face folders that are damaged, foreign or not there: each is refused by name, and nothing is half written."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hf_folders import NO_NORM, foreign, loaded, same_weights

from longmix.errors import CheckpointError, ConfigError, LongmixError, StorageError

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

from longmix.interop.huggingface import folder as folders  # noqa: E402
from longmix.interop.huggingface.export import export  # noqa: E402
from longmix.interop.huggingface.load import import_folder  # noqa: E402
from longmix.interop.huggingface.seal import check_seal  # noqa: E402


def damaged_weights(folder: Path) -> None:
    path = folder / folders.WEIGHTS
    path.write_bytes(path.read_bytes()[:-50])


def changed_weights(change):
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / folders.WEIGHTS)
        change(weights)
        save_file(weights, folder / folders.WEIGHTS, {"format": "pt"})

    return apply


def changed_config(**settings):
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return apply


def unsealed(folder: Path) -> None:
    """Make a folder what earlier versions wrote, without the hashes of its files."""
    path = folder / folders.OWN_FILE
    content = json.loads(path.read_text())
    del content["files"], content["own_sha256"]
    path.write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    del config["exported_by"]
    (folder / "config.json").write_text(json.dumps(config))


HEAD = "model.head.weight"


DAMAGE = {
    "no-config": (
        lambda folder: (folder / "config.json").unlink(),
        "is not a folder of a model: it has no config.json",
    ),
    "not-json": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "cut-weights": (damaged_weights, "model.safetensors is damaged"),
    "no-weights": (lambda folder: (folder / folders.WEIGHTS).unlink(), "model.safetensors is missing"),
    "missing": (changed_weights(lambda weights: weights.pop(HEAD)), "head.weight is missing"),
    "extra": (changed_weights(lambda weights: weights.update(more=torch.ones(1))), "more is not a part of the model"),
    "shape": (
        changed_weights(lambda weights: weights.update({HEAD: torch.ones(3, 64)})),
        "head.weight has shape [3, 64] instead of [257, 64]",
    ),
    "float64": (
        changed_weights(lambda weights: weights.update({HEAD: weights[HEAD].double()})),
        "is float64, of which",
    ),
    "other-model": (changed_config(mixer={"_target_": "longmix.mixers.flash.Flash"}), "another model than its longmix"),
    "own-file": (lambda folder: (folder / folders.OWN_FILE).write_text('{"format": 1}'), "longmix.json lacks"),
    "own-format": (lambda folder: (folder / folders.OWN_FILE).write_text('{"format": 9}'), "has format 9"),
}


@pytest.mark.slow
def test_a_damaged_folder_is_one_error(saved, tmp_path, command):
    run, _ = saved("mixer=lightning")
    code, (line,) = command("export", run, tmp_path / "good")
    assert code == 0
    assert line.startswith("wrote ")
    for name, (damage, message) in DAMAGE.items():
        code, _ = command("export", run, tmp_path / name)
        damage(tmp_path / name)
        code, (line,) = command("import", tmp_path / name, tmp_path / "back")
        assert code == 2, name
        assert f"{tmp_path / name}/" in line, name
        assert "Export the folder again" in line, name
        earlier = tmp_path / f"{name}-earlier"
        code, _ = command("export", run, earlier)
        unsealed(earlier)
        damage(earlier)
        code, (line,) = command("import", earlier, tmp_path / "back")
        assert code == 2, name
        assert message in line, name
    assert command("import", tmp_path / "nowhere", tmp_path / "back")[1][0].startswith(
        "CheckpointError: there is no folder"
    )
    code, (line,) = command("import", tmp_path / "good", tmp_path / "back", "--separator", "<s>")
    assert "leave --separator out" in line
    assert not (tmp_path / "back").exists()
    code, (line,) = command("import", tmp_path / "good", tmp_path / "back")
    assert code == 0
    assert "step-00000007 from a model of type longmix" in line
    assert "already holds a checkpoint" in command("import", tmp_path / "good", tmp_path / "back")[1][0]


def test_every_damage_to_an_exported_folder_is_refused_by_the_name_of_its_file(saved, tmp_path):
    run, _ = saved("mixer=lightning")
    export(run, tmp_path / "folder")
    drawn = random.Random(0)
    read = [path for path in sorted((tmp_path / "folder").iterdir()) if path.name != "README.md"]
    assert {path.name for path in read} >= {"config.json", "longmix.json", "model.safetensors", "tokenizer.json"}
    for path in read:
        content = path.read_bytes()
        damages = [content[:size] for size in (0, len(content) // 2, len(content) - 2)] + [content + b"x", None]
        for _ in range(40):
            changed = bytearray(content)
            place = drawn.randrange(8 * len(content))
            changed[place // 8] ^= 1 << place % 8
            damages.append(bytes(changed))
        for damage in damages:
            path.unlink()
            if damage is None and path.name == folders.OWN_FILE:
                path.write_bytes(content)
                continue  # it is an option to do without
            if damage is not None:
                path.write_bytes(damage)
            with pytest.raises(CheckpointError, match=re.escape(str(path))):
                import_folder(tmp_path / "folder", tmp_path / "back")
            with pytest.raises(CheckpointError, match=re.escape(str(path))):
                check_seal(tmp_path / "folder")
            path.write_bytes(content)
    import_folder(tmp_path / "folder", tmp_path / "back")


def test_folders_of_earlier_versions_and_those_that_lost_their_own_file_are_read_with_a_warning(
    saved, tmp_path, caplog
):
    run, model = saved("mixer=flash", NO_NORM)
    for name, change, words in (
        ("earlier", unsealed, "holds no SHA-256, as earlier versions wrote it"),
        ("lost", lambda folder: (folder / folders.OWN_FILE).unlink(), "has lost its longmix.json"),
    ):
        export(run, tmp_path / name)
        change(tmp_path / name)
        caplog.clear()
        import_folder(tmp_path / name, tmp_path / f"{name}-back")
        assert [words in record.getMessage() for record in caplog.records if record.name.startswith("longmix")] == [
            True
        ]
        assert same_weights(tmp_path / f"{name}-back", model)


def flipped_weight(folder: Path) -> None:
    content = bytearray((folder / folders.WEIGHTS).read_bytes())
    content[-5] ^= 1
    (folder / folders.WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "name"),
    [(changed_config(initializer_range=0.5), r"config\.json"), (flipped_weight, r"model\.safetensors")],
    ids=["configuration", "one bit of the weights"],
)
def test_transformers_loader_refuses_a_changed_file(saved, tmp_path, change, name):
    run, _ = saved("mixer=lightning")
    export(run, tmp_path / "folder")
    change(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=rf"{name} is not the file that was exported"):
        loaded(tmp_path / "folder")


def test_foreign_classes_and_lost_weights_are_refused_by_transformers_loader_too(saved, tmp_path):
    run, _ = saved("mixer=lightning")
    export(run, tmp_path / "folder")
    unsealed(tmp_path / "folder")
    changed_weights(lambda weights: weights.pop(HEAD))(tmp_path / "folder")
    with pytest.raises(LongmixError, match=r"lacks model.head.weight"):
        loaded(tmp_path / "folder")
    changed_config(mixer={"_target_": "os.system"})(tmp_path / "folder")
    with pytest.raises(LongmixError, match=r"mixer=os.system is not part of longmix; these folders hold"):
        loaded(tmp_path / "folder")
    (tmp_path / "folder" / folders.OWN_FILE).unlink()
    with pytest.raises(LongmixError, match=r"mixer=os.system is not part of longmix"):
        import_folder(tmp_path / "folder", tmp_path / "back")


def test_a_folder_appears_whole_and_is_replaced_only_when_asked(saved, tmp_path, command, monkeypatch):
    run, _ = saved("mixer=flash")
    assert command("export", run, tmp_path / "folder", "--as", "longmix")[0] == 0
    code, (line,) = command("export", run, tmp_path / "folder")
    assert code == 2
    assert line.endswith("is there already; give another folder, or --force to replace it.")
    with monkeypatch.context() as patch:
        patch.setattr("longmix.interop.huggingface.export._card", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(StorageError, match="full"):
            export(run, tmp_path / "folder", force=True)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"] == "longmix"
    assert command("export", run, tmp_path / "folder", "--force")[0] == 0
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"] == "qwen3"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "run"}
    assert "--force does not replace it" in command("export", run, run, "--force")[1][0]
    assert "there is no" in command("export", tmp_path / "nothing", tmp_path / "other")[1][0]


def test_without_the_package_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "find_spec", lambda name: None)
    for call in (export, import_folder):
        with pytest.raises(ConfigError, match=r"this needs the package transformers: pip install 'longmix\[interop\]'"):
            call(tmp_path, tmp_path / "new")


def test_no_tokenizer_or_one_that_does_not_fit(tmp_path):
    foreign(tmp_path / "small", vocab_size=200)
    with pytest.raises(LongmixError, match="has 257 ids, and the model 200"):
        import_folder(tmp_path / "small", tmp_path / "run")
    foreign(tmp_path / "folder")
    with pytest.raises(LongmixError, match=r"has no token '<s>'"):
        import_folder(tmp_path / "folder", tmp_path / "run", separator="<s>")
    (tmp_path / "folder" / "tokenizer.json").unlink()
    with pytest.raises(LongmixError, match=r"has no tokenizer.json"):
        import_folder(tmp_path / "folder", tmp_path / "run")
