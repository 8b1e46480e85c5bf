"""The configuration of each command: its words with their types, ranges, defaults and meanings.

Everything that a command does receives an instance of its class. Hydra refuses unknown words and wrong types by the
same classes (`longmix.config.border.hydra_schema`), and the help prints the meanings that stand here. Fields are in the
order in which `config.yaml` has them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from longmix.config.choices import Choice, Pattern, choice_or_pattern
from longmix.config.rules import COUNT, LENGTHS, Rule, at_least, between, record, word
from longmix.config.stages import Objective, Stage
from longmix.config.train_nodes import AdversarialConfig, DistilConfig, LoopConfig, MatchConfig, TuningConfig
from longmix.config.values import LARGEST_SEED
from longmix.errors import ConfigError
from longmix.naming import check_name

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bf16"]

KEPT = Rule(
    lambda value: bool(value) if isinstance(value, list) else value >= 1,
    "must be a number of layers from 1, or a list of layers such as [1,4].",
)
NO_STAGES = f"is no list of stages; write it like '[{Stage.words_as_written},{{seq_len:32768,max_tokens:1e8}}]'."
BIASES = "write it like '{262:-100,\" the\":2}', tokens by id or text."
NO_TEXT = "is no text; leave prompt out, or write 'prompt=\"null\"' for the text null."


@dataclass(frozen=True)
class OriginRecord:
    """The weights that a run began from.

    Attributes:
        checkpoint: the checkpoint's folder.
        weights: digest of its weights.
    """

    checkpoint: str
    weights: str

    @classmethod
    def of(cls, stored: object) -> "OriginRecord | None":
        """That of a configuration in a file, which any version may have written; None if it has none."""
        if not isinstance(stored, Mapping) or not {"checkpoint", "weights"} <= stored.keys():
            return None
        return cls(str(stored["checkpoint"]), str(stored["weights"]))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The part of a configuration that a model is built from.

    Attributes:
        mixer: what mixes the sequence: a choice, or a pattern over choices.
        model: the model's size.
    """

    mixer: Choice | Pattern
    model: Choice

    @classmethod
    def of(cls, stored: Mapping[str, object]) -> "ModelConfig":
        """That of a checkpoint's configuration, or of another mapping with these keys."""
        return ModelConfig(**_model_of(stored))


def _model_of(stored: Mapping[str, object]) -> dict[str, Any]:
    return {"mixer": choice_or_pattern("mixer", stored["mixer"]), "model": Choice.of("model", stored["model"])}


