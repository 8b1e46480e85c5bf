"""The header and the summary that a run prints at its beginning and its end."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from longmix.config import Course, TrainConfig, course_of, step_limits, unlimited_windows
from longmix.data.training_data import TrainingData
from longmix.files import replace_json
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.naming import mixer_word
from longmix.progress import duration
from longmix.reporting.results import Unfinished, number, read_summary
from longmix.training.hardware import TrainerSettings
from longmix.wording import counted

if TYPE_CHECKING:
    from longmix.training.supervisor import Supervisor

SUMMARY_FILE = "summary.json"
QUALITIES = {"recall": "recall", "bits_per_byte": "bits/byte", "loss": "nats/token"}
"""The unit of each metric that `quality_of` may name."""

LOG_WIDTH = 160
"""Width where the output is no terminal, so that no path is cut."""


class Summary(TypedDict, total=False):
    """The content of a run's `summary.json`; empty in all processes of a distributed run but the first.

    Of a run with stages, `stages` has each, and `seq_len` and `tokens_per_step` are the last one's. `spikes` has the
    steps that were left out as such, and `validation_transferred` is the one before the first step of a conversion.
    """

    name: str
    mixer: str
    seq_len: int
    parameters: dict[str, int]
    match: dict[str, float] | None
    training_flops_per_token: float
    steps: int
    tokens: int
    tokens_per_step: int
    training_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    device: str
    validation: dict[str, float]
    validation_by_position: list[dict[str, float]]
    stages: list[dict[str, Any]]
    validation_transferred: dict[str, float]
    checkpoint: str
    data_fingerprint: dict[str, object]
    packing: dict[str, Any]
    spikes: list[int]
    versions: dict[str, str]


def mixer_name(config: TrainConfig, choices: Mapping[str, str]) -> str:
    """The mixer in a word: the one that was chosen; of a checkpoint, or of settings alone, see `mixer_word`."""
    if config.checkpoint is None and "mixer" in choices:
        return choices["mixer"]
    return mixer_word(config.mixer.entries)


def quality_of(figures: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the most telling metric.

    Recall for synthetic tasks, whose tokens have no bytes; the loss where nobody knows the bytes of the tokens.
    """
    text = "bits_per_byte" if figures["bytes"] else "loss"
    name = "recall" if "recall" in figures else text
    return name, figures[name]


def training_flops_per_token(model: LanguageModel, seq_len: int) -> float:
    """Floating-point operations of forward and backward per token: three times the forward pass."""
    return 3 * model.flops(seq_len) / seq_len


def mean_flops_per_token(model: LanguageModel, course: Course) -> float:
    """Floating-point operations of forward and backward per token, over all tokens of a run."""
    if not course.staged:
        return training_flops_per_token(model, course.parts[0].config.seq_len)
    flops = 0.0
    for part in course.parts:
        with torch.device("meta"):  # a window may be another in each stage
            own = build_model(part.config, model.vocab_size)
        flops += training_flops_per_token(own, part.config.seq_len) * part.steps * part.tokens_per_step
    return flops / course.total_tokens


def print_header(
    config: TrainConfig,
    folder: Path,
    model: LanguageModel,
    data: TrainingData,
    settings: TrainerSettings,
    first_step: int,
    choices: Mapping[str, str],
) -> None:
    """Sizes, data and machine, before the first step."""
    course = course_of(config)
    steps, tokens = course.total_steps, course.total_tokens
    per_step = counted(course.parts[0].tokens_per_step, "token")
    counts = model.parameter_counts()
    splits = {name: split["tokens"] for name, split in data.summary()["splits"].items()}
    flops = mean_flops_per_token(model, course)
    rows = {
        "run": _shown(folder),
        "model": f"{mixer_name(config, choices)}, {counts['total']:,} parameters, "
        f"{flops / 1e6:,.1f} MFLOP per trained token",
        "data": f"{data.label}: " + ", ".join(f"{count:,} {name} tokens" for name, count in splits.items()),
        "steps": f"{first_step:,} to {steps:,} of {f'{tokens:,} tokens in all' if course.staged else per_step}: "
        f"{tokens / data.train_tokens_per_epoch:.2f} epochs",
        "machine": f"{'GPU' if settings.on_gpu else 'CPU'}, {settings.precision_in_use}, "
        f"{settings.strategy} x {settings.world_size}"
        + (f", rows in {settings.slices} slices" if settings.slices > 1 else ""),
    }
    for part in course.parts if course.staged else ():
        rows[f"stage {part.number + 1}"] = str(part)
    limits = {} if course.staged else step_limits(config)
    given = {"max_steps": config.max_steps, "max_tokens": config.max_tokens}
    if len(limits) == 2:
        holds, other = sorted(limits, key=lambda key: limits[key])
        rows["limit"] = f"{holds}={given[holds]:,}; {other}={given[other]:,} would be {counted(limits[other], 'step')}"
    match = matched(config, counts["total"])
    if match is not None:
        rows["matched"] = (
            f"{match['parameters']:,} parameters for {match['target']:,} ({match['difference']:+.2%}) with "
            f"model.mlp_hidden={match['mlp_hidden']}; {tokens:,} tokens"
            + ("" if course.staged else f", as in every run of max_tokens and {per_step} a step")
        )
    notes = dict.fromkeys(note for part in course.parts for note in unlimited_windows(part.config))
    for index, note in enumerate(notes):
        rows["note" if index == 0 else f"note {index + 1}"] = note
    _print(rows)


