"""The configuration: every file is usable, every wrong setting is refused by name before any work."""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf
from taken_settings import taken_settings

from longmix.command_line.schema import SCHEMAS
from longmix.config import (
    EvaluateConfig,
    ModelConfig,
    TrainConfig,
    build,
    check,
    check_keys,
    defaults,
    fits,
    locate,
    plain,
    read,
    resolved,
    total_steps,
    unknown_key,
    unlimited_windows,
    words_of,
)
from longmix.data.corpora.corpus import Corpus
from longmix.errors import ConfigError, LongmixError
from longmix.mixers.flash import Flash
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.blocks import Standard, SwiGLU
from longmix.model.build import build_model
from longmix.model.rwkv_blocks import ChannelMix, RWKVBlocks
from longmix.training.run import check_config

CONFIGS = Path(__file__).parents[1] / "configs"

SUPPLIED = {
    "block": set(),
    "cache": set(),
    "data": {"tokenizer", "seq_len", "batch_size", "seed"},
    "logger": set(),
    "mixer": {"shape", "layer_index"},
    "model": {"mixer_factory", "vocab_size"},
    "optimizer": {"parameters"},
    "prefill": set(),
    "schedule": set(),
    "task": set(),
    "shorten": set(),
    "tokenizer": set(),
    "trainer": set(),
}
"""Arguments that longmix gives, per group; a new group of configurations needs its line here."""


ENTRY_POINTS = {"task": "evaluate", "cache": "generate", "prefill": "generate", "shorten": "generate"}
"""The command of each group that `train` does not have."""


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def group_files() -> list[Any]:
    groups = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != "experiment")
    return [pytest.param(group, name, id=f"{group}={name}") for group in groups for name in names(group)]


NEEDS = {
    "tokenizer=prepared": ["data=prepared", "data.path=given"],
    "experiment=state_tuning": ["mixer=kda"],
    "experiment=convert": ["checkpoint=given", "mixer=gla"],
}
"""Choices that take a setting from another group's, or the mixer from a checkpoint."""

GIVEN = {
    "data.corpora": {"speeches": {"_target_": "longmix.data.corpora.sotu.Sotu"}},
    "data.weights": {"speeches": 1.0},
    "tokenizer.vocab_size": 300,
}
"""Values that the user must give and that are not text."""


def filled(config: Any) -> dict[str, Any]:
    """The configuration with something for each value that the user must give."""
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, GIVEN.get(key, "given"))
    return resolved(config)


@pytest.fixture
def settings_of(compose_config):
    """The resolved node of one group's file."""

    def load(group: str, name: str) -> dict[str, Any]:
        entry_point = ENTRY_POINTS.get(group, "train")
        needed = NEEDS.get(f"{group}={name}", [])
        config = filled(compose_config(f"{group}={name}", *needed, entry_point=entry_point))
        if group == "task":
            return config["task"][name]
        return config["model"]["block"] if group == "block" else config[group]

    return load


def check_complete(node: dict[str, Any], supplied: set[str], key: str) -> None:
    """`--cfg job` promises every setting, so a file names all that its class takes."""
    assert set(node) - {"_target_"} == taken_settings(locate(node["_target_"], key)) - supplied, key
    for name, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            check_complete(value, set(), f"{key}.{name}")


