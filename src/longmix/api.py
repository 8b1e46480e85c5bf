"""longmix from Python: `train` and `load`, which are functions of their arguments.

Neither ends the process, nor leaves anything in Hydra's state. What is refused is a `LongmixError`.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from omegaconf import DictConfig, OmegaConf

from longmix.command_line.words import Word
from longmix.composing import as_words, composed
from longmix.config import GenerateConfig, Plain, TrainConfig, defaults, read, resolved, unknown_key
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError
from longmix.files import free_folder, storage_errors
from longmix.invocation import Invocation
from longmix.model.backbone import LanguageModel
from longmix.naming import RUNS, check_name
from longmix.notices import begin_run
from longmix.paths import user_path
from longmix.restore import Restored, restore

if TYPE_CHECKING:
    from longmix.generation.decoding import Continuation
    from longmix.training.summary import Summary

Words = Sequence[str] | Mapping[str, Any] | DictConfig

WHOLE = ("model", "mixer", "data", "optimizer", "trainer")
"""Groups that a whole configuration has choices of."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: of the run: `config.yaml`, `metrics.csv`, `summary.json`, `checkpoints/`.
        summary: as in `summary.json`; `summary["validation"]["loss"]` is in nats per token. Empty in all processes of a
            distributed run but the first.
        checkpoint: the newest one's folder; None if none was kept.
    """

    folder: Path
    summary: "Summary"
    checkpoint: Path | None

    def load(self, **settings: Any) -> "Loaded":
        """The trained model; see `longmix.load`."""
        return load(self.folder, **settings)


def train(words: Words = (), folder: str | Path | None = None) -> Run:
    """Train a language model in this process.

    Args:
        words: what follows `longmix train`, as a list, `["mixer=flash", "seq_len=64"]`, or as a mapping,
            `{"mixer": "flash", "seq_len": 64}`, in which `{"mixer": {"_target_": "my_package.MyMixer"}}` stands for a
            choice of one's own; or a whole configuration, such as the content of a run's `config.yaml`.
        folder: where the run goes; without, `runs/NAME` for the word `name=NAME`, else one of its own below `runs/`.
            With the word `resume=auto` a run that is there goes on.

    Raises:
        ConfigError: an unknown or impossible word, or a folder that holds a run already.
        NonFiniteError: a loss or gradient was not finite.
        Interrupted: a signal asked for the end; the state is saved. Signals are looked at in the main thread only.
        LongmixError: the others of `longmix.errors`.
    """
    from longmix.allocation import allocation_errors
    from longmix.checkpoints import CheckpointStore
    from longmix.training.claims import remove_unused
    from longmix.training.run import train as run

    begin_run()
    config, given, choices, folders = _configuration(words)
    is_named = any(Word.read(word).name == "name" for word in given)
    if is_named:
        check_name(config.name)
    if folder is None:
        place = Path(RUNS, config.name) if is_named else free_folder(Path(RUNS, _clock_name(config, choices)))
    else:
        place = user_path("folder", folder)
    place = place.absolute()
    config = config if is_named else dataclasses.replace(config, name=place.name)
    with storage_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    is_placed = is_named or folder is not None
    invocation = Invocation(place, tuple(given), choices, named=is_placed, folders=folders)
    try:
        with allocation_errors("training", "make seq_len, batch_size or the model smaller."):
            summary = run(config, invocation)
    except BaseException:
        remove_unused(place)  # the run may have done so; another error must not hide the first
        raise
    last = Path(summary.get("checkpoint", ""))
    own = last.parents[1] if last.parent.name == "checkpoints" else place  # a run that goes on may lie elsewhere
    return Run(own, summary, CheckpointStore(own / "checkpoints").latest())


def _configuration(words: Words) -> tuple[TrainConfig, list[str], Mapping[str, str], tuple[Path, ...]]:
    """The configuration, the words that made it, the file of each group's choice, and folders searched for files."""
    if isinstance(words, str):
        raise ConfigError(f"{words!r} is one text; give a list of words, such as [{words!r}].")
    if isinstance(words, DictConfig):
        return _whole(words), [], {}, ()
    chosen: dict[str, Any] = {}
    if isinstance(words, Mapping):
        if all(isinstance(words.get(group), Mapping) for group in WHOLE):
            return _whole(OmegaConf.create(dict(words))), [], {}, ()
        chosen = {str(name): dict(value) for name, value in words.items() if _is_choice(value)}
        given = as_words({str(name): value for name, value in words.items() if name not in chosen})
    else:
        given = list(words) if isinstance(words, Iterable) else [words]
        if not all(isinstance(word, str) for word in given):
            raise ConfigError(
                f"words={words!r} must be a list of words, such as ['seq_len=64'], a mapping, such as "
                "{'seq_len': 64}, or a whole configuration."
            )
    made = composed("train", given)
    choices = {group: choice for group, choice in made.choices.items() if group not in chosen}
    return read(TrainConfig, OmegaConf.create({**made.content, **chosen})), given, choices, made.folders


