"""What was written before classes moved is read, continued and exported as if they had always been where they are.

`fixtures/earlier` was made by the version before: three of six steps, a saved generation, an exported folder, and the
figures of that version's own six steps.
"""

import csv
import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from taken_settings import taken_settings

from longmix import aliases
from longmix.aliases import path_now, renewed
from longmix.checkpoints import load_checkpoint
from longmix.config import locate

EARLIER = Path(__file__).parent / "fixtures" / "earlier"
CONFIGS = Path(__file__).parents[1] / "configs"

NODES = {
    "longmix.mixers.decayed.Decayed": [
        ({"decay": "alibi"}, "longmix.mixers.lightning.Lightning"),
        ({"decay": "retention"}, "longmix.mixers.retention.Retention"),
        ({"decay": "learned"}, "longmix.mixers.simple_gla.SimpleGLA"),
    ],
    "longmix.mixers.deltanet.GatedDelta": [
        ({"decay": "none"}, "longmix.mixers.deltanet.DeltaNet"),
        ({"decay": "head"}, "longmix.mixers.gated_deltanet.GatedDeltaNet"),
        ({"decay": "sigmoid"}, "longmix.mixers.gla.GLA"),
        ({"decay": "channel"}, "longmix.mixers.kda.KDA"),
    ],
}


@pytest.mark.parametrize("path", [*aliases.CLASSES, *aliases.BY_SETTINGS])
def test_a_class_that_moved_is_found(path):
    module, _, name = path_now(path).rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert inspect.isclass(found) and found.__module__ == module
    assert locate(path, "mixer") is found


@pytest.mark.parametrize("module", aliases.MODULES.values())
def test_a_module_that_moved_is_found(module):
    importlib.import_module(module)


@pytest.mark.parametrize(
    ("path", "given", "now"), [(path, *case) for path, cases in NODES.items() for case in cases], ids=str
)
def test_a_class_that_became_several_is_the_one_of_its_settings(path, given, now):
    pattern = {"pattern": ["a"], "a": {"_target_": path, **given}}
    assert renewed(pattern) == {"pattern": ["a"], "a": {"_target_": now, **given}}
    assert pattern["a"]["_target_"] == path


def test_todays_configuration_stays_as_it_is():
    for file in CONFIGS.rglob("*.yaml"):
        node = yaml.safe_load(file.read_text())
        assert renewed(node) == node, file


@pytest.mark.parametrize("file", sorted((CONFIGS / "mixer").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_mixer_is_one_name_and_its_defaults_are_those_of_its_file(file):
    node = yaml.safe_load(file.read_text())
    node.pop("defaults", None)
    package, module, name = node.pop("_target_").rsplit(".", 2)
    mixer = getattr(importlib.import_module(f"{package}.{module}"), name)
    assert (package, module) == ("longmix.mixers", file.stem)
    assert name.lower() in (file.stem.replace("_", ""), f"{file.stem}attention")  # `Tensor` is torch's
    assert set(node) | {"shape", "layer_index"} == taken_settings(mixer)
    for key, value in node.items():
        default = first_default(mixer, key)
        assert (list(default) if isinstance(default, tuple) else default) == value, key


def first_default(kind: type, name: str) -> object:
    """The default of a setting in the nearest class that names it."""
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            if name in parameters:
                return parameters[name].default
    raise AssertionError(name)


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A copy, with the folders named as the commands name them."""
    folder = tmp_path / "earlier"
    shutil.copytree(EARLIER / "run", folder / "runs" / "old")
    for name in ("saved.pt", "exported"):
        copy = shutil.copytree if (EARLIER / name).is_dir() else shutil.copy
        copy(EARLIER / name, folder / name)
    return folder


def losses(file: Path) -> list[tuple[str, float, float]]:
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    return [(row["step"], float(row["train/loss"] or 0), float(row["validation/loss"] or 0)) for row in rows]


WORDS = (
    *("logger=csv", "seq_len=32", "batch_size=2", "model.d_model=16", "model.num_layers=4", "model.num_heads=2"),
    *("model.mlp_hidden=16", "data.validation_tokens=256", "trainer=cpu", "trainer.num_threads=1", "loop.log_every=1"),
    *("loop.checkpoint_every=3", "loop.validate_every=3", "mixer=retention+gla+sparse_flash_drop+mlstm_tfla"),
)


@pytest.fixture
def go_on(earlier):
    """`go_on("train.py", *words)` runs an entry point beside the copy."""

    def run(program: str, *words: str) -> str:
        place = [str(CONFIGS.parent / program)] if program.endswith(".py") else ["-m", program]
        done = subprocess.run(
            [sys.executable, *place, *words], cwd=earlier, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["name=old", "resume=runs/old"], ids=["named", "by-folder"])
def test_a_run_goes_on_as_it_would_have(earlier, go_on, shared_cache, resume):
    words = ["resume=auto", resume] if resume.startswith("name") else [resume]
    go_on("train.py", *WORDS, f"data.cache_dir={shared_cache}", "max_steps=6", *words)
    found, straight = losses(earlier / "runs/old/metrics.csv"), losses(EARLIER / "continued.csv")
    assert [row[0] for row in found] == [row[0] for row in straight]
    torch.testing.assert_close([row[1:] for row in found], [row[1:] for row in straight], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_saved_generation_goes_on(earlier, go_on):
    words = ["checkpoint=runs/old/checkpoints/step-00000003", "load=saved.pt", "max_tokens=4", "temperature=0"]
    assert "4 tokens in" in go_on("generate.py", *words)


@pytest.mark.slow
def test_an_exported_folder_is_read(earlier, go_on):
    pytest.importorskip("transformers")
    go_on("longmix.interop.huggingface", "import", "exported", "imported")
    weights = load_checkpoint(earlier / "imported", optimizers=False)["model"]
    saved = load_checkpoint(EARLIER / "run", optimizers=False)
    torch.testing.assert_close(weights, saved["model"], rtol=0, atol=0)
    assert "longmix.mixers.gla.GLA" in json.dumps(saved["config"])


@pytest.mark.slow
def test_a_report_names_its_mixers(earlier, go_on):
    assert "retention+gla+sparse_flash_drop+mlstm_tfla" in go_on("longmix.reporting", "runs", "--output", "report")