class TestEveryFile:
    @pytest.mark.sampled(3)
    @pytest.mark.parametrize(("group", "name"), group_files())
    def test_passes_the_check_and_names_every_setting(self, settings_of, group, name):
        node = settings_of(group, name)
        check(node, group, SUPPLIED[group])
        check_complete(node, SUPPLIED[group], group)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize(("group", "name"), group_files())
    def test_what_the_user_must_give_is_asked_for_by_name(self, compose_config, group, name):
        entry_point = ENTRY_POINTS.get(group, "train")
        config = compose_config(f"{group}={name}", *NEEDS.get(f"{group}={name}", []), entry_point=entry_point)
        missing = {key for key in OmegaConf.missing_keys(config) if key.startswith(group)}
        required = re.findall(r"^\s*\w+: \?\?\?", (CONFIGS / group / f"{name}.yaml").read_text(), re.MULTILINE)
        assert len(missing) == len(required)
        if missing:
            with pytest.raises(ConfigError) as caught:
                resolved(config)
            assert all(key in str(caught.value) for key in missing)

    @pytest.mark.parametrize("name", names("experiment"))
    def test_experiment_passes_every_check(self, compose_config, name):
        words = [f"experiment={name}", *NEEDS.get(f"experiment={name}", []), "trainer.accelerator=cpu"]
        check_config(read(TrainConfig, filled(compose_config(*words))))

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("name", names("mixer"))
    def test_mixer_builds_a_model(self, compose_config, name):
        config = resolved(compose_config(f"mixer={name}"))
        with torch.device("meta"):
            model = build_model(ModelConfig.of(config), vocab_size=257)
        expected = locate(config["mixer"]["_target_"], "mixer")
        assert [type(block.mixer) for block in model.blocks] == [expected] * config["model"]["num_layers"]

    @pytest.mark.parametrize("name", names("model"))
    def test_model_has_the_size_its_comment_states(self, compose_config, request, name):
        comment = (CONFIGS / "model" / f"{name}.yaml").read_text().splitlines()[0]
        vocabulary = re.search(r"(\d+)k vocabulary", comment)
        vocab_size = 257 if "byte vocabulary" in comment else 1000 * int(vocabulary[1]) if vocabulary else 32_000
        with torch.device("meta"):
            model = build_model(ModelConfig.of(resolved(compose_config(f"model={name}"))), vocab_size)
        stated = re.search(r"([\d.]+) (million|billion) parameters", comment)
        if stated:
            expected = float(stated[1]) * {"million": 1e6, "billion": 1e9}[stated[2]]
            assert model.parameter_counts()["total"] == pytest.approx(expected, rel=0.03)

    @pytest.mark.parametrize("name", names("optimizer"))
    def test_optimizer_takes_every_parameter_once(self, compose_config, name):
        config = resolved(compose_config(f"optimizer={name}", "model.num_layers=1", "model.d_model=32"))
        parameters = dict(build_model(ModelConfig.of(config), vocab_size=257).named_parameters())
        optimizers = build(config["optimizer"], "optimizer", parameters=parameters)
        taken = [id(weight) for each in optimizers for group in each.param_groups for weight in group["params"]]
        assert sorted(taken) == sorted(map(id, parameters.values()))

    @pytest.mark.parametrize("steps", [2, 20, 1000])
    @pytest.mark.parametrize("name", names("schedule"))
    def test_schedule_warms_up_and_stays_between_0_and_1(self, settings_of, name, steps):
        node = settings_of("schedule", name)
        schedule = build(node, "schedule")
        factors = [schedule(step, steps) for step in range(steps)]
        assert all(0 < factor <= 1 for factor in factors[:-1])
        assert 0 <= factors[-1] <= 1  # a final factor of 0 may be reached, but not before the last step
        rising = factors[: max(1, int(node["warmup"] * steps))]
        assert rising == sorted(set(rising))
        assert max(factors) > 0.95
        assert factors.index(max(factors)) <= len(rising)

    @pytest.mark.parametrize("name", [name for name in names("trainer") if name != "gpu"])
    def test_trainer_builds_without_a_gpu(self, settings_of, name):
        assert build(settings_of("trainer", name), "trainer").world_size >= 1


class TestDefaults:
    def test_pass_every_check(self, compose_config):
        check_config(read(TrainConfig, compose_config()))

    @pytest.mark.parametrize("entry_point", ["train", "evaluate"])
    def test_are_plain_values_once_resolved(self, compose_config, entry_point):
        given = {"train": [], "evaluate": ["checkpoint=runs/one"]}[entry_point]
        node = resolved(compose_config(*given, entry_point=entry_point))
        check_keys(node, {"train": TrainConfig, "evaluate": EvaluateConfig}[entry_point])
        text = OmegaConf.to_yaml(OmegaConf.create(node))
        assert "${" not in text and "???" not in text

    @pytest.mark.parametrize(
        ("overrides", "part"),
        [
            pytest.param(["mixer=flash", "model=tiny", "seq_len=96"], "_flash_tiny_96", id="mixer, model and length"),
            pytest.param(
                ["mixer=sliding_window*3+flash", "seq_len=64"], "_sliding_window-3-flash_tiny_64", id="pattern"
            ),
        ],
    )
    def test_name_says_what_the_run_is(self, compose_config, overrides, part):
        name = resolved(compose_config(*overrides))["name"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d" + re.escape(part), name)

    @pytest.mark.parametrize(
        ("max_steps", "max_tokens", "expected"),
        [
            pytest.param(7, None, 7, id="steps"),
            pytest.param(None, 64, 1, id="tokens of one step"),
            pytest.param(None, 65, 2, id="a token more takes another step"),
            pytest.param(7, 64 * 5, 5, id="tokens are fewer"),
            pytest.param(3, 64 * 5, 3, id="steps are fewer"),
        ],
    )
    def test_total_steps(self, compose_config, max_steps, max_tokens, expected):
        config = read(TrainConfig, compose_config("seq_len=32", "batch_size=2"))
        assert total_steps(dataclasses.replace(config, max_steps=max_steps, max_tokens=max_tokens)) == expected


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        (
            ["mixer=sliding_window", "mixer.window=4096", "seq_len=64"],
            ["mixer.window=4096 limits nothing at seq_len=64"],
        ),
        (["mixer=sliding_window", "mixer.window=64", "seq_len=64"], ["mixer.window=64 limits nothing at seq_len=64"]),
        (["mixer=sliding_window", "mixer.window=63", "seq_len=64"], []),
        (["mixer=flash", "seq_len=64"], []),
        (
            ["mixer=sliding_window*3+flash", "mixer.sliding_window.window=64", "seq_len=64"],
            ["mixer.sliding_window.window=64 limits nothing at seq_len=64"],
        ),
    ],
)
def test_a_window_as_long_as_the_rows_is_noted(compose_config, overrides, notes):
    assert unlimited_windows(read(TrainConfig, compose_config(*overrides))) == notes