def _whole(config: DictConfig) -> TrainConfig:
    """A whole configuration, which needs no name: the run's folder gives it."""
    return read(TrainConfig, {"name": RUNS, **resolved(config)})


def _is_choice(value: Any) -> bool:
    return isinstance(value, Mapping) and ("_target_" in value or "pattern" in value)


def _by_member(settings: Mapping[str, Any]) -> Plain:
    """Settings of a mixer, in which those of a pattern's member may have been named as on the command line."""
    found: Plain = {}
    for name, value in settings.items():
        member, _, setting = str(name).partition(".")
        if not setting:
            found[member] = {**found.get(member, {}), **value} if isinstance(value, Mapping) else value
        elif isinstance(found.setdefault(member, {}), dict):
            found[member] = {**found[member], setting: value}
    return found


def _clock_name(config: TrainConfig, choices: Mapping[str, str]) -> str:
    parts = [datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), *filter(None, map(choices.get, ("mixer", "model")))]
    return "_".join([*map(str, parts), str(config.seq_len)])


class GenerateWords(TypedDict, total=False):
    """How text is generated, with the defaults of `longmix generate`.

    Attributes:
        max_tokens: of each row; 256.
        samples: continuations of each prompt, which is read once; 1.
        temperature: 0 takes the most likely token; 1.
        top_k, top_p, min_p: leave out unlikely tokens.
        repetition_penalty: divides positive scores of tokens in prompt and text and multiplies others; 1.
        presence_penalty, frequency_penalty: are subtracted from scores of tokens in the text, once or each time; 0.
        logit_bias: numbers added to the scores of tokens; keys are ids, or texts of one token.
        seed: the same one gives the same texts; 0.
        stop: a text that ends a row, or several.
        cache: what layers of attention keep of keys and values, by name; or a mapping of `name` and settings; "exact".
        prefill: how layers of attention read a prompt, likewise, such as "star"; each token sees all before it.
        shorten: how the draft chooses what is read of a long prompt, likewise, such as "specpc"; all is read.
        question: a text that is read behind each prompt, after the cache has compressed that.
        draft: folder of a run or checkpoint that for the cache "speckv" writes a continuation of each prompt, and with
            `shorten` chooses what is read of it.
        compile: compile what a token takes, which pays after some thousand tokens; False.
    """

    max_tokens: int
    samples: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int | str, float]
    seed: int
    stop: str | Sequence[str]
    compile: bool
    cache: str | Mapping[str, Any]
    prefill: str | Mapping[str, Any]
    shorten: str | Mapping[str, Any]
    question: str
    draft: str | Path


