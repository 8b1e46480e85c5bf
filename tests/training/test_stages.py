"""Runs with stages: they resume bit for bit inside and at the border of stages, and later stages may change."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import checkpoint, rows
from test_reliability import assert_same

from longmix import machine_memory
from longmix.checkpoints import load_checkpoint, read_info
from longmix.config import TrainConfig, course_of, read
from longmix.errors import CheckpointError, ConfigError
from longmix.reading import read_json
from longmix.restore import restore
from longmix.training.schedules import schedule_of
from longmix.training.stages import check_words_have_effect

STAGES = (
    "stages=[{seq_len:16,max_steps:3,mixer:{sliding_window:{window:4}}},"
    "{seq_len:48,batch_size:1,max_tokens:96,learning_rate_scale:0.5,mixer:{flash:{rotary_base:5e5}}},"
    "{seq_len:24,max_steps:3,batch_size:4,micro_batch_size:2,schedule:{warmup:2}}]"
)
"""Borders after steps 3 and 5; 8 steps in all."""

WORDS = (
    "max_steps=null",
    "loop.log_every=1",
    "loop.checkpoint_every=1",
    "loop.keep_checkpoints=9",
    "loop.validate_every=2",
    "mixer=sliding_window*1+flash",
    "mixer.sliding_window.window=20",
    "model.num_layers=2",
)


@pytest.fixture(scope="module")
def train(run_training, shared_cache) -> Callable[..., Path]:
    return lambda *words: run_training(*WORDS, f"data.cache_dir={shared_cache}", *words)


@pytest.fixture(scope="module")
def straight(train) -> Path:
    return train(STAGES)


def assert_same_end(ours: Path, theirs: Path, step: int = 8) -> None:
    one, other = (load_checkpoint(checkpoint(run, step)) for run in (ours, theirs))
    for part in ("step", "model", "optimizers", "random", "data_fingerprint"):
        assert_same(one[part], other[part], part)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [2, 3, 4, 5, 6])
def test_a_run_goes_on_from_any_step_bit_for_bit(step, workers, straight, train):
    if workers and step not in (3, 4):
        pytest.skip("batches are the same, whoever reads them: a border and the step behind it suffice")
    ours = train(STAGES, f"resume={checkpoint(straight, step)}", f"data.num_workers={workers}")
    assert_same_end(ours, straight)
    for column in ("train/loss", "train/learning_rate", "train/tokens", "train/stage", "validation/loss"):
        theirs = {at: value for at, value in rows(straight, column).items() if at > step}
        assert {at: value for at, value in rows(ours, column).items() if at > step} == theirs
    assert read_json(ours / "summary.json")["stages"] == read_json(straight / "summary.json")["stages"]


def test_log_and_summary_tell_stages_apart(straight):
    assert list(rows(straight, "train/stage").values()) == list("11122333")
    assert [int(value) for value in rows(straight, "train/tokens").values()] == [
        *(32, 64, 96),
        *(144, 192),
        *(288, 384, 480),
    ]
    assert rows(straight, "validation/loss").keys() == {2, 3, 4, 5, 6, 8}
    assert rows(straight, "validation_final/loss").keys() == {3, 5, 8}
    summary = read_json(straight / "summary.json")
    assert (summary["steps"], summary["tokens"], summary["seq_len"]) == (8, 480, 24)
    assert [stage["seq_len"] for stage in summary["stages"]] == [16, 48, 24]
    assert [stage["validation"]["step"] for stage in summary["stages"]] == [3, 5, 8]
    assert summary["stages"][-1]["validation"]["loss"] == summary["validation"]["loss"]
    assert summary["stages"][0]["validation"] != summary["stages"][0]["validation_final"]


def test_a_checkpoint_is_of_the_stage_it_was_saved_in(straight):
    for step, seq_len in ((3, 16), (4, 48), (5, 48), (8, 24)):
        assert restore(checkpoint(straight, step)).config.seq_len == seq_len
        assert read_info(checkpoint(straight, step))["tokens"] == int(rows(straight, "train/tokens")[step])


def test_a_stage_has_settings_of_the_mixer_of_its_own(straight, train):
    windows = {3: 4, 4: 20, 8: 20}
    for step, window in windows.items():
        model = restore(checkpoint(straight, step)).model
        assert model.blocks[0].mixer.window == window
        assert model.blocks[1].mixer.rotary.base == (5e5 if step == 4 else 1e4)
    plain = train(STAGES.replace(",mixer:{sliding_window:{window:4}}", ""))
    assert rows(plain, "train/loss")[1] != rows(straight, "train/loss")[1]


def test_the_first_stage_trains_like_a_run_without_stages(straight, train):
    plain = train("seq_len=16", "max_steps=3", "schedule.warmup=0.4")
    staged = train("stages=[{seq_len:16,max_steps:3,schedule:{warmup:0.4}},{seq_len:32,max_steps:1,schedule:{}}]")
    assert_same(load_checkpoint(checkpoint(plain, 3))["model"], load_checkpoint(checkpoint(staged, 3))["model"])
    longer = train(
        "stages=[{seq_len:16,max_steps:3,schedule:{warmup:0.4}},{seq_len:32,max_steps:1,schedule:{}}]",
        "schedule.warmup=0.4",
        f"resume={checkpoint(plain, 3)}",
    )
    kept = load_checkpoint(checkpoint(longer, 4))["data_fingerprint"]["stages"]
    assert kept[0] == load_checkpoint(checkpoint(plain, 3))["data_fingerprint"]


FIRST = "{seq_len:16,max_steps:3,mixer:{sliding_window:{window:4}}}"
FLASH = "mixer:{flash:{rotary_base:5e5}}"
CHANGED = {
    "a later stage": (3, f"{FIRST},{{seq_len:32,max_steps:1}}"),
    "fewer stages": (3, FIRST.replace("steps:3", "steps:4")),
    "a longer stage": (4, f"{FIRST},{{seq_len:48,batch_size:1,max_steps:4,{FLASH}}}"),
    "a stage behind": (4, f"{STAGES[8:-1]},{{seq_len:64,max_steps:1}}"),
}


@pytest.mark.parametrize(("step", "stages"), CHANGED.values(), ids=CHANGED.keys())
def test_stages_that_have_not_begun_may_change(step, stages, straight, train):
    ours = train(f"stages=[{stages}]", f"resume={checkpoint(straight, step)}")
    assert rows(ours, "train/loss")


FIXED = {
    "length": (4, "{seq_len:16,max_steps:3},{seq_len:32,batch_size:1,max_steps:9}", "stages[1].seq_len was 48"),
    "batch": (4, "{seq_len:16,max_steps:3},{seq_len:48,max_steps:9}", "stages[1].batch_size was 1 and is 2"),
    "an earlier stage": (
        4,
        "{seq_len:8,max_steps:3},{seq_len:48,batch_size:1,max_steps:9}",
        "stages[0].seq_len was 16",
    ),
    "steps": (4, "{seq_len:16,max_steps:4},{seq_len:48,batch_size:1,max_steps:9}", "stages[0] was 3 steps and is 4"),
    "too few steps": (2, "{seq_len:16,max_steps:1},{seq_len:48}", "stages[0] was 3 steps and is 1 steps"),
    "a lacking stage": (4, "{seq_len:16,max_steps:30}", "stages[1] was a stage of 2 steps and is absent"),
}


@pytest.mark.parametrize(("step", "stages", "message"), FIXED.values(), ids=FIXED.keys())
def test_stages_that_have_begun_may_not_change(step, stages, message, straight, train):
    with pytest.raises(CheckpointError) as refused:
        train(f"stages=[{stages}]", f"resume={checkpoint(straight, step)}")
    assert message in str(refused.value)


REFUSED = {
    "a setting of the weights": (
        "{},{mixer:{flash:{qk_norm:false}}}",
        "stages[1]: mixer.flash.qk_norm comes from the whole run; leave one of the two out. May change after",
    ),
    "no member": ("{},{mixer:{window:3}}", "stages[1]: unknown key mixer.window"),
    "a setting's range": ("{mixer:{sliding_window:{window:0}}}", "stages[0]: mixer.sliding_window.window=0"),
    "a misspelt word": ("{seq_le:8}", "unknown key stages[0].seq_le. Did you mean seq_len?"),
    "no stage": ("", "stages=[] names no stage"),
    "a range": ("{},{batch_size:0}", "stages[1].batch_size=0 must be at least 1"),
    "more than there are numbers": (
        "{max_tokens:1e400}",
        "stages[0].max_tokens=inf is too large; whole numbers go up to",
    ),
    "a type": ("{seq_len:x}", "stages[0].seq_len='x' is not a whole number"),
    "no text": ("7", "is no list of stages; write it like"),
    "room, before the first step": (
        "{},{seq_len:101e5,batch_size:1,max_steps:1}",
        "stages[1]: seq_len=10100000 is longer than the train split",
    ),
    "a schedule's word": ("{},{schedule:{warmpu:1}}", "unknown key stages[1].schedule.warmpu. Did you mean warmup?"),
    "a schedule's range": ("{},{schedule:{final:3}}", "stages[1]: schedule.final=3"),
    "a word of the data": (
        "{},{data:{validation_token:5}}",
        "unknown key stages[1].data.validation_token. Did you mean",
    ),
    "data of the run": ("{data:{num_workers:2}}", "stages[0].data.num_workers: it is the same in all stages"),
    "a micro-batch": ("{},{micro_batch_size:3}", "stages[1]: trainer.micro_batch_size=3 does not divide the 2 windows"),
    "another kind of data": (
        "{},{data:{_target_:longmix.data.synthetic.base.SyntheticData,"
        "task:{_target_:longmix.data.synthetic.tasks.Copying}}}",
        "stages[1].data",
    ),
}


@pytest.mark.parametrize(("stages", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_impossible_stages_are_refused_before_any_step(stages, message, train, monkeypatch):
    monkeypatch.setattr(machine_memory, "free_bytes", lambda: 2**50)  # memory is asked before data
    with pytest.raises(ConfigError) as refused:
        train(f"stages=[{stages}]")
    assert message in str(refused.value)


def course(compose_config, *words: str):
    config = read(TrainConfig, compose_config(*words))
    config.check_together()
    return course_of(config)


def test_what_a_stage_does_not_say_is_as_in_the_whole_run(compose_config):
    found = course(
        compose_config,
        "seq_len=32",
        "batch_size=4",
        "max_steps=5",
        "max_tokens=null",
        "data.validation_tokens=99",
        "stages=[{},{seq_len:64},{max_tokens:1e3},{data:{corpus:{validation_fraction:0.2}}}]",
    )
    assert [(part.start, part.steps) for part in found.parts] == [(0, 5), (5, 5), (10, 8), (18, 5)]
    assert [part.tokens_per_step for part in found.parts] == [128, 256, 128, 128]
    assert [part.config.data.settings["validation_tokens"] for part in found.parts] == [99] * 4
    assert found.parts[3].config.data.entries["corpus"] == found.parts[0].config.data.entries["corpus"] | {
        "validation_fraction": 0.2
    }
    assert len({part.data_seed for part in found.parts}) == 4
    assert found.total_tokens == found.tokens(23) == 640 + 1280 + 1024 + 640
    assert [step for step in range(30) if found.ends_stage(step)] == [5, 10, 18, 23]


def test_one_schedule_spans_the_run_unless_a_stage_begins_one(compose_config):
    def cosine(step: int, steps: int, warmup: int) -> float:
        progress = max(0, step - warmup) / (steps - 1 - warmup)
        return min(1, (step + 1) / max(1, warmup)) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

    words = ("schedule.warmup=4", "max_steps=10", "max_tokens=null")
    whole = schedule_of(course(compose_config, *words, "stages=[{},{learning_rate_scale:0.5}]"))
    assert [whole(step, 20) for step in range(20)] == pytest.approx(
        [cosine(step, 20, 4) * (0.5 if step >= 10 else 1) for step in range(20)]
    )
    pieces = schedule_of(course(compose_config, *words, "stages=[{},{},{schedule:{warmup:2}},{max_steps:5}]"))
    assert [pieces(step, 35) for step in range(35)] == pytest.approx(
        [cosine(step, 20, 4) for step in range(20)] + [cosine(step, 15, 2) for step in range(15)]
    )


def test_a_word_that_every_stage_replaces_is_refused(train):
    with pytest.raises(ConfigError, match="seq_len has no effect: every stage of stages has its own"):
        train("stages=[{seq_len:8},{seq_len:16}]", "seq_len=32")


@pytest.mark.parametrize(
    ("word", "own"),
    [
        ("objective=layers", "objective:tokens"),
        ("trainer.micro_batch_size=2", "micro_batch_size:1"),
        ("schedule.warmup=2", "schedule:{warmup:1}"),
    ],
)
def test_a_word_has_an_effect_if_one_stage_leaves_it(compose_config, word, own):
    name = word.partition("=")[0]
    some, all_ = (f"stages=[{{{own},max_steps:1}},{{{other}max_steps:1}}]" for other in ("", f"{own},"))
    check_words_have_effect(read(TrainConfig, compose_config(some, word)), [some, word])
    with pytest.raises(ConfigError, match=f"{name} has no effect: every stage"):
        check_words_have_effect(read(TrainConfig, compose_config(all_, word)), [all_, word])


@pytest.mark.parametrize(
    ("word", "switch"),
    [
        ("loop.spike_window=64", "loop.spike_sigma=6"),
        ("loop.spike_action=stop", "loop.spike_sigma=null"),
        ("loop.tasks_every=2", "loop.tasks=[needle]"),
    ],
)
def test_a_word_that_does_nothing_alone_is_refused(compose_config, word, switch):
    config = read(TrainConfig, compose_config(word, switch))
    check_words_have_effect(config, [word, switch])  # as in a sweep over the switch
    name, without = word.partition("=")[0], switch.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{word} has no effect without {without}. Add it, or leave {name} out"):
        check_words_have_effect(read(TrainConfig, compose_config(word)), [word])
