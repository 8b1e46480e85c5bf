"""A file from somewhere else names classes of the right kind, or is refused before anything it names is called."""

import copy
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest

import longmix
import longmix_kernels
from longmix.checkpoints import CheckpointStore, find_checkpoint, load_checkpoint
from longmix.config import Choice, resolved
from longmix.data.training_data import TrainingData
from longmix.errors import CheckpointError, ConfigError, LongmixError
from longmix.evaluation.run import evaluate
from longmix.generation.run import generate
from longmix.mixers.parts.base import Mixer
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Standard
from longmix.model.rwkv_blocks import RWKVBlocks
from longmix.model.sharing import Sharing
from longmix.training.run import train
from longmix.trust import check_model_nodes, checked_data

LAUNCH = "longmix.training.process_launcher.launch"


def attack(flag: Path) -> dict:
    """A node that leaves a file behind if anybody builds it."""
    command = [sys.executable, "-c", f"open({str(flag)!r}, 'w').close()"]
    folder = {"_target_": "longmix.files.Path"}
    return {"_target_": LAUNCH, "command": command, "count": 1, "timeout": 5.0, "folder": folder}


def modules() -> list:
    """Every module of both packages that can be imported here."""
    found = []
    for package in (longmix, longmix_kernels):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                found.append(importlib.import_module(info.name))
            except ModuleNotFoundError as error:  # of an optional package
                assert not str(error.name).startswith("longmix"), info.name
    return found


def callables() -> dict[str, object]:
    """Whatever can be called in any module, imported names and methods' classes included, by the name that finds it."""
    return {
        f"{module.__name__}.{name}": member
        for module in modules()
        for name, member in vars(module).items()
        if callable(member) and not name.startswith("__")
    }


@pytest.fixture(scope="module")
def configurations(composed, tmp_path_factory) -> list[dict]:
    """Training configurations that have, between them, every place where a node may stand."""
    folder = tmp_path_factory.mktemp("configurations")
    mixture = "data.corpora={a:{_target_:longmix.data.corpora.sotu.Sotu}}", "data.weights={a:1.0}"
    choices = (
        ["mixer=routing"],
        ["mixer=sliding_window*2+flash", "data=mqar"],
        ["mixer=mlstm_tfla", "block=rwkv7", "data=mixture", *mixture],
    )
    return [resolved(composed(list(words), "train", folder)) for words in choices]


def places(node: dict, path: tuple = ()) -> list[tuple]:
    """The path of every node and every setting within `node`."""
    found = []
    for name, value in node.items():
        if name == "_target_":
            continue
        found.append((*path, name))
        if isinstance(value, dict):
            found += places(value, (*path, name))
    return found


def with_node(config: dict, path: tuple, node: object) -> dict:
    changed = copy.deepcopy(config)
    parent = changed
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = node
    return changed


def of_data(config: dict) -> Choice:
    return checked_data(Choice.of("data", config["data"]))


def refused(config: dict, part: str) -> bool:
    try:
        of_data(config) if part == "data" else check_model_nodes(config)
    except LongmixError:
        return True
    return False


class TestEveryCallable:
    """Each of several thousand names, among them every function of the package, in each place that takes nodes."""

    KINDS: ClassVar = {"model": LanguageModel, "mixer": Mixer, "data": TrainingData}

    def allowed(self, path: tuple, name: str, member: object) -> bool:
        if not inspect.isclass(member) or member.__module__ != name.rpartition(".")[0]:
            return False
        if path[0] == "mixer":
            return path[-1] != "pattern" and issubclass(member, Mixer)
        if len(path) == 1:
            return issubclass(member, self.KINDS[path[0]])
        if path == ("model", "block"):
            return member in (Standard, RWKVBlocks) or member.__name__ == "BlockStyle"
        if path == ("model", "share"):
            return member is Sharing
        if path[1] in ("corpus", "corpora"):
            return all(hasattr(member, method) for method in ("documents", "fingerprint"))
        return path[1] == "task" and hasattr(member, "example")

    @pytest.mark.slow
    def test_is_refused_wherever_it_is_no_class_of_the_kind(self, configurations):
        named = callables()
        assert len(named) > 2000 and LAUNCH in named and "longmix.files.Path" in named
        wrong, tried, seen = [], 0, set()
        for config in configurations:
            part = {key: config[key] for key in ("model", "mixer", "data")}
            for path in places(part):
                place = (_at(part, path[:-1]).get("_target_"), path[-1])
                if path in (("mixer", "pattern"), ("data", "corpora")) or place in seen:
                    continue
                seen.add(place)
                takes_nodes = path == ("mixer",) or (
                    isinstance(_at(part, path), dict) and "_target_" in _at(part, path)
                )
                node = {"_target_": ""}
                changed = with_node(part, path, node)
                # Where no node may stand the name is not read: each place tries a fourth of them, the next one another.
                tried_here = named.items() if takes_nodes else list(named.items())[len(seen) % 4 :: 4]
                for name, member in tried_here:
                    node["_target_"] = name
                    tried += 1
                    accepted = not refused(changed, path[0])
                    if accepted != (takes_nodes and self.allowed(path, name, member)):
                        wrong.append((path, name, accepted))
        assert wrong == [] and tried > 400_000

    def test_values_of_every_depth_hold_none(self, configurations):
        part = {key: configurations[0][key] for key in ("model", "mixer", "data")}
        node = {"_target_": "longmix.mixers.flash.Flash"}
        for path in places(part):
            for hidden in ([node], {"x": node}, [[{"x": [node]}]]):
                assert refused(with_node(part, path, hidden), path[0]), path