class Loaded:
    """A trained model, ready to use.

    Attributes:
        checkpoint: its folder.
        config: the configuration it was trained with.
        model: takes token ids [B, T], int64, and returns a `ModelOutput`, whose `hidden` is [B, T, D].
        tokenizer: the one it was trained with.
    """

    def __init__(self, restored: Restored, settings: Mapping[str, Any]) -> None:
        self.checkpoint: Path = restored.checkpoint
        self.config: Plain = restored.written
        self.model: LanguageModel = restored.model
        self.tokenizer: Tokenizer = restored.tokenizer
        self._restored, self._settings = restored, dict(settings)

    def __repr__(self) -> str:
        parameters = self.model.parameter_counts()["total"]
        return f"Loaded({str(self.checkpoint)!r}, {parameters:,} parameters, {self._restored.device})"

    @overload
    def generate(
        self, prompt: str | Sequence[str] = "", *, logprobs: None = None, **words: Unpack[GenerateWords]
    ) -> list[str]: ...

    @overload
    def generate(
        self, prompt: str | Sequence[str] = "", *, logprobs: int, **words: Unpack[GenerateWords]
    ) -> list["Continuation"]: ...

    def generate(
        self, prompt: str | Sequence[str] = "", *, logprobs: int | None = None, **words: Unpack[GenerateWords]
    ) -> "list[str] | list[Continuation]":
        """Go on from a prompt, or from several side by side; nothing is printed.

        Args:
            prompt: a text or a list of texts.
            logprobs: return the log-probability of each token too, and of so many likeliest ones, after the model's own
                distribution: before temperature, filters and penalties.
            words: see `GenerateWords`.

        Returns:
            The continuations, without their prompts; those of one prompt follow each other. Texts, or with `logprobs`
            a `Continuation` each: `text`, `tokens`, `finish_reason` and `logprobs`.

        Raises:
            ConfigError: an impossible setting.
            DataError: the prompt is no valid Unicode.
        """
        from longmix.generation.run import continued

        prompts = _texts("prompt", prompt) if not isinstance(prompt, str) else prompt
        begin_run()
        made = continued(self._words(words, prompt=prompts, logprobs=logprobs), self._restored)
        return made.texts if logprobs is None else made.continuations

    def answer(
        self,
        input: str | Path,
        output: str | Path,
        *,
        batch_tokens: int = 16384,
        logprobs: int | None = None,
        **words: Unpack[GenerateWords],
    ) -> Path:
        """Go on from each prompt of a file, in batches of similar length; called again, it goes on with what it lacks.

        Args:
            input: JSON Lines with a `prompt` each; see docs/generation.md.
            output: file of JSON Lines, in the order of the prompts once all are there.
            batch_tokens: most tokens of the rows that are continued at once.
            logprobs: as of `generate`.
            words: see `GenerateWords`, for prompts that do not say otherwise.

        Returns:
            `output`.

        Raises:
            ConfigError: an impossible setting, or `output` is of other prompts, settings or weights.
            DataError: a prompt cannot be read.
            StorageError: `output` cannot be written.
        """
        from longmix.generation.answering import answer

        paths = {"input": str(user_path("input", input)), "output": str(user_path("output", output))}
        begin_run()
        answer(self._words(words, logprobs=logprobs, batch_tokens=batch_tokens, **paths), self._restored)
        return Path(paths["output"])

    def _words(self, words: Mapping[str, Any], **others: Any) -> GenerateConfig:
        given = {**words, **others, "checkpoint": str(self.checkpoint)}
        if unknown := next((name for name in words if name not in GenerateWords.__annotations__), None):
            raise ConfigError(unknown_key(unknown, unknown, list(GenerateWords.__annotations__)))
        given["stop"] = _texts("stop", words.get("stop", ()))
        if isinstance(words.get("logit_bias"), Mapping):
            given["logit_bias"] = dict(words["logit_bias"])
        for group in ("cache", "prefill", "shorten"):
            if group in words:
                given[group] = _kind_node(group, words[group])
        if words.get("draft") is not None:
            given["draft"] = str(user_path("draft", words["draft"]))
        return read(GenerateConfig, defaults(GenerateConfig) | given)

    def evaluate(self, task: str | Sequence[str] = "loss", **words: Any) -> dict[str, Any]:
        """Run one task, or several.

        Args:
            task: as in `longmix evaluate task=`; a name, or a list of names.
            words: others of that command, such as `split="test"` or `seq_len=[512, 1024]`; settings of a task as
                `**{"task.needle.needles": 4}`. Tables are printed, and files lie in `output`, as there.

        Returns:
            The task's report, or with a list the reports by name. Losses are in nats per token.

        Raises:
            ConfigError: an unknown word, one that `longmix.load` was given, or a task that this model cannot take.
        """
        from longmix.evaluation.run import evaluate

        for word in words:
            if word.partition(".")[0] in ("checkpoint", *self._settings):
                raise ConfigError(f"{word} belongs to the loaded model; give it to longmix.load.")
        names = _texts("task", task)
        given = {"checkpoint": str(self.checkpoint), "task": names, **self._settings, **words}
        begin_run()
        reports = evaluate(composed("evaluate", as_words(given)).content, self._restored)
        return reports[task] if isinstance(task, str) else reports