@pytest.mark.parametrize(
    ("word", "value"), [("seq_len", "x"), ("seed", None), ("loop.log_every", [1]), ("name", 3), ("match.tolerance", {})]
)
def test_words_of_a_checkpoint_have_their_types(compose_config, word, value):
    config = resolved(compose_config())
    *parents, leaf = word.split(".")
    place = config
    for part in parents:
        place = place[part]
    place[leaf] = value
    shown = "null" if value is None else repr(value)
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'{word}={shown}')} is not "):
        check_config(read(TrainConfig, config))


# Case: name, overrides, and words the message must contain.
REFUSED = [
    ("true for a choice of three", ["model.activation_checkpointing=true"], ["model.activation_checkpointing=true is"]),
    ("nothing for a stage", ["stages=[null]"], ["stages=[null] is no list of stages"]),
    ("an unknown word added", ["+seqlen=3"], ["unknown key seqlen", "Did you mean seq_len?"]),
    ("an unknown word", ["seqlen=3"], ["seqlen"]),
    ("an unknown key of a group added", ["+mixer.num_head=3"], ["unknown key mixer.num_head", "mean num_heads?"]),
    ("an unknown key of a group", ["mixer.windw=3"], ["mixer.windw"]),
    (
        "an unknown key of the corpus",
        ["data=text", "data.corpus.path=x", "+data.corpus.tset=y"],
        ["corpus.tset", "test"],
    ),
    ("an unknown key of a corpus without any", ["+data.corpus.pth=y"], ["unknown key data.corpus.pth", "none"]),
    ("an unknown key of the loop added", ["+loop.log_evry=3"], ["unknown key loop.log_evry", "mean log_every?"]),
    ("an unknown key of the loop", ["loop.log_evry=3"], ["loop.log_evry"]),
    ("a key far from any other", ["+optimizer.zzz=3"], ["unknown key optimizer.zzz", "Keys there are: learning_rate"]),
    ("an argument that longmix gives", ["+model.vocab_size=3"], ["unknown key model.vocab_size"]),
    ("an unknown mixer", ["mixer=flsh"], ["mixer/flsh", "sliding_window"]),
    ("an unknown experiment", ["experiment=nope"], ["experiment/nope"]),
    ("a word taken away", ["~seq_len"], ["seq_len"]),
    ("a group taken away", ["~mixer"], ["no value", "mixer"]),
    ("the loop taken away", ["~loop"], ["no value", "loop"]),
    ("a required setting taken away", ["~model.num_heads"], ["model.num_heads has no value"]),
    ("no path of the corpus", ["data=text"], ["no value", "data.corpus.path"]),
    ("no path of the tokenizer", ["tokenizer=file"], ["no value", "tokenizer.path"]),
    ("an interpolation of nothing", ["data.cache_dir=${nope}"], ["data.cache_dir", "nope"]),
    ("an interpolation of itself", ["seed=${seed}"], ["seed", "Recursive interpolation"]),
    ("a variable that is not set", ["optimizer.learning_rate=${oc.env:NOPE}"], ["optimizer.learning_rate", "'NOPE'"]),
    ("text for a word", ["seq_len=abc"], ["seq_len", "abc"]),
    ("a fraction for a word", ["batch_size=1.5"], ["batch_size", "1.5"]),
    ("null for a word", ["seed=null"], ["seed"]),
    ("text for a number", ["optimizer.learning_rate=fast"], ["optimizer.learning_rate='fast'", "a number"]),
    ("a fraction for a count", ["model.num_layers=1.5"], ["model.num_layers=1.5", "whole number"]),
    ("a number for a switch", ["mixer.qk_norm=1"], ["mixer.qk_norm=1", "true or false"]),
    ("a switch for a number", ["schedule.warmup=true"], ["schedule.warmup=true", "a number"]),
    ("a number for text", ["logger=wandb", "logger.project=7"], ["logger.project=7", "text"]),
    ("a number for a list", ["optimizer.betas=0.9"], ["optimizer.betas=0.9", "list", "number"]),
    ("text in a list", ["optimizer.betas=[0.9,x]"], ["optimizer.betas", "'x'"]),
    ("a choice there is not", ["trainer.precision=fp16"], ["trainer.precision='fp16'", "bf16-mixed"]),
    ("a strategy there is not", ["trainer.strategy=zero"], ["trainer.strategy='zero'", "fsdp"]),
    ("a shape there is not", ["schedule=wsd", "schedule.shape=round"], ["schedule.shape='round'", "linear, sqrt"]),
    (
        "a checkpointing there is not",
        ["model.activation_checkpointing=all"],
        ["model.activation_checkpointing", "block"],
    ),
    ("a logger's mode there is not", ["logger.mode=of"], ["logger.mode='of'", "auto, online, offline"]),
    ("a nonfinite there is not", ["loop.nonfinite=stp"], ["loop.nonfinite='stp'", "stop, skip"]),
    ("a class there is not", ["tokenizer._target_=longmix.nope.X"], ["tokenizer._target_", "longmix.nope"]),
    ("a module for a class", ["mixer._target_=longmix.mixers.flash"], ["mixer._target_", "module", "class"]),
    ("a number for a class", ["mixer._target_=3"], ["mixer._target_=3"]),
    (
        "a class of another group",
        ["tokenizer=bytes", "data._target_=longmix.training.loggers.NoLog"],
        ["data._target_"],
    ),
    ("no corpus", ["data.corpus=null"], ["data.corpus=null", "Corpus"]),
    ("a number for a corpus", ["data.corpus=3"], ["data.corpus=3", "Corpus"]),
    ("no tokens", ["seq_len=0"], ["seq_len=0", "at least 1"]),
    ("no windows", ["batch_size=0"], ["batch_size=0", "at least 1"]),
    ("no steps", ["max_steps=0"], ["max_steps=0", "at least 1"]),
    ("fewer than no tokens to train", ["max_tokens=-5"], ["max_tokens=-5", "at least 1"]),
    ("no end", ["max_steps=null", "max_tokens=null"], ["max_steps", "max_tokens"]),
    ("a negative seed", ["seed=-1"], ["seed=-1"]),
    ("weights that nothing trains", ["trainable=state"], ["trainable='state'", "all, states"]),
    ("a memory below none", ["tuning.features=-1"], ["tuning.features=-1", "at least 0"]),
    ("a decorrelation below none", ["tuning.decorrelation=-0.5"], ["tuning.decorrelation=-0.5", "at least 0"]),
    ("a seed beyond 32 bits", ["seed=4294967296"], ["seed=4294967296", "4294967295"]),
    ("no name", ["name=''"], ["name"]),
    ("no log", ["loop.log_every=0"], ["loop.log_every=0", "at least 1"]),
    ("no validation every 0 steps", ["loop.validate_every=0"], ["loop.validate_every=0", "at least 1"]),
    ("no checkpoint kept", ["loop.keep_checkpoints=0"], ["loop.keep_checkpoints=0", "at least 1"]),
    ("a clip of 0", ["loop.gradient_clip=0"], ["loop.gradient_clip=0", "above 0"]),
    ("a clip that is no number", ["loop.gradient_clip=nan"], ["loop.gradient_clip=nan", "a number or null"]),
    ("a rate of 0", ["optimizer.learning_rate=0"], ["optimizer.learning_rate=0", "above 0"]),
    ("a rate that is no number", ["optimizer.learning_rate=nan"], ["optimizer.learning_rate=nan", "number"]),
    ("an infinite rate", ["optimizer.learning_rate=inf"], ["optimizer.learning_rate=inf", "number"]),
    ("one moment", ["optimizer=adamw", "optimizer.betas=[0.9]"], ["optimizer.betas=[0.9]", "two"]),
    ("a moment that never forgets", ["optimizer=adamw", "optimizer.betas=[0.9,1.0]"], ["optimizer.betas"]),
    ("a negative warm-up", ["schedule.warmup=-1"], ["schedule.warmup=-1", "negative"]),
    ("a last factor above 1", ["schedule.final=1.5"], ["schedule.final=1.5", "between 0 and 1"]),
    (
        "heads that do not divide",
        ["model.d_model=128", "model.num_heads=3"],
        ["model.num_heads=3", "model.d_model=128", "1, 2, 4"],
    ),
    (
        "a mixer's heads that do not divide",
        ["model.d_model=128", "mixer.num_heads=3"],
        ["mixer.num_heads=3", "model.d_model=128"],
    ),
    (
        "key-value heads that do not divide",
        ["model.num_heads=2", "mixer.num_kv_heads=3"],
        ["mixer.num_kv_heads=3", "model.num_heads=2"],
    ),
    ("an odd head size", ["model.d_model=128", "model.num_heads=128"], ["even head size", "model.num_heads=128"]),
    ("no heads", ["model.num_heads=0"], ["model.num_heads=0", "at least 1"]),
    ("no layers", ["model.num_layers=0"], ["model.num_layers=0", "at least 1"]),
    ("no window", ["mixer=sliding_window", "mixer.window=0"], ["mixer.window=0", "at least 1"]),
    ("a base of 1", ["mixer.rotary_base=1.0"], ["mixer.rotary_base=1.0", "above 1"]),
    (
        "a micro-batch that does not divide",
        ["batch_size=3", "trainer.micro_batch_size=2"],
        ["trainer.micro_batch_size=2", "batch_size=3"],
    ),
    (
        "a batch that does not divide over processes",
        ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "batch_size=3"],
        ["batch_size=3", "2 processes"],
    ),
    (
        "rows that do not divide into slices",
        ["trainer=context_parallel", "trainer.accelerator=cpu", "trainer.devices=4", "seq_len=66", "batch_size=3"],
        ["seq_len=66", "4 processes", "seq_len=68"],
    ),
    (
        "two devices of a single process",
        ["trainer=cpu", "trainer.devices=2"],
        ["trainer.strategy=single", "trainer=ddp"],
    ),
    (
        "fewer keys than none",
        ["mixer=mlstm_tfla", "mixer.key_factor=-1"],
        ["mixer.key_factor=-1 must be positive and at most 64."],
    ),
    ("less than a value", ["mixer=gated_deltanet", "mixer.value_factor=1e-9"], ["mixer.value_factor=1e-09", "channel"]),
    ("no clusters", ["mixer=routing", "mixer.clusters=0"], ["mixer.clusters=0 must be at least 2"]),
    ("no block", ["mixer=block_sparse", "mixer.block=0"], ["mixer.block=0 must be at least 1"]),
    ("a block below none", ["mixer=block_sparse", "mixer.block=-1"], ["mixer.block=-1 must be at least 1"]),
    (
        "a radius that overflows",
        ["mixer=scatterbrain", "mixer.radius=1e9"],
        ["mixer.radius=1000000000.0 is out of range; it must be from"],
    ),
    ("a seed beyond 64 bits", ["mixer=hyper", f"mixer.hash_seed={10**30}"], ["mixer.hash_seed=1000", "whole number"]),
    ("a law too steep", ["data=mqar", "data.task.power=1e9"], ["data.task.power=1000000000.0", "at most"]),
    ("a vocabulary too large", ["data=mqar", "data.task.vocabulary=1000000000"], ["data.task.vocabulary", "at most"]),
    ("a decay below none", ["optimizer.weight_decay=-1"], ["optimizer.weight_decay=-1 must be at least 0"]),
    ("a path too long", ["data=text", f"data.corpus.path={'x' * 5000}"], ["data.corpus.path=xxx", "longer than"]),
    ("yes for auto", ["resume=yes"], ["resume=yes", "Did you mean auto?"]),
    ("no threads", ["trainer.num_threads=0"], ["trainer.num_threads=0", "at least 1"]),
    ("a pattern with an unknown name", ["mixer=flash+nope"], ["mixer/nope"]),
    ("a wrong value in a pattern", ["mixer=flash+sliding_window", "+mixer.flash.x=1"], ["unknown key mixer.flash.x"]),
    ("a pattern of an unknown member", ["mixer=flash*2", "mixer.pattern=[nope]"], ["mixer.pattern", "nope"]),
    ("an unknown key of a pattern", ["mixer=flash+sliding_window", "+mixer.windw=3"], ["mixer.windw"]),
    ("an empty pattern", ["mixer=flash*2", "mixer.pattern=[]"], ["mixer.pattern=[]"]),
    ("a pattern that is no list", ["mixer=flash*2", "mixer.pattern=3"], ["mixer.pattern=3"]),
    (
        "a member's value",
        ["mixer=flash+sliding_window", "mixer.sliding_window.window=0"],
        ["mixer.sliding_window.window"],
    ),
    ("a negative epsilon of norms", ["model.norm_eps=-1"], ["model.norm_eps=-1"]),
    ("moments beside Muon", ["optimizer=muon", "optimizer.betas=[2,3]"], ["optimizer.betas"]),
    (
        "a rate beside Muon",
        ["optimizer=muon", "optimizer.adamw_learning_rate=-1"],
        ["optimizer.adamw_learning_rate=-1"],
    ),
    ("a momentum above 1", ["optimizer=muon", "optimizer.momentum=1.5"], ["optimizer.momentum=1.5"]),
    ("fewer than no workers", ["data.num_workers=-1"], ["data.num_workers"]),
    ("no validation tokens", ["data.validation_tokens=0"], ["data.validation_tokens"]),
    (
        "a share above 1",
        ["data=text", f"data.corpus.path={CONFIGS}/train.yaml", "data.corpus.test_fraction=2"],
        ["data.corpus.test_fraction"],
    ),
    ("a vocabulary below the bytes", ["tokenizer=bpe", "tokenizer.vocab_size=10"], ["tokenizer.vocab_size"]),
    ("a tokenizer file there is not", ["tokenizer=file", "tokenizer.path=/nope"], ["tokenizer.path"]),
]