@dataclass(frozen=True, kw_only=True)
class StoredConfig(ModelConfig):
    """What a checkpoint says besides: enough to evaluate and to generate, whichever version wrote it.

    Attributes:
        data: what it was trained on; None of an imported model.
        tokenizer: how text becomes tokens.
        seq_len: tokens of a training window.
        seed: of the run.
    """

    data: Choice | None
    tokenizer: Choice
    seq_len: int
    seed: int

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """That of a checkpoint's configuration, which may have other keys besides."""
        return cls(
            **_model_of(stored),
            data=None if stored["data"] is None else Choice.of("data", stored["data"]),
            tokenizer=Choice.of("tokenizer", stored["tokenizer"]),
            seq_len=stored["seq_len"],
            seed=stored["seed"],
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig):
    """The words of `train.py`.

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
        stages: parts of the run with words of their own, such as [{seq_len:4096,max_tokens:1e9},{seq_len:32768,
            max_tokens:1e8}]; what a stage does not say is as in the whole run. See docs/stages.md.
        seed: of weights, data order and everything else that is drawn.
        name: the run's name; its folder is `runs/<name>`.
        resume: auto continues `runs/<name>`, or without a name the newest run of this configuration; or the folder of a
            run or checkpoint.
        checkpoint: folder of a run or checkpoint whose weights a new run begins from; model, mixer and tokenizer are
            its own, but for mixer.NAME=VALUE of what may change after training, such as mixer.rotary_scaling.
        trust: full names of classes besides longmix's own that checkpoint may name.
        convert: give the model of checkpoint= the mixer of this command, which takes what it can of the weights; see
            docs/converting.md.
        keep: layers that keep the mixer of checkpoint= when the others are converted: a list of their numbers from 0,
            such as [1,4]; or how many, those whose conversion alone costs the most loss, which is measured first.
        measure_tokens: with keep=N, the tokens from which each layer's new mixer first learns the outputs of the old
            one; 0 measures what the transfer of weights gives.
        trainable: all, or states: train the states before documents and nothing else.
        tuning: see `TuningConfig`.
        objective: tokens, the text's own; or what the model that checkpoint= names teaches: layers, its mixers'
            outputs, or logits, its distributions; see docs/distillation.md.
        distil: see `DistilConfig`.
        match: see `MatchConfig`.
        adversarial: see `AdversarialConfig`.
        loop: see `LoopConfig`.
        origin: what `checkpoint` meant when the run began; no word.
        stage: in a checkpoint, the number of the stage that it was saved in, from 0; no word.
    """

    data: Choice
    tokenizer: Choice
    optimizer: Choice
    schedule: Choice
    trainer: Choice
    logger: Choice
    seq_len: int = word(512, at_least(1))
    batch_size: int = word(2, at_least(1))
    max_steps: int | None = word(None, at_least(1))
    max_tokens: int | None = word(800_000, at_least(1))
    stages: list[Stage] | None = word(None, Rule(bool, "names no stage; leave stages out."), misfit=NO_STAGES)
    seed: int = word(0, between(0, LARGEST_SEED))
    name: str
    resume: str | None = word(None, path=True)
    checkpoint: str | None = word(None, path=True)
    trust: list[str] = word([])
    convert: bool = False
    keep: int | list[int] | None = word(None, KEPT, misfit=KEPT.says)
    measure_tokens: int = word(65_536, at_least(0))
    trainable: Literal["all", "states"] = "all"
    tuning: TuningConfig = field(default_factory=TuningConfig)
    objective: Objective = "tokens"
    distil: DistilConfig = field(default_factory=DistilConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    origin: OriginRecord | None = record()
    stage: int | None = record()

    def check_together(self) -> None:
        """Refuse words that do not go together, and those that a look at the disk shows to be wrong.

        Raises:
            ConfigError: naming the words.
        """
        if self.max_steps is None and self.max_tokens is None:
            endless = [number for number, stage in enumerate(self.stages or ()) if not stage.is_limited]
            if self.stages is None or endless:
                where = f" stages[{endless[0]}]" if endless else ""
                raise ConfigError(f"give{where} max_steps or max_tokens, or training would never end.")
        is_yes = str(self.resume).lower() in ("yes", "true", "on", "1", "newest", "latest")
        if self.resume is not None and is_yes and not Path(self.resume).exists():
            raise ConfigError(f"resume={self.resume} is not there. Did you mean auto? Else give the folder of a run.")
        check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The words of `evaluate.py`.

    Attributes:
        checkpoint: folder of a checkpoint, of a run (its newest checkpoint), or of a sweep (every run's newest one);
            last is the newest run.
        mixer: settings of the checkpoint's mixer that may change after training, such as mixer.rotary_scaling=yarn.
        states: file of trained states that documents begin from, or the folder of the run that wrote it.
        weights: trained, or ema: their average over the steps of a run with loop.ema_decay.
        task: what to evaluate; one choice or a list.
        data: other data than the checkpoint's; null keeps its own.
        split: train, validation or test.
        seq_len: context length, or a list of them; null takes the trained one.
        max_tokens: evenly spread windows of about so many tokens; null takes the whole split.
        stride: of task=loss and task=accuracy: windows overlap and begin so many tokens after one another, so that each
            token is scored once after at least seq_len - stride tokens; null is seq_len, without overlap.
        batch_size: windows at once; null takes about 16k tokens.
        device: auto, cpu or cuda.
        precision: auto is bf16 on a GPU and float32 on a CPU; or float32, bf16.
        output: folder for results; null takes `evaluation/` in the run's folder.
        trust: full names of classes besides longmix's own that the checkpoint may name.
    """

    checkpoint: str = word(path=True)
    mixer: dict[str, Any] = word({})
    states: str | None = word(None, path=True)
    weights: Literal["trained", "ema"] = "trained"
    task: dict[str, Choice] = word(misfit="is no task; give one or several, such as task=[loss,accuracy].")
    data: Choice | None = None
    split: str = "validation"
    seq_len: int | list[int] | None = word(None, LENGTHS, misfit=LENGTHS.says)
    max_tokens: int | None = word(None, COUNT)
    stride: int | None = word(None, COUNT)
    batch_size: int | None = word(None, COUNT)
    device: Device = "auto"
    precision: Precision = "auto"
    output: str | None = word(None, path=True)
    trust: list[str] = word([])


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The words of `generate.py`.

    Attributes:
        checkpoint: folder of a checkpoint, or of a run (its newest checkpoint).
        mixer: settings of the checkpoint's mixer that may change after training, such as mixer.rotary_scaling=yarn.
        prompt: a text, or a list of texts that go on side by side.
        prompt_file: a UTF-8 file with the prompt instead.
        max_tokens: tokens to generate for each row.
        samples: continuations of each prompt.
        temperature: below 1 makes likely tokens likelier; 0 always takes the likeliest.
        top_k: draw among so many likeliest tokens; null among all.
        top_p: draw among the likeliest tokens that have this probability together.
        min_p: leave out tokens less likely than this share of the likeliest.
        repetition_penalty: above 1 makes tokens less likely that prompt or text hold already.
        presence_penalty: is subtracted from the score of each token that was generated before.
        frequency_penalty: is subtracted as often as the token was generated before.
        logit_bias: numbers added to the scores of tokens, by id or by text, such as '{262:-100," the":2}';
            null adds none.
        logprobs: with output: write the log-probability of each token and of so many likeliest ones; null writes none.
        seed: of what is drawn; null is 0, and with load goes on with what was saved.
        stop: texts that end a row, such as [###].
        input: a file of prompts, JSON Lines such as {"prompt":"We","max_tokens":9}, whose answers go to output.
        output: file of JSON Lines to write to instead of printing; run again, it goes on with what it lacks.
        batch_tokens: of input: most tokens of rows that are continued at once, prompts and max_tokens together.
        cache: what layers of attention keep of keys and values; null is exact, and with load what was saved.
        question: a text that is read behind each prompt, after the cache has compressed that, or for cache=citrus as it
            does.
        draft: for cache=speckv, folder of a run or checkpoint with the same tokenizer, which writes a continuation of
            each prompt that tells what to keep of it; or for shorten=specpc, which chooses what is read of it.
        prefill: how layers of attention read a prompt; null lets each token see all before it.
        shorten: how a draft chooses what is read of a long prompt; null reads all.
        states: file of trained states that documents begin from, or the folder of the run that wrote it.
        weights: trained, or ema: their average over the steps of a run with loop.ema_decay.
        load: file of an earlier call to go on from.
        save: file to go on from later.
        compile: compile what a token takes; it pays after some thousand tokens.
        device: auto, cpu or cuda.
        precision: auto is bf16 on a GPU and float32 on a CPU; or float32, bf16.
        trust: full names of classes besides longmix's own that the checkpoint may name.
    """

    checkpoint: str = word(path=True)
    mixer: dict[str, Any] = word({})
    prompt: str | list[str] = word("", literal=True, misfit=NO_TEXT)
    prompt_file: str | None = word(None, path=True)
    max_tokens: int = word(256, at_least(1))
    samples: int = word(1, at_least(1))
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: str | dict[Any, float] | None = word(None, literal=True, misfit=f"is no mapping; {BIASES}")
    logprobs: int | None = word(None, at_least(0))
    seed: int | None = word(None, between(0, LARGEST_SEED))
    stop: list[str] = word([], literal=True)
    input: str | None = word(None, path=True)
    output: str | None = word(None, path=True)
    batch_tokens: int = word(16384, at_least(1))
    cache: Choice | None = None
    prefill: Choice | None = None
    shorten: Choice | None = None
    question: str | None = word(None, literal=True)
    draft: str | None = word(None, path=True)
    states: str | None = word(None, path=True)
    weights: Literal["trained", "ema"] = "trained"
    load: str | None = word(None, path=True)
    save: str | None = word(None, path=True)
    compile: bool = False
    device: Device = "auto"
    precision: Precision = "auto"
    trust: list[str] = word([])


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The words of `prepare.py`.

    Attributes:
        data: what to prepare.
        tokenizer: how text becomes tokens.
        splits: which token files to make, such as [train,validation]; null makes all.
        workers: processes that tokenise besides this one, and read too what is streamed.
        shard_tokens: a shard ends with the documents that fill it.
    """

    data: Choice
    tokenizer: Choice
    splits: list[str] | None = None
    workers: int = 0
    shard_tokens: int = 134_217_728
