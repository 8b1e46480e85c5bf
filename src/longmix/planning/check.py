"""`python -m longmix.planning.check`: the planner's error against the measured memory of training steps.

Every case is planned, and then trained for two steps by the code that trains, with tokens drawn at random. Measured is
the most that was held at once from building the model on: on a CUDA device what torch had allocated, on a CPU the sum
of all its allocations and releases, which the profiler notes. What a CUDA context takes counts for neither.
"""

import argparse
import dataclasses
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longmix.config import build
from longmix.errors import LongmixError
from longmix.planning.memory import GIB
from longmix.planning.plan import Planner
from longmix.planning.request import Request, read

CPU_SIZES = ("model=tiny", "model.num_layers=3", "seq_len=1024", "batch_size=2")
GPU_SIZES = ("model=125m", "seq_len=8192", "batch_size=2", "tokenizer=bpe", "tokenizer.vocab_size=32000")
VARIANTS = (
    ("mixer=flash", "optimizer=adamw"),
    ("mixer=flash", "trainer.micro_batch_size=1"),
    ("mixer=flash", "model.activation_checkpointing=block"),
    ("mixer=mlstm_tfla", "model.activation_checkpointing=block", "trainer.micro_batch_size=1"),
    ("mixer=sliding_window*2+mlstm_tfla",),
    ("mixer=flash", "seq_len=512", "model.tie_head=true"),
)
"""What is checked with one mixer; all mixers are checked with everything else at its default."""


LOST_SHARE = 0.01
"""Of the peak, how much may be left at the end: small things that are kept for the next call."""


@dataclass(frozen=True)
class Outcome:
    """Bytes of one case."""

    words: tuple[str, ...]
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Of what was predicted, relative to what was measured."""
        return self.predicted / self.measured - 1


def check(words: Sequence[str]) -> Outcome:
    """Plan a run of one process on this machine, train two steps of it, and compare.

    Args:
        words: as of a plan; the device is the CUDA device that there is, else the CPU.
    """
    on_gpu = torch.cuda.is_available()
    request = read([*words, *(() if on_gpu else ("gpu=cpu",))])
    predicted = Planner(request).plan().memory.total
    return Outcome(tuple(words), predicted, _on_gpu(request) if on_gpu else _on_cpu(request))


def _on_gpu(request: Request) -> int:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    two_steps(request)
    return torch.cuda.max_memory_allocated() - before


def _on_cpu(request: Request) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        two_steps(request)
        gc.collect()
    results = profiler.profiler.kineto_results
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    if abs(held) > LOST_SHARE * peak:  # all that was made has been freed, unless an event is missing
        raise RuntimeError(f"the profiler lost allocations: {held:,} bytes are left of at most {peak:,}; run it again")
    return peak


def two_steps(request: Request) -> None:
    """Train for two steps on random tokens; the first one makes the optimizer's state."""
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from longmix.data.loaders import Batch
    from longmix.model.build import build_model
    from longmix.training.module import TrainingModule
    from longmix.training.run import quieten

    quieten()
    node, rows = request.node, request.rows(request.choice)
    tokens = torch.randint(request.vocab_size, (rows, request.choice.seq_len))
    batch = Batch(tokens=tokens, targets=tokens, document_ids=torch.zeros_like(tokens, dtype=torch.int32))
    module = TrainingModule(
        build_model(node, request.vocab_size),
        lambda parameters: build(node["optimizer"], "optimizer", parameters=parameters),
        build(node["schedule"], "schedule"),
        total_steps=2,
        micro_batch_size=request.choice.micro_batch_size,
        gradient_clip=node["loop"]["gradient_clip"],
        skip_nonfinite=False,
    )
    trainer = Trainer(
        accelerator="cpu" if request.accelerator is None else "gpu",
        devices=1,
        precision=request.precision,
        max_steps=-1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_dataloaders=DataLoader([batch, batch], batch_size=None))  # type: ignore[arg-type]


def mixers() -> list[str]:
    """The names of all mixers."""
    from longmix.planning.request import configs

    return sorted(path.stem for path in (configs() / "mixer").glob("*.yaml"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all cases, print the table, write JSON, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m longmix.planning.check", description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="words of every case, as of a plan; for other sizes")
    parser.add_argument("--mixers", nargs="+", help="these mixers alone, and no variants")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    sizes = GPU_SIZES if torch.cuda.is_available() else CPU_SIZES
    cases = [(f"mixer={name}",) for name in options.mixers or mixers()]
    outcomes = []
    try:
        for case in [*cases, *(() if options.mixers else VARIANTS)]:
            outcomes.append(check([*sizes, *options.words, *case]))
            print(_line(outcomes[-1], case), flush=True)
        if options.output is not None:
            _write(options.output, outcomes)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _line(outcome: Outcome, case: Sequence[str]) -> str:
    sizes = f"{outcome.predicted / GIB:9.4f} GiB predicted {outcome.measured / GIB:9.4f} GiB measured"
    return f"{sizes} {outcome.error:+7.1%}  {' '.join(case)}"


def _write(path: Path, outcomes: list[Outcome]) -> None:
    from longmix.files import replace_json
    from longmix.training.run import versions

    records: list[dict[str, Any]] = [dataclasses.asdict(each) | {"error": each.error} for each in outcomes]
    replace_json(path, {"versions": versions(), "cases": records})


if __name__ == "__main__":
    sys.exit(main())