# Like REFUSED, but so far let through by `check_config`, or refused without the key; what is mended moves up there.
class TestRefusals:
    @pytest.mark.sampled(4)
    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            *(pytest.param(overrides, words, id=name) for name, overrides, words in REFUSED),
        ],
    )
    def test_names_the_key(self, compose_config, overrides, words):
        with pytest.raises((LongmixError, CompactHydraException)) as caught:
            check_config(read(TrainConfig, compose_config(*overrides)))
        error = caught.value
        # Hydra prints the message of its compact errors and that of their cause, and nothing else.
        message = str(error) if isinstance(error, LongmixError) else f"{error}\n{error.__cause__}"
        assert [word for word in words if word not in message] == [], message
        assert isinstance(error, CompactHydraException) or "\n" not in message

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_gpu_that_is_not_there(self, compose_config):
        with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu.*trainer=cpu"):
            check_config(read(TrainConfig, compose_config("trainer=gpu")))

    @pytest.mark.parametrize(
        "overrides",
        [
            pytest.param(["optimizer.learning_rate=1"], id="a whole number for a fraction"),
            pytest.param(["optimizer=adamw", "optimizer.betas=[0,0.95]"], id="a whole number in a list"),
            pytest.param(["loop.gradient_clip=null", "loop.validate_every=null"], id="null where it means never"),
            pytest.param(["mixer=sliding_window", "mixer.window=${seq_len}"], id="interpolation"),
            pytest.param(["data=text", f"data.corpus.path=[{CONFIGS}/train.yaml]"], id="list or text"),
            pytest.param(["max_steps=3", "max_tokens=null"], id="steps alone"),
            pytest.param(["seed=4294967295"], id="largest seed"),
            pytest.param(["batch_size=4", "trainer.micro_batch_size=2"], id="micro-batch that divides"),
        ],
    )
    def test_lets_through(self, compose_config, overrides):
        check_config(read(TrainConfig, compose_config(*overrides)))

    def test_allocates_no_weights(self, compose_config):
        check_config(read(TrainConfig, compose_config("model=7b")))  # 27 GB of weights


