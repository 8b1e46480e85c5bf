"""`evaluate.py task=decode_cost`: the cost of a generated token and of generations, counted and measured."""

import copy
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table

from longmix.accelerators import ACCELERATORS, by_word
from longmix.analysis.cost_model import StepCost, first_context, intensity, step_cost
from longmix.caches.named import kinds_of
from longmix.config import ModelConfig
from longmix.config.choices import Choice, Pattern, choice_or_pattern
from longmix.errors import ConfigError
from longmix.evaluation.loss import to_device
from longmix.evaluation.memory import check_memory
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.evaluation.tasks.cache_counts import EXACT, cache_bytes, cache_table
from longmix.evaluation.tasks.generation_costs import (
    Generations,
    draw_generations,
    generation_tables,
    numbers,
    panels_of,
)
from longmix.generation.session import Session
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.states import held_bytes
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.progress import tracked
from longmix.reporting.plots import draw_curves, drawing, new_figure

STEPS_READ = 1024
"""Number of tokens after a context that come from the data; further steps repeat them."""

LARGEST = 2**40
"""The largest length of a context, number of steps, and number of sequences."""

MOST_GENERATED = 2**20
"""The most tokens of a generation: mixers of other packages are summed step by step."""

MOST_ATTEMPTS = 100_000
"""The most attempts at a question."""

MOST_PEAK = 1e30
"""The most operations or bytes per second."""