def matched(config: TrainConfig, parameters: int) -> dict[str, float] | None:
    """The match with `match.parameters`: difference and width; None if it was not asked for."""
    target = config.match.parameters
    if target is None:
        return None
    difference = parameters / target - 1
    width = config.model.number("mlp_hidden")
    return {"target": target, "parameters": parameters, "difference": difference, "mlp_hidden": width}


def read_own_summary(folder: Path, steps: int) -> Summary | None:
    """The `summary.json` of a finished run of `steps` steps; None if it still has to be written."""
    try:
        summary = read_summary(folder)
        for key in ("perplexity", "tokens"):
            number(summary["validation"], key, 0, finite=False)
    except (Unfinished, OSError, ValueError):
        return None
    is_done = summary.get("steps") == steps == summary["validation"].get("step")
    return cast(Summary, summary) if is_done else None


def write_summary(
    config: TrainConfig,
    folder: Path,
    model: LanguageModel,
    data: TrainingData,
    supervisor: "Supervisor",
    choices: Mapping[str, str],
) -> Summary:
    """Write `summary.json` and return it.

    Its `validation` is of the last step: `validation["step"]` equals `steps`.
    """
    state, versions = supervisor.state, supervisor.provenance.versions
    course = course_of(config)
    steps, last = int(state.validation["step"]), course.parts[-1]
    tokens = course.tokens(steps)
    summary: Summary = {
        "name": config.name,
        "mixer": mixer_name(config, choices),
        "seq_len": last.config.seq_len,
        "parameters": model.parameter_counts(),
        "match": matched(config, model.parameter_counts()["total"]),
        "training_flops_per_token": mean_flops_per_token(model, course),
        "steps": steps,
        "tokens": tokens,
        "tokens_per_step": last.tokens_per_step,
        "training_seconds": state.training_seconds,
        "tokens_per_second": tokens / max(state.training_seconds, 1e-9),
        "peak_memory_bytes": state.peak_memory_bytes,
        "device": versions.get("gpu", "CPU"),
        "validation": state.validation,
        "validation_by_position": state.validation_by_position,
        "checkpoint": str(supervisor.store.latest()),
        "data_fingerprint": supervisor.provenance.data_fingerprint,
        "versions": versions,
    }
    if "packing" in (facts := data.summary()):
        summary["packing"] = facts["packing"]
    if config.loop.spike_sigma is not None or state.spikes:
        summary["spikes"] = state.spikes
    if state.transferred:
        summary["validation_transferred"] = state.transferred
    if course.staged:
        summary["stages"] = [
            {
                "seq_len": part.config.seq_len,
                "batch_size": part.config.batch_size,
                "steps": part.steps,
                "tokens_per_step": part.tokens_per_step,
                **state.stages.get(str(part.number), {}),
            }
            for part in course.parts
        ]
    replace_json(folder / SUMMARY_FILE, summary)
    return summary


def print_summary(summary: Summary, folder: Path, supervisor: "Supervisor", wall_seconds: float) -> None:
    """Print the main metrics of a run, the time of the command, and the paths of its files."""
    validation = summary["validation"]
    quality, value = quality_of(validation)
    other = "bits/byte unknown" if quality == "loss" else f"loss {validation['loss']:.4f}"
    rows = {
        "validation": f"{value:.4f} {QUALITIES[quality]}, {other}, "
        f"perplexity {validation['perplexity']:.3f} on {counted(int(validation['tokens']), 'token')}",
        "trained": f"{summary['tokens']:,} tokens in {duration(summary['training_seconds'])} "
        f"({summary['tokens_per_second']:,.0f} tokens/s); {duration(wall_seconds)} from start to end",
        "checkpoint": _shown(supervisor.store.latest()),
        "logs": _shown(folder),
    }
    if "ema_loss" in validation:
        averaged = validation[f"ema_{quality}"]
        rows["averaged"] = f"{averaged:.4f} {QUALITIES[quality]}, loss {validation['ema_loss']:.4f} (weights=ema)"
    command = supervisor.metric_log.upload_command()
    if command is not None:
        rows["upload"] = command
    _print(rows)


def _shown(path: Path | None) -> str:
    """`path` as the user would type it in the working folder."""
    if path is None:
        return "none"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _print(rows: dict[str, str]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, Text(text))  # names and paths may hold brackets, which are no markup
    console = Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH)
    with console.capture() as capture:
        console.print(table, highlight=False)
    text = capture.get()
    if not console.is_terminal:  # a log needs no blanks up to its right edge
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    sys.stderr.write(text)
    sys.stderr.flush()