class TestMixerPattern:
    @pytest.mark.parametrize(
        ("mixer", "layers"),
        [
            pytest.param("flash", "ffffff", id="plain"),
            pytest.param("flash*1", "ffffff", id="one"),
            pytest.param("sliding_window*3+flash", "sssfss", id="repeats and is cut"),
            pytest.param("flash+sliding_window", "fsfsfs", id="alternates"),
            pytest.param("flash+sliding_window*2+flash*2+sliding_window", "fssffs", id="as long as the model"),
            pytest.param("sliding_window*10+flash", "ssssss", id="longer than the model"),
        ],
    )
    def test_layers(self, compose_config, mixer, layers):
        config = resolved(compose_config(f"mixer={mixer}", "model.num_layers=6"))
        check_config(read(TrainConfig, config))
        with torch.device("meta"):
            model = build_model(ModelConfig.of(config), vocab_size=257)
        kinds = {Flash: "f", SlidingWindow: "s"}
        assert "".join(kinds[type(block.mixer)] for block in model.blocks) == layers

    def test_member_settings_are_reachable(self, compose_config):
        model = ["model.num_layers=4", "model.num_heads=2"]
        mixer = ["mixer=sliding_window+flash", "mixer.sliding_window.window=48", "mixer.flash.num_kv_heads=1"]
        with torch.device("meta"):
            model = build_model(ModelConfig.of(resolved(compose_config(*model, *mixer))), vocab_size=257)
        assert [block.mixer.window for block in model.blocks[::2]] == [48] * 2
        assert [block.mixer.num_kv_heads for block in model.blocks] == [2, 1] * 2

    def test_members_have_the_settings_of_their_files(self, compose_config):
        node = resolved(compose_config("mixer=sliding_window*2+flash"))["mixer"]
        assert node.pop("pattern") == ["sliding_window", "sliding_window", "flash"]
        assert node == {
            name: OmegaConf.to_container(OmegaConf.load(CONFIGS / "mixer" / f"{name}.yaml"))
            for name in ("sliding_window", "flash")
        }

    def test_plain_name_is_the_file(self, compose_config):
        file = OmegaConf.to_container(OmegaConf.load(CONFIGS / "mixer" / "flash.yaml"))
        assert resolved(compose_config("mixer=flash"))["mixer"] == file

    @pytest.mark.parametrize(
        "mixer",
        ["flash++flash", "flash*0", "flash*", "*2", "flash*2*3", "flash*x", "+flash", "flash+", "flash/x+flash"],
    )
    def test_malformed_is_refused_with_the_choices(self, compose_config, mixer):
        with pytest.raises(
            CompactHydraException, match=r"Could not find 'mixer/(.|\n)*\tflash\n(.|\n)*\tsliding_window\n"
        ):
            compose_config(f"mixer={mixer}")

    @pytest.mark.parametrize(
        ("words", "block", "norm_eps"),
        [
            (["mixer=flash"], Standard, 1e-6),
            (["mixer=rwkv7"], RWKVBlocks, 1e-5),
            (["mixer=rwkv7", "model=125m", "block=standard"], Standard, 1e-6),
            (["mixer=rwkv7*2+flash"], RWKVBlocks, 1e-5),
            (["mixer=flash", "block=rwkv7", "model.norm_eps=1e-4"], RWKVBlocks, 1e-4),
        ],
        ids=["usual", "brought", "refused", "brought-by-a-member", "chosen"],
    )
    def test_a_mixer_may_bring_its_block(self, compose_config, words, block, norm_eps):
        config = resolved(compose_config(*words))
        assert config["model"]["block"]["_target_"].endswith(block.__name__)
        assert config["model"]["norm_eps"] == norm_eps
        with torch.device("meta"):
            model = build_model(ModelConfig.of(config), vocab_size=257)
        standard = block is Standard
        assert type(model.blocks[0].mlp) is (SwiGLU if standard else ChannelMix)
        assert type(model.embedding_norm) is (torch.nn.Identity if standard else torch.nn.LayerNorm)

    @pytest.mark.parametrize("group", ["model", "optimizer"])
    def test_only_mixers_have_patterns(self, compose_config, group):
        with pytest.raises(CompactHydraException, match=f"Could not find '{group}/"):
            compose_config(f"{group}=tiny*2+adamw")


