"""The words of the commands, and the loop's settings: by these Hydra refuses unknown keys and wrong types."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class LoopConfig:
    """Settings of the training loop that are the same on every machine.

    Attributes:
        gradient_clip: largest allowed norm of the whole gradient; null never clips.
        log_every: steps between log rows.
        validate_every: steps between validations; null validates at the end only.
        checkpoint_every: steps between checkpoints; null saves at the end only.
        keep_checkpoints: how many checkpoints stay beside the best one.
        sharded_checkpoints: each process writes what it has; false: the first all of it to one file; null: with fsdp.
        async_checkpoints: write while training goes on, which waits for a copy in CPU memory only.
        nonfinite: what a non-finite loss or gradient does: "stop" the run, or "skip" that step and count it.
        max_skips: the run stops all the same when so many steps in a row were skipped.
    """

    gradient_clip: float | None = 1.0
    log_every: int = 10
    validate_every: int | None = 100
    checkpoint_every: int | None = 100
    keep_checkpoints: int = 2
    sharded_checkpoints: bool | None = None
    async_checkpoints: bool = False
    nonfinite: str = "stop"
    max_skips: int = 20


LOOP_COUNTS = ("log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "max_skips")
"""Settings of the loop that are at least 1, where they are not null."""


@dataclass
class TuningConfig:
    """What `trainable=states` trains besides the states; see `longmix.mixers.parts.state_tuning`.

    Attributes:
        features: size of a memory that each head reads through kernel features; 0 for none.
        decorrelation: how fast these features are made uncorrelated; 0 leaves them.
    """

    features: int = 0
    decorrelation: float = 0.0


@dataclass
class MatchConfig:
    """Models of equal size whatever the mixer; see `longmix.model.matching`.

    Attributes:
        parameters: of the whole model; `model.mlp_hidden` is chosen to come nearest. null leaves it.
        tolerance: largest relative difference that is accepted.
        multiple: `model.mlp_hidden` is a multiple of it.
    """

    parameters: int | None = None
    tolerance: float = 0.02
    multiple: int = 8


@dataclass
class TrainConfig:
    """The words of the command line.

    Attributes:
        mixer: what mixes the sequence; a pattern such as sliding_window*3+flash repeats over the layers.
        model: the model's size.
        data: what is trained on.
        tokenizer: how text becomes tokens.
        optimizer: how weights follow their gradients.
        schedule: the course of the learning rate.
        trainer: which devices, and how they share the work.
        logger: where metrics go.
        seq_len: tokens in a training window.
        batch_size: windows per optimizer step, over all devices.
        max_steps: optimizer steps to train.
        max_tokens: tokens to train; with max_steps on the command line that counts, with both there the smaller.
        seed: of weights, data order and everything else that is drawn.
        name: the run's name; its folder is `runs/<name>`.
        resume: auto continues `runs/<name>`, or without a name the newest run of this configuration; or the folder of a
            run or checkpoint.
        checkpoint: folder of a run or checkpoint whose weights a new run begins from; model, mixer and tokenizer are
            its own.
        trust: full names of classes besides longmix's own that checkpoint may name.
        trainable: all, or states: train the states before documents and nothing else.
        tuning: see `TuningConfig`.
        match: see `MatchConfig`.
        loop: see `LoopConfig`.
    """

    mixer: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    tokenizer: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    seq_len: int = MISSING
    batch_size: int = MISSING
    max_steps: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    name: str = MISSING
    resume: str | None = field(default=None, metadata={"path": True})
    checkpoint: str | None = field(default=None, metadata={"path": True})
    trust: list[str] = field(default_factory=list)
    trainable: str = "all"
    tuning: TuningConfig = field(default_factory=TuningConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass
class EvaluateConfig:
    """The words of `evaluate.py`.

    Attributes:
        checkpoint: folder of a checkpoint, of a run (its newest checkpoint), or of a sweep (every run's newest one).
        states: file of trained states that documents begin from, or the folder of the run that wrote it.
        task: what to evaluate; one choice or a list.
        data: other data than the checkpoint's; null keeps its own.
        split: train, validation or test.
        seq_len: context length, or a list of them; null takes the trained one.
        max_tokens: evenly spread windows of about so many tokens; null takes the whole split.
        batch_size: windows at once; null takes about 16k tokens.
        device: auto, cpu or cuda.
        precision: auto is bf16 on a GPU and float32 on a CPU; or float32, bf16.
        output: folder for results; null takes `evaluation/` in the run's folder.
        trust: full names of classes besides longmix's own that the checkpoint may name.
    """

    checkpoint: str = field(default=MISSING, metadata={"path": True})
    states: str | None = field(default=None, metadata={"path": True})
    task: Any = MISSING
    data: Any = None
    split: str = "validation"
    seq_len: Any = field(default=None, metadata={"takes": int | list[int] | None})
    max_tokens: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    precision: str = "auto"
    output: str | None = field(default=None, metadata={"path": True})
    trust: list[str] = field(default_factory=list)


@dataclass
class GenerateConfig:
    """The words of `generate.py`.

    Attributes:
        checkpoint: folder of a checkpoint, or of a run (its newest checkpoint).
        prompt: a text, or a list of texts that go on side by side.
        prompt_file: a UTF-8 file with the prompt instead.
        max_tokens: tokens to generate for each row.
        samples: continuations of each prompt.
        temperature: below 1 makes likely tokens likelier; 0 always takes the likeliest.
        top_k: draw among so many likeliest tokens; null among all.
        top_p: draw among the likeliest tokens that have this probability together.
        min_p: leave out tokens less likely than this share of the likeliest.
        seed: of what is drawn; null is 0, and with load goes on with what was saved.
        stop: texts that end a row, such as [###].
        states: file of trained states that documents begin from, or the folder of the run that wrote it.
        load: file of an earlier call to go on from.
        save: file to go on from later.
        device: auto, cpu or cuda.
        precision: auto is bf16 on a GPU and float32 on a CPU; or float32, bf16.
        trust: full names of classes besides longmix's own that the checkpoint may name.
    """

    checkpoint: str = field(default=MISSING, metadata={"path": True})
    prompt: Any = field(default="", metadata={"takes": str | list[str], "literal": True})
    prompt_file: str | None = field(default=None, metadata={"path": True})
    max_tokens: int = 256
    samples: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list, metadata={"literal": True})
    states: str | None = field(default=None, metadata={"path": True})
    load: str | None = field(default=None, metadata={"path": True})
    save: str | None = field(default=None, metadata={"path": True})
    device: str = "auto"
    precision: str = "auto"
    trust: list[str] = field(default_factory=list)


@dataclass
class PrepareConfig:
    """The words of `prepare.py`.

    Attributes:
        data: what to prepare.
        tokenizer: how text becomes tokens.
        splits: which token files to make, such as [train,validation]; null makes all.
        workers: processes that tokenise besides this one, and read too what is streamed.
        shard_tokens: a shard ends with the documents that fill it.
    """

    data: Any = MISSING
    tokenizer: Any = MISSING
    splits: list[str] | None = None
    workers: int = 0
    shard_tokens: int = MISSING
