"""`python -m longmix.planning.check`: the planner's error against the measured memory of training steps.

Every case is planned, and then trained for two steps by the code that trains, with tokens drawn at random. Measured is
the most that was held at once from building the model on: on a CUDA device what torch had allocated, on a CPU the sum
of all its allocations and releases, which the profiler notes. What a CUDA context takes counts for neither.

A run of several processes is checked on a CPU, where each is measured, and the largest counts. What gloo's own threads
take for a message is not seen; all else is, to the byte (`longmix.planning.gloo_memory`).
"""

import argparse
import dataclasses
import gc
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longmix import startup
from longmix.distributed.ranks import local_environment
from longmix.errors import ConfigError, LongmixError
from longmix.files import check_replaceable, replace_json
from longmix.paths import check_file
from longmix.planning.arguments import Request, read
from longmix.planning.gloo_memory import note_all_frees
from longmix.planning.memory import GIB
from longmix.planning.plan import Planner
from longmix.wording import counted

CPU_SIZES = ("model=tiny", "model.num_layers=3", "seq_len=1024", "batch_size=2")
GPU_SIZES = ("model=125m", "seq_len=8192", "batch_size=2", "tokenizer=bpe", "tokenizer.vocab_size=32000")
VARIANTS = (
    ("mixer=flash", "optimizer=adamw"),
    ("mixer=flash", "trainer.micro_batch_size=1"),
    ("mixer=flash", "model.activation_checkpointing=block"),
    ("mixer=flash", "model.activation_checkpointing=selective"),
    ("mixer=mlstm_tfla", "model.activation_checkpointing=selective"),
    ("mixer=rwkv7", "model.activation_checkpointing=selective"),
    ("mixer=mlstm_tfla", "model.activation_checkpointing=block", "trainer.micro_batch_size=1"),
    ("mixer=sliding_window*2+mlstm_tfla",),
    ("mixer=flash", "seq_len=512", "model.tie_head=true"),
)
"""Cases that are checked with one mixer; every mixer is checked with all else at its default."""

TWO = ("trainer.devices=2", "trainer.accelerator=cpu")
DIVIDED = (
    ("mixer=flash", "trainer=ddp", *TWO),
    ("mixer=flash", "trainer=fsdp", *TWO),
    ("mixer=flash", "trainer=context_parallel", *TWO),
    ("mixer=mlstm_tfla", "trainer=fsdp", "trainer.context_parallel=2", *TWO),
)
"""Cases that are checked with two processes, on a CPU only."""

LOST_SHARE = 0.001
"""Share of the peak that may be left at the end: numbers kept for the next call."""


@dataclass(frozen=True)
class Outcome:
    """Predicted and measured bytes of one case."""

    words: tuple[str, ...]
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Error of the prediction relative to the measurement."""
        return self.predicted / self.measured - 1


def check(words: Sequence[str]) -> Outcome:
    """Plan a run on this machine, train two steps of it, and compare.

    Args:
        words: as of a plan; the device is the CUDA device that there is, else the CPU.

    Raises:
        ConfigError: several processes, and not on a CPU.
    """
    on_gpu = torch.cuda.is_available() and "trainer.accelerator=cpu" not in words
    request = read([*words, *(() if on_gpu else ("gpu=cpu",))])
    predicted = Planner(request).plan().memory.total
    if on_gpu and request.gpus > 1:
        raise ConfigError("several processes are checked on a CPU alone; add trainer.accelerator=cpu.")
    if on_gpu:
        return Outcome(tuple(words), predicted, _on_gpu(request))
    return Outcome(tuple(words), predicted, peak_on_cpu(request) if request.gpus == 1 else _in_processes(request))


def _on_gpu(request: Request) -> int:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    take_steps(request)
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(request: Request, steps: int = 2) -> int:
    """The most bytes that a run of this process on a CPU holds at once, its model included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take_steps(request, steps)
        gc.collect()
    results = profiler.profiler.kineto_results
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    if abs(held) > LOST_SHARE * peak:  # everything allocated was freed, unless the profiler lost an event
        raise RuntimeError(f"the profiler lost allocations: {held:,} bytes are left of at most {peak:,}")
    return peak


def _in_processes(request: Request) -> int:
    """Run several processes on this machine's CPU; returns the largest memory of any of them."""
    from torch import multiprocessing

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    peaks = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(_of_one, (request, port, peaks), request.gpus)
    return max(peaks.get() for _ in range(request.gpus))


