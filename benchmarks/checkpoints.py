"""How long training waits for a checkpoint: `torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoints`.

A model with its AdamW state, divided over the processes by FSDP, is trained and saved in four ways: in one file or in a
file for each process, while training waits or in the background. Only the time until `save` returns is the training
loop's; in the background it is that of the copy. Files lie in a temporary folder under --out.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import results
from benchmarks.command import RESULTS, Parser, positive
from longmix.checkpoints import CheckpointStore
from longmix.checkpoints.saver import Saver
from longmix.checkpoints.whole import STATE_FILE
from longmix.distributed.agreement import Processes
from longmix.files import replace_text
from longmix.mixers.flash import Flash
from longmix.model.backbone import LanguageModel
from longmix.recipe import recipe_of, set_recipe
from longmix.training import strategies
from longmix.training.optimizers import adamw
from longmix.training.saved_state import named_state

WAYS = {
    "one file, waiting": (False, False),
    "shards, waiting": (True, False),
    "one file, in the background": (False, True),
    "shards, in the background": (True, True),
}
"""By name: whether sharded, and whether asynchronous."""

COLUMNS = {
    "way": "",
    "first": "first, blocked s",
    "blocked": "later, blocked s",
    "most": "most s",
    "committed": "committed after s",
    "step": "step s",
    "step_meanwhile": "meanwhile s",
    "megabytes": "MB",
}
FOOTNOTE = """\
blocked: until training goes on; median over the saves after the first, which also allocates what copies are kept in.
step, meanwhile: one step of training when nothing is written, and while it is."""


class Run:
    """A divided model that takes steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = LanguageModel(
            Flash,
            options.vocabulary,
            d_model=options.width,
            num_layers=options.layers,
            num_heads=options.width // 64,
            mlp_hidden=options.width * 8 // 3,
        )
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        recipes = {name: recipe_of(weight) for name, weight in self.model.named_parameters()}
        strategies.shard(self.model, init_device_mesh("cpu", (dist.get_world_size(),)))
        for name, weight in self.model.named_parameters():
            set_recipe(weight, recipes[name])
        self.optimizers = adamw(dict(self.model.named_parameters()), learning_rate=1e-4)
        self.tokens = torch.randint(options.vocabulary, (1, options.length + 1))

    def step(self) -> float:
        """One step; its seconds."""
        began = time.perf_counter()
        self.model(self.tokens[:, :-1], self.tokens[:, 1:]).token_losses.mean().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began

    def saved(self, way: str, folder: Path, options: argparse.Namespace) -> results.Record:
        """Numbers of one way of saving."""
        sharded, asynchronous = WAYS[way]
        processes = Processes(strategies.own_group())
        saver = Saver(CheckpointStore(folder / way), 1, processes, sharded=sharded, asynchronous=asynchronous)
        blocked, committed, meanwhile = [], [], []
        alone = [self.step() for _ in range(options.saves)]
        for number in range(options.saves + 1):
            dist.barrier()
            began = time.perf_counter()
            saver.save({"step": number, **named_state(self.model, self.optimizers)}, {})
            blocked.append(time.perf_counter() - began)
            while strategies.largest(int(saver.writing), torch.device("cpu")):
                meanwhile.append(self.step())
            saver.wait()
            committed.append(time.perf_counter() - began)
        checkpoint = saver.store.path(options.saves)
        paths = sorted(checkpoint.glob("__*")) if sharded else [checkpoint / STATE_FILE]
        sizes = [path.stat().st_size for path in paths]
        return {
            "way": way,
            "first": blocked[0],
            "blocked": statistics.median(blocked[1:]),
            "most": max(blocked[1:]),
            "committed": statistics.median(committed[1:]),
            "step": statistics.median(alone),
            "step_meanwhile": statistics.median(meanwhile) if meanwhile else None,
            "bytes": sizes,
            "megabytes": " + ".join(f"{size / 1e6:.1f}" for size in sizes),
        }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.checkpoints", description="How long training waits for a checkpoint.")
    add = parser.add_argument
    add("--width", type=positive(int), default=512, help="of the model, a multiple of 64")
    add("--layers", type=positive(int), default=8)
    add("--vocabulary", type=positive(int), default=8192)
    add("--length", type=positive(int), default=128, help="tokens of a step")
    add("--saves", type=positive(int), default=5, help="timed saves after the first")
    add("--out", type=Path, default=RESULTS, help="folder for JSON and table")
    options = parser.parse_args(arguments)
    if options.width % 64:
        parser.error(f"--width {options.width} is not allowed; allowed are multiples of 64")
    parser.make_folder(options.out)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; alone where nothing else started this process, else with those started beside it."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix=".checkpoints-", dir=options.out) as own:
        if "RANK" in os.environ:
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("gloo", init_method=f"file://{own}/meeting", rank=0, world_size=1)
        try:
            content = measure(options, Path(Processes(strategies.own_group()).first(lambda: own)))
            first = dist.get_rank() == 0
        finally:
            dist.destroy_process_group()
    if first:
        path = options.out / f"{results.file_stem('checkpoints', content['environment'])}.json"
        results.write_json(path, content)
        title = f"{content['parameters']:,} parameters with AdamW over {content['processes']} processes"
        text = "\n\n".join([title, results.text_table(content["results"], COLUMNS), FOOTNOTE]) + "\n"
        replace_text(path.with_suffix(".txt"), text)
        print(f"{text}\nwritten: {path}, .txt")
    return 0


def measure(options: argparse.Namespace, folder: Path) -> results.Record:
    """Numbers of all ways; all processes must call it."""
    run = Run(options)
    run.step()
    records = [run.saved(way, folder, options) for way in WAYS]
    dist.barrier()  # the folder goes when the first is done
    return {
        "benchmark": "checkpoints",
        "environment": results.environment(torch.device("cpu"), "fp32"),
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "parameters": run.parameters,
        "processes": dist.get_world_size(),
        "results": records,
    }


if __name__ == "__main__":
    sys.exit(main())