def _kind_node(group: str, given: str | Mapping[str, Any]) -> Plain:
    """The node of a cache, or of another group of `generate`, that was named.

    Raises:
        ConfigError: it was not, or there is none of this name.
    """
    from longmix.caches.kinds import node_of

    named = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = named.pop("name", None)
    if not isinstance(name, str):
        example = {"cache": "exact", "prefill": "star", "shorten": "specpc"}[group]
        raise ConfigError(f'{group}={given!r} must be a name, or a mapping such as {{"name": "{example}"}}.')
    return node_of(name, named, group)


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    """One text or several, as a list.

    Raises:
        ConfigError: it is neither.
    """
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{name}={given!r} must be a text or a list of texts.")
    return texts


def load(
    checkpoint: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    states: str | Path | None = None,
    weights: Literal["trained", "ema"] = "trained",
    mixer: Mapping[str, Any] | None = None,
    trust: Sequence[str] = (),
) -> Loaded:
    """A trained model from its checkpoint alone.

    Args:
        checkpoint: folder of a run, which means its newest checkpoint, or of a checkpoint; "last" is the newest run.
        device: "auto", "cpu" or "cuda".
        precision: "auto" (bf16 on a GPU, float32 on a CPU), "float32" or "bf16".
        states: `states.pt` of a run with trainable=states, or its folder.
        weights: "trained", or "ema": their average over the steps of a run with loop.ema_decay.
        mixer: settings that may change after training, as `{"rotary_scaling": "yarn", "rotary_factor": 4, ...}`; in a
            pattern by its members, `{"flash": {...}}` or `{"flash.rotary_base": 5e5}`.
        trust: full names of classes besides longmix's own that the checkpoint may name. Loading calls nothing else.

    Raises:
        ConfigError: a device or precision that there is not, a setting that may not change, or a checkpoint that names
            a class outside `trust`.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise ConfigError(f"checkpoint={checkpoint!r} is no path; give the folder of a run or of a checkpoint.")
    if mixer is not None and not isinstance(mixer, Mapping):
        raise ConfigError(f"mixer={mixer!r} is no mapping of settings, such as {{'rotary_scaling': 'yarn'}}.")
    mixer = _by_member(mixer or {})
    states = None if states is None else user_path("states", states)
    trusted = _texts("trust", trust)
    if weights not in ("trained", "ema"):
        raise ConfigError(f"weights={weights!r} is not one of trained, ema.")
    restored = restore(
        str(checkpoint),
        mixer=mixer,
        states=states,
        weights=weights,
        device=device,
        precision=precision,
        trust=trusted,
    )
    settings: dict[str, Any] = {"device": device, "precision": precision, "trust": trusted, "weights": weights}
    settings |= {"mixer": mixer} if mixer else {}
    settings["states"] = None if states is None else str(states)
    return Loaded(restored, settings)