def _of_one(rank: int, request: Request, port: int, peaks: Any) -> None:
    """Measure one process, which Lightning takes for one that torchrun started."""
    os.environ |= local_environment(rank, request.gpus, port) | {"TORCHELASTIC_RUN_ID": "check"}
    torch.set_num_threads(1)
    note_all_frees()
    peaks.put(peak_on_cpu(request))


def take_steps(request: Request, steps: int = 2) -> None:
    """Train for some steps on random tokens; the first one makes the optimizer's state."""
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from longmix.batch import Batch
    from longmix.config import ModelConfig, course_of
    from longmix.model.build import build_model
    from longmix.training.distillation import Distillation
    from longmix.training.hardware import TrainerSettings
    from longmix.training.module import TrainingModule
    from longmix.training.run import quieten, strategy_of

    quieten()
    config, variant, rows = request.config, request.variant, request.rows(request.variant)
    settings = TrainerSettings(
        accelerator="cpu" if request.accelerator is None else "gpu",
        devices=request.gpus,
        strategy=variant.strategy,
        context_parallel=variant.context_parallel,
        precision=request.precision,
    )
    torch.manual_seed(0)  # processes that share rows need equal ones
    tokens = torch.randint(request.vocab_size, (rows, variant.seq_len))
    # Rows that pack documents, as is planned for; rows of one document keep less on a CPU.
    ids = (torch.arange(variant.seq_len) >= variant.seq_len // 3).int().expand(rows, -1).contiguous()
    batch = Batch(tokens=tokens, targets=tokens, document_ids=ids)
    model, distillation = build_model(config, request.vocab_size), None
    if request.teacher is not None:
        teacher = build_model(ModelConfig(mixer=request.teacher, model=config.model), request.vocab_size)
        distillation = Distillation(model, teacher, course_of(config), 0)
    module = TrainingModule(
        model,
        lambda parameters: config.optimizer.build(parameters=parameters),
        config.schedule.build(),
        total_steps=steps,
        micro_batch_size=variant.micro_batch_size,
        gradient_clip=config.loop.gradient_clip,
        skip_nonfinite=False,
        slices=settings.slices,
        distillation=distillation,
    )
    trainer = Trainer(
        accelerator="gpu" if settings.on_gpu else "cpu",
        devices=settings.devices_here,
        strategy=strategy_of(settings),
        precision=settings.precision_in_use,
        use_distributed_sampler=False,
        max_steps=-1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_dataloaders=DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]


def mixers() -> list[str]:
    """The names of all mixers."""
    from longmix.command_line.schema import configs_folder

    return sorted(path.stem for path in (configs_folder() / "mixer").glob("*.yaml"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all cases, print the table, write each row to the JSON file at once, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m longmix.planning.check", description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="words of every case, as of a plan; for other sizes")
    parser.add_argument("--mixers", nargs="+", help="these mixers alone, and no variants")
    parser.add_argument("--output", help="a JSON file for the results")
    options = parser.parse_args(arguments)
    sizes = GPU_SIZES if torch.cuda.is_available() else CPU_SIZES
    cases = [(f"mixer={name}",) for name in options.mixers or mixers()]
    outcomes: list[Outcome] = []
    try:
        if options.output is not None:
            check_file("--output", options.output)
            check_replaceable(Path(options.output))
        divided = () if torch.cuda.is_available() else DIVIDED
        for case in [*cases, *(() if options.mixers else (*VARIANTS, *divided))]:
            outcomes.append(check([*sizes, *options.words, *case]))
            print(_line(outcomes[-1], case), flush=True)
            if options.output is not None:
                _write(Path(options.output), outcomes)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}{_kept(options.output, outcomes)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"Interrupted.{_kept(options.output, outcomes)}", file=sys.stderr)
        return startup.INTERRUPTED
    return 0


def _kept(path: str | None, outcomes: list[Outcome]) -> str:
    return f" {path} holds {counted(len(outcomes), 'case')}." if path is not None and outcomes else ""


def _line(outcome: Outcome, case: Sequence[str]) -> str:
    sizes = f"{outcome.predicted / GIB:9.4f} GiB predicted {outcome.measured / GIB:9.4f} GiB measured"
    return f"{sizes} {outcome.error:+7.1%}  {' '.join(case)}"


def _write(path: Path, outcomes: list[Outcome]) -> None:
    from longmix.versions import versions

    records: list[dict[str, Any]] = [dataclasses.asdict(each) | {"error": each.error} for each in outcomes]
    replace_json(path, {"versions": versions(), "cases": records})


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