GENERATED = (1, 256, 2048, 16384)
"""Tokens of the generations that are counted if nothing else is asked for."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class DecodeCost(Task):
    """What tokens and generations cost on some hardware, beside `mixer=flash` in the same model, and on this machine.

    Args:
        contexts: tokens before it; None takes powers of two from 1024 to 65536.
        hardware: name of an accelerator, whose arithmetic and memory are weighed against each other.
        flops, bandwidth: peak operations and bytes per second in its place; both or neither.
        batch: sequences that are decoded together, in what is counted; what is measured is one. Of generations, the
            prompts whose samples are decoded together.
        dtype: of weights and caches in what is counted; recurrent states stay in float32.
        measured: contexts after which decoding is timed; None takes a quarter of the trained length, and that.
        steps: tokens that are timed after each.
        mixers: further mixers to count in its place in the same model: names or patterns, with settings of their own as
            in `rwkv7:head_dim=32`.
        caches: kinds of caches whose bytes are counted too, beside those of `exact`: words such as
            `h2o:budget=0.25:recent=0.1`. A budget that is a share is one of the context.
        generated: tokens of the generations that are counted; None takes 1, 256, 2048 and 16384, [] is none.
        samples: how many generations go on from each prompt.
        shared_prompt: samples read and hold the prompt's keys and values once, where these are the same for all.
        attempts: how often each question was tried, for `correct`.
        correct: how many attempts at each question were right: a list for the model, one for flash, and one for each of
            `mixers`; [] where that is not known, and as the rest of them.

    Raises:
        ConfigError: an impossible or unknown setting.
    """

    name = "decode_cost"
    follows_training = False

    def __init__(
        self,
        contexts: list[int] | None = None,
        hardware: str = "H200",
        batch: int = 1,
        dtype: str = "bfloat16",
        measured: list[int] | None = None,
        steps: int = 16,
        flops: float | None = None,
        bandwidth: float | None = None,
        mixers: Sequence[str] = (),
        generated: list[int] | None = None,
        samples: Sequence[int] = (1,),
        shared_prompt: bool = True,
        attempts: int | None = None,
        correct: Sequence[Sequence[int]] = (),
        caches: Sequence[str] = (),
    ) -> None:
        for name, given, most, needed in (
            ("contexts", contexts, LARGEST, True),
            ("measured", measured, LARGEST, False),
            ("generated", generated, MOST_GENERATED, False),
            ("samples", samples, LARGEST, True),
        ):
            if any(not 1 <= number <= most for number in given or []) or (needed and given is not None and not given):
                raise ConfigError(f"task.{name}={given} must be whole numbers from 1 to {most}.")
        for name, number in (("batch", batch), ("steps", steps)):
            if not 1 <= number <= LARGEST:
                raise ConfigError(f"task.{name}={number} must be from 1 to {LARGEST}.")
        accelerator = by_word(hardware)
        if accelerator is None:
            raise ConfigError(f"task.hardware={hardware} is unknown; use one of {', '.join(ACCELERATORS)}.")
        if dtype not in DTYPES:
            raise ConfigError(f"task.dtype={dtype} is unknown; use one of {', '.join(DTYPES)}.")
        self.contexts = sorted({2**n for n in range(10, 17)} if contexts is None else set(contexts))
        self.hardware, self.batch, self.dtype, self.measured, self.steps = hardware, batch, dtype, measured, steps
        self.accelerator, self.reads_split = accelerator, measured != []
        self.flops, self.bandwidth = _peaks(flops, bandwidth)
        self.mixers, self.others = list(mixers), {word: _mixer(word) for word in mixers}
        self.caches, self.kinds = list(caches), kinds_of([EXACT, *caches], "task.caches") if caches else {}
        self.generated = sorted(set(GENERATED if generated is None else generated))
        self.samples, self.shared_prompt = sorted(set(samples)), shared_prompt
        self.attempts, self.correct = attempts, list(correct)
        _check_scores(attempts, self.correct, len(self.mixers) + 2, max(self.samples))

    def ask(self, subject: Subject) -> Answer:
        """Count the arithmetic and the bytes, and measure the time.

        Returns:
            `{"step", "hardware", "intensity", "batch", "dtype", "counted": [row], "flash": [row], "mixing_dominates",
            "cheaper_than_flash", "measured": [{"context", "milliseconds", "state_bytes", "counted_state_bytes"}]}`.
            Rows hold the fields of `StepCost` and its eFLOP `parameters`, `mixing` and `total`. The two contexts are
            the first from which on mixing costs more than parameters, and less than with flash; None if that is not so
            at the last. Of `caches` there is `"caches": [{"cache", "context", "held_bytes", "read_bytes"}]`, of one
            sequence. Of generations there are `"generations"`, `"break_even"`, `"coverage"` and `"equal_coverage"`;
            see `Costs`.

        Raises:
            ConfigError: more memory than there is, or a mixer that the model cannot have.
            DataError: the split has fewer tokens than are read.
        """
        contexts, dtype, trained = self.contexts, DTYPES[self.dtype], subject.trained_seq_len
        measured = sorted({max(1, trained // 4), trained} if self.measured is None else set(self.measured))
        balance, config = self._intensity(dtype), subject.restored.config
        with torch.device("meta"):
            model = build_model(config, subject.model.vocab_size).to(dtype)
            flash = with_flash(model)
            models = {"this": model, "flash": flash}
            models |= {word: _built(word, mixer, model, config).to(dtype) for word, mixer in self.others.items()}
        counted, baseline = ([step_cost(each, n, self.batch) for n in contexts] for each in (model, flash))
        pairs = list(zip(counted, baseline, strict=True))
        report: dict[str, Any] = {
            "step": subject.step,
            "hardware": self.hardware_name,
            "intensity": balance,
            "batch": self.batch,
            "dtype": self.dtype,
            "counted": [_row(cost, balance) for cost in counted],
            "flash": [_row(cost, balance) for cost in baseline],
            "mixing_dominates": first_context(contexts, [c.mixing(balance) > c.parameters(balance) for c in counted]),
            "cheaper_than_flash": first_context(contexts, [c.mixing(balance) < f.mixing(balance) for c, f in pairs]),
            **self._generations(models, balance),
            "caches": cache_bytes(model, self.kinds, contexts),
            "measured": _measured(subject, measured, self.steps),
        }
        settings = {"contexts": contexts, **{key: report[key] for key in ("hardware", "intensity", "batch", "dtype")}}
        for key in ("generated", "samples", "shared_prompt", "attempts", "correct"):
            settings[key] = getattr(self, key)
        settings["caches"] = self.caches
        settings["mixers"] = {name: mixer.entries for name, mixer in self.others.items()}
        return Answer(report, {**settings, "measured": measured, "steps": self.steps})

    @property
    def hardware_name(self) -> str:
        """The accelerator's name, or the peaks that were given."""
        if self.flops is None or self.bandwidth is None:
            return self.accelerator.name
        return f"{self.flops / 1e12:g} TFLOP/s and {self.bandwidth / 1e12:g} TB/s"

    def _intensity(self, dtype: torch.dtype) -> float:
        if self.flops is None or self.bandwidth is None:
            return intensity(self.accelerator, dtype)
        return self.flops / self.bandwidth

    def _generations(self, models: Mapping[str, LanguageModel], balance: float) -> dict[str, Any]:
        asked = Generations(self.contexts, self.generated, self.samples, self.batch, self.shared_prompt, balance)
        costs, scores = asked.costs(models), (self._scores(models), self.attempts or 0)
        return {
            "shared_prompt": self.shared_prompt,
            "generations": costs.rows(),
            "break_even": costs.break_even(),
            "coverage": costs.covered(*scores),
            "equal_coverage": costs.at_equal_coverage(*scores),
        }

    def _scores(self, names: Iterable[str]) -> dict[str, list[int]]:
        return {name: list(right) for name, right in zip(names, self.correct, strict=False) if right}

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """The counted cost at each context, what follows from it, generations, and the measured times."""
        report = answer.report
        yield _counted_table(report)
        for text, context in (
            ("mixing costs more than the parameters", report["mixing_dominates"]),
            ("mixing costs less than flash attention's", report["cheaper_than_flash"]),
        ):
            reached = "not at these contexts" if context is None else f"from {context:,} tokens of context on"
            yield f"{text}: {reached}"
        if report["caches"]:
            yield cache_table(report)
        yield from generation_tables(report)
        if report["measured"]:
            yield _measured_table(report["measured"])

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """eFLOP and bytes held by context, measured times, and generations."""
        report = answer.report
        of_a_token = 3 if report["measured"] else 2
        figure, panels = new_figure(of_a_token + panels_of(report))
        counted, flash = report["counted"], report["flash"]
        contexts = [row["context"] for row in counted]
        curves = {
            "total": (contexts, [row["total"] for row in counted]),
            "parameters": (contexts, [row["parameters"] for row in counted]),
            "mixing": (contexts, [row["mixing"] for row in counted]),
            "mixing, flash": (contexts, [row["mixing"] for row in flash]),
        }
        held = {
            name: (contexts, [row["held_bytes"] / 1e6 for row in rows])
            for name, rows in (("this", counted), ("flash", flash))
        }
        words: dict[str, Any] = {"x_label": "tokens of context", "log_x": True}
        title = f"one token, {report['hardware']}, {report['dtype']}, batch {report['batch']}"
        draw_curves(panels[0], curves, title=title, y_label="eFLOP", log_y=True, **words)
        draw_curves(panels[1], held, title="state of one sequence", y_label="MB", log_y=True, **words)
        if report["measured"]:
            times = [row["context"] for row in report["measured"]], [row["milliseconds"] for row in report["measured"]]
            draw_curves(panels[2], {"": times}, title="measured here", y_label="ms/token", **words)
            panels[2].set_ylim(0, 1.2 * max(times[1]))
        draw_generations(panels[of_a_token:], report)
        return figure