def _at(node: dict, path: tuple):
    for name in path:
        node = node[name]
    return node


class TestNames:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            pytest.param("os.system", r"mixer=os\.system is not part of longmix.*trust=\[os\.system\]", id="function"),
            pytest.param("longmix_evil.A", r"not part of longmix.*trust=\[longmix_evil\.A\]", id="begins alike"),
            pytest.param(3, "mixer=3 is not part", id="number"),
            pytest.param("", "is not part", id="empty"),
            pytest.param("longmix", "is not part|no class", id="package"),
            pytest.param(LAUNCH, "no class that longmix defines there", id="function of longmix"),
            pytest.param("longmix.files.Path", "no class that longmix defines there", id="imported name"),
            pytest.param("longmix.model.build.Mixer", "no class that longmix defines there", id="imported class"),
            pytest.param("longmix.model.backbone.LanguageModel", "a LanguageModel, and no Mixer", id="another kind"),
            pytest.param("longmix.nothing.Here", "no class that longmix defines", id="no module"),
            pytest.param("longmix.mixers.flash.Flash.forward", "no class that longmix defines", id="method"),
            pytest.param("..x", "is not part", id="relative"),
        ],
    )
    def test_refused(self, configurations, name, message):
        with pytest.raises(ConfigError, match=message):
            check_model_nodes(with_node(configurations[0], ("mixer",), {"_target_": name}))

    @pytest.mark.parametrize("node", [None, [], "text", {}, {"x": 1}, {"_target_": {"_target_": "x"}}])
    def test_nodes_that_are_none(self, configurations, node):
        with pytest.raises(LongmixError):
            check_model_nodes(with_node(configurations[0], ("model",), node))

    @pytest.mark.parametrize("config", [None, [], {}, {"model": 1}])
    def test_configurations_that_are_none(self, config):
        with pytest.raises(CheckpointError, match="none that longmix wrote"):
            check_model_nodes(config)

    def test_a_package_is_not_trusted_as_a_whole(self, configurations):
        with pytest.raises(ConfigError, match=r"trust=\[somebody\] names no class.*trust=\[somebody\.module\.Class\]"):
            check_model_nodes(configurations[0], ["somebody"])


class TestData:
    @pytest.mark.parametrize(
        "path", ["s3://bucket/x", "https://host/x", "/a/folder", "C:/x", "a::b", "hf://datasets/x/y"]
    )
    def test_plain_storage_and_paths_pass(self, configurations, path):
        node = {"_target_": "longmix.data.prepared.PreparedData", "path": path}
        if path == "a::b":
            with pytest.raises(ConfigError, match="only holds bytes"):
                of_data(with_node(configurations[0], ("data",), node))
        else:
            assert of_data(with_node(configurations[0], ("data",), node)).settings["path"] == path

    @pytest.mark.parametrize(
        "path", ["reference::x.json", "simplecache::s3://b/x", "ftp://host/x", " git://x", "python://x"]
    )
    @pytest.mark.parametrize(
        "shape", [str, lambda text: [text], lambda text: {"train": [text]}], ids=["text", "list", "dict"]
    )
    def test_protocols_that_interpret_are_refused(self, configurations, path, shape):
        node = {"_target_": "longmix.data.corpora.hub.HubDataset", "name": "parquet", "data_files": shape(path)}
        config = with_node(configurations[0], ("data", "corpus"), node)
        with pytest.raises(ConfigError, match="give them on the command line with data="):
            of_data(config)

    def test_a_checkpoint_makes_no_cache_folder(self, configurations, tmp_path):
        config = with_node(configurations[0], ("data", "cache_dir"), str(tmp_path / "absent"))
        assert "cache_dir" not in of_data(config).settings
        there = with_node(configurations[0], ("data", "cache_dir"), str(tmp_path))
        assert of_data(there).settings["cache_dir"] == str(tmp_path)