class Holder:
    """A class with a setting of its own and a corpus."""

    def __init__(self, corpus: Corpus, given: int, count: int = 1, *, kind: Literal["a", "b"] = "a") -> None:
        self.settings = (corpus, given, count, kind)


class Part:
    """Something to be held."""

    def __init__(self, size: int = 1) -> None:
        self.size = size


class Open:
    """A class that passes what it does not name on."""

    def __init__(self, width: int, **others: Any) -> None:
        self.settings = (width, others)


HOLDER, PART, OPEN = (f"{__name__}.{kind.__name__}" for kind in (Holder, Part, Open))


class TestBuild:
    def test_builds_nested_nodes_first(self):
        held = build({"_target_": HOLDER, "corpus": {"_target_": PART, "size": 3}, "kind": "b"}, "key", given=7)
        corpus, *others = held.settings
        assert (corpus.size, others) == (3, [7, 1, "b"])

    def test_passes_supplied_arguments_a_class_does_not_name(self):
        assert build({"_target_": OPEN, "width": 3}, "key", shape=4).settings == (3, {"shape": 4})

    @pytest.mark.parametrize(
        ("node", "message"),
        [
            pytest.param(None, r"key=None is not a choice", id="nothing"),
            pytest.param({"count": 3}, r"is not a choice.*_target_", id="no class"),
            pytest.param({"_target_": HOLDER}, r"key\.corpus has no value", id="required setting"),
            pytest.param(
                {"_target_": HOLDER, "corpus": {"_target_": PART}, "given": 3}, r"unknown key key\.given", id="supplied"
            ),
            pytest.param(
                {"_target_": HOLDER, "corpus": {"_target_": PART, "sise": 3}},
                r"unknown key key\.corpus\.sise\. Did you mean size\?",
                id="typo in a nested node",
            ),
            pytest.param(
                {"_target_": HOLDER, "corpus": {"_target_": PART, "size": "x"}},
                r"key\.corpus\.size='x'",
                id="nested type",
            ),
            pytest.param({"_target_": HOLDER, "corpus": {"_target_": PART}, "kind": "c"}, r"one of a, b", id="choice"),
            pytest.param(
                {"_target_": PART}, r"cannot stand for key: it takes no argument given", id="another kind of class"
            ),
            pytest.param({"_target_": OPEN, "width": 1, "hight": 3}, r"unknown key key\.hight", id="open class"),
            pytest.param({"_target_": "Holder"}, r"key\._target_=Holder cannot be imported", id="no module"),
            pytest.param({"_target_": f"{__name__}.HOLDER"}, r"is a str; name a class", id="not callable"),
        ],
    )
    def test_refuses(self, node, message):
        with pytest.raises(ConfigError, match=message):
            build(node, "key", given=7)

    def test_hint_only_for_a_near_name(self):
        assert "Did you mean window?" in unknown_key("mixer.windw", "windw", ["window", "num_heads"])
        assert "Did you mean" not in unknown_key("mixer.zzz", "zzz", ["window", "num_heads"])