def _peaks(flops: float | None, bandwidth: float | None) -> tuple[float | None, float | None]:
    """Both peaks, or neither.

    Raises:
        ConfigError: one without the other, or out of range.
    """
    for name, other, number in (("flops", "bandwidth", flops), ("bandwidth", "flops", bandwidth)):
        if number is not None and not (math.isfinite(number) and 1 <= number <= MOST_PEAK):
            raise ConfigError(f"task.{name}={number} must be from 1 to {MOST_PEAK:g}, per second.")
        if number is None and (flops, bandwidth) != (None, None):
            raise ConfigError(f"task.{name}=null, and task.{other} is given: give both, or neither.")
    return flops, bandwidth


def _mixer(word: str) -> Choice | Pattern:
    """The mixer that `mixer=NAME mixer.SETTING=VALUE` means on the command line, of the word NAME:SETTING=VALUE.

    Raises:
        ConfigError: there is no such mixer or setting.
    """
    from longmix.composing import composed

    name, *settings = word.split(":")
    with _named(word):
        made = composed("train", [f"mixer={name}", *(f"mixer.{setting}" for setting in settings)])
        return choice_or_pattern("mixer", made.content["mixer"])


def _built(word: str, mixer: Choice | Pattern, like: LanguageModel, config: ModelConfig) -> LanguageModel:
    with _named(word):
        return build_model(ModelConfig(mixer=mixer, model=config.model), like.vocab_size)