@pytest.fixture(scope="module")
def folder(run_training, shared_cache) -> Path:
    """A run as its owner made it."""
    return run_training(f"data.cache_dir={shared_cache}", "seq_len=32")


class TestEntryPoints:
    """The attack through every command that reads a checkpoint or a folder; nothing may run."""

    SETTINGS = (
        ("mixer",),
        ("mixer", "rotary_base"),
        ("model",),
        ("model", "d_model"),
        ("model", "block"),
        ("model", "norm_eps"),
        ("data",),
        ("data", "corpus"),
        ("data", "cache_dir"),
        ("tokenizer",),
    )

    @pytest.fixture
    def hostile(self, folder, tmp_path):
        def make(path: tuple) -> Path:
            state = load_checkpoint(find_checkpoint(folder))
            state["config"] = with_node(state["config"], path, attack(tmp_path / "ran"))
            return CheckpointStore(tmp_path / "hostile").save(state, {})

        return make

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("path", SETTINGS, ids=".".join)
    def test_train_evaluate_and_generate(self, compose_config, hostile, tmp_path, path, tiny_overrides):
        checkpoint = hostile(path)
        commands = {
            "evaluate": lambda: evaluate(
                compose_config(f"checkpoint='{checkpoint}'", "max_tokens=128", entry_point="evaluate")
            ),
            "generate": lambda: generate(
                compose_config(f"checkpoint='{checkpoint}'", "max_tokens=1", entry_point="generate")
            ),
            "train": lambda: train(
                compose_config(
                    *(word for word in tiny_overrides if not word.startswith("model.")),
                    *("seq_len=32", f"checkpoint='{checkpoint}'"),
                    output=tmp_path / "new",
                )
            ),
        }
        used = {"tokenizer": (), "data": ("evaluate",)}.get(path[0], tuple(commands))
        for name, command in commands.items():
            if name in used:
                with pytest.raises(LongmixError, match="checkpoint's"):
                    command()
            else:
                command()  # it does not look at that part
            assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("path", [path for path in SETTINGS if path[0] in ("mixer", "model")], ids=".".join)
    def test_hugging_face_folders(self, folder, tmp_path, path):
        transformers = pytest.importorskip("transformers")
        from longmix.interop.huggingface.export import export
        from longmix.interop.huggingface.load import import_folder
        from longmix.interop.huggingface.model import LongmixConfig

        export(folder, tmp_path / "hf", kind="longmix")
        config = LongmixConfig.from_pretrained(tmp_path / "hf")
        changed = with_node({"model": config.model, "mixer": config.mixer}, path, attack(tmp_path / "ran"))
        config.model, config.mixer = changed["model"], changed["mixer"]
        config.save_pretrained(tmp_path / "hf")
        with pytest.raises(LongmixError):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        with pytest.raises(LongmixError):
            import_folder(tmp_path / "hf", tmp_path / "imported")
        assert not (tmp_path / "ran").exists()


def test_the_attack_would_run(tmp_path):
    """What the tests above refuse does leave its mark where it is allowed."""
    from longmix.config import build

    node = {**attack(tmp_path / "ran"), "folder": None}
    build({name: value for name, value in node.items() if name != "folder"}, "x", folder=tmp_path)
    assert (tmp_path / "ran").exists()


def test_a_node_stands_nowhere_but_where_its_kind_is_taken(tmp_path):
    """The user's own configuration, too: a value is a value."""
    from longmix.config import check

    node = {"_target_": "longmix.model.backbone.LanguageModel", "d_model": attack(tmp_path / "ran"), "num_layers": 1}
    with pytest.raises(ConfigError, match=r"model\.d_model holds a `_target_`, and it must be a whole number"):
        check({**node, "num_heads": 1, "mlp_hidden": 8}, "model", {"mixer_factory", "vocab_size"})