class TestFits:
    @pytest.mark.parametrize(
        ("hint", "good", "bad"),
        [
            pytest.param(int, [0, -3, 2**63 - 1], [2**63, 10**400, True, 1.0, "1", None, [1]], id="int"),
            pytest.param(
                float, [0, -3, 0.5, 1e300], [10**400, True, "1.0", None, float("nan"), float("inf")], id="float"
            ),
            pytest.param(bool, [True, False], [0, 1, "true", None], id="bool"),
            pytest.param(str, ["", "x"], [1, None, ["x"]], id="str"),
            pytest.param(Any, [1, None, [], {}], [], id="anything"),
            pytest.param(None, [None], [0, "", False], id="null"),
            pytest.param(Literal["a", 1], ["a", 1], ["b", True, 1.0, None, []], id="literal"),
            pytest.param(int | None, [3, None], [1.5, "x", False], id="optional"),
            pytest.param(typing.Optional[int], [3, None], [1.5, "x"], id="typing.Optional"),  # noqa: UP045
            pytest.param(Literal["a"] | None, ["a", None], ["b", 0], id="optional literal"),
            pytest.param(str | Sequence[str], ["x", ["x", "y"], []], [1, [1], ["x", None]], id="text or list"),
            pytest.param(list[int], [[], [1, 2]], [1, "12", [1.5], [True], {}, None], id="list"),
            pytest.param(list, [[], [1, "x"]], ["x", {}], id="bare list"),
            pytest.param(Sequence[float], [[0.9, 1], []], [0.9, "x", [None]], id="sequence"),
            pytest.param(list[list[int]], [[[1], []]], [[1], [["x"]]], id="list of lists"),
            pytest.param(list[int | None], [[1, None]], [["x"]], id="list of optionals"),
            pytest.param(tuple[int, str], [[1, "x"]], [[1], [1, 2], [1, "x", 3], 1], id="pair"),
            pytest.param(tuple[int, ...], [[], [1], [1, 2, 3]], [["x"], 1], id="tuple of any length"),
            pytest.param(dict[str, int], [{}, {"x": 1}], [[], 1], id="dict"),
            pytest.param(Mapping[str, int], [{}, {"x": 1}], [[], 1], id="mapping"),
            pytest.param(Corpus, [], [None, 1, "x", {}], id="protocol"),
            pytest.param(Path, [], ["x", 1], id="class"),
        ],
    )
    def test_table(self, hint, good, bad):
        assert [value for value in good if not fits(value, hint)] == []
        assert [value for value in bad if fits(value, hint)] == []


class TestWords:
    @pytest.mark.parametrize("command", SCHEMAS)
    def test_stand_in_one_place(self, command):
        """A word's default stands on its field; the command's file says only what a field cannot."""
        said = set(OmegaConf.load(CONFIGS / f"{command}.yaml")) - {"defaults", "hydra"}
        fields = defaults(SCHEMAS[command])
        assert not said & set(fields)
        assert said <= set(words_of(SCHEMAS[command]))

    def test_ranges_hold_in_every_configuration_that_is_made(self, compose_config):
        given = resolved(compose_config())
        assert plain(read(TrainConfig, given)) == given
        for wrong in ({"seed": -1}, {"loop": given["loop"] | {"nonfinite": "stp"}}, {"tuning": {"features": -1}}):
            with pytest.raises(ConfigError, match=next(iter(wrong))):
                read(TrainConfig, given | wrong)