@contextmanager
def _named(word: str) -> Iterator[None]:
    """Errors say which of `task.mixers` they are of."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"task.mixers names {word}: {error}") from error


def _check_scores(attempts: int | None, correct: Sequence[Sequence[int]], most: int, samples: int) -> None:
    """Refuse scores that cannot be of so many attempts.

    Raises:
        ConfigError: names the setting.
    """
    if attempts is not None and not 1 <= attempts <= MOST_ATTEMPTS:
        raise ConfigError(f"task.attempts={attempts} must be from 1 to {MOST_ATTEMPTS}.")
    if not correct:
        return
    if attempts is None:
        raise ConfigError("task.attempts=null: task.correct is given; give how often each question was tried.")
    if samples > attempts:
        raise ConfigError(f"task.samples has {samples}, and there were task.attempts={attempts} at each question.")
    if len(correct) > most:
        raise ConfigError(
            f"task.correct has {len(correct)} lists, and {most} models are compared: the one that is evaluated, flash, "
            "and those of task.mixers."
        )
    for right in correct:
        if not isinstance(right, list | tuple) or not all(_is_count(each, attempts) for each in right):
            raise ConfigError(
                f"task.correct has {right}; it must be a list for each model, of a whole number from 0 to "
                f"task.attempts={attempts} for each question."
            )


def _is_count(number: object, most: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= most


def with_flash(model: LanguageModel) -> LanguageModel:
    """A copy of a model, on its device, whose mixers are `Flash` with the model's heads."""
    changed = copy.deepcopy(model)
    like = model.embedding.weight
    shape: ModelShape = model.shape
    for index, block in enumerate(changed.blocks):
        block.mixer = Flash(shape, index).to(like.device, like.dtype)
    return changed


def measure(model: LanguageModel, tokens: torch.Tensor, context: int, steps: int) -> dict[str, float]:
    """Decode after the first `context` of the tokens, int64 [context + 1 or more]; the rest are repeated in turn.

    Returns:
        `milliseconds`, the median of a step's; `state_bytes`, of what is remembered before the first, without
        bookkeeping, and `counted_state_bytes`, what the model says it is.
    """
    session = Session(model, 1)
    session.prefill([tokens[:context]])
    held, _ = held_bytes(session.state)
    times = []
    for number in range(steps + 1):
        begin = _now(tokens.device)
        session.step(tokens[context + number % (len(tokens) - context)][None])
        times.append(_now(tokens.device) - begin)
    seconds = statistics.median(times[1:])  # the first step warms caches up
    return {"milliseconds": 1000 * seconds, "state_bytes": held, "counted_state_bytes": session.counted_bytes(context)}


def _measured(subject: Subject, contexts: list[int], steps: int) -> list[dict[str, float]]:
    if not contexts:
        return []
    length = max(contexts) + min(steps, STEPS_READ)
    if max(contexts) > subject.trained_seq_len:
        subject.check_length(length, "task.measured and the steps after it")
    check_memory(subject.model, length, subject.restored, f"task.measured={contexts}")
    loader = subject.data.evaluation_loader(subject.split, length, 1, length)
    tokens = to_device(next(iter(loader)), subject.restored.device)["tokens"][0]
    rows = []
    for context in tracked(contexts, "decoding"):
        with subject.restored.autocast():
            rows.append({"context": context, **measure(subject.model, tokens, context, steps)})
    return rows


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _row(cost: StepCost, balance: float) -> dict[str, float]:
    return {"context": cost.context, **numbers(cost, balance)}


def _counted_table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"one generated token on {report['hardware']} in {report['dtype']}, {report['batch']} at a time: eFLOP = "
        f"FLOP + {report['intensity']:.0f} bytes; each with the share of mixing"
    )
    for heading in ("context", "MFLOP", "mixing", "MB", "mixing", "MeFLOP", "mixing", "MB held", "vs flash"):
        table.add_column(heading, justify="right", no_wrap=heading == "context")
    for row, flash in zip(report["counted"], report["flash"], strict=True):
        flops, moved = row["parameter_flops"] + row["mixing_flops"], row["weight_bytes"] + row["state_bytes"]
        shares = row["mixing_flops"] / flops, row["state_bytes"] / moved, row["mixing"] / row["total"]
        amounts = flops / 1e6, moved / 1e6, row["total"] / 1e6
        cells = [text for pair in zip(amounts, shares, strict=True) for text in (f"{pair[0]:,.2f}", f"{pair[1]:.0%}")]
        against = f"{row['total'] / flash['total']:.2f}x"
        table.add_row(f"{row['context']:,}", *cells, f"{row['held_bytes'] / 1e6:,.2f}", against)
    return table


def _measured_table(rows: list[dict[str, float]]) -> Table:
    table = Table(title="measured here, one sequence")
    for heading in ("context", "ms/token", "state bytes", "as counted"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['context']:,}",
            f"{row['milliseconds']:.2f}",
            f"{row['state_bytes']:,}",
            f"{row['counted_state_bytes']:,}",
        )
    return table
