"""The four commands that Hydra composes: each is a task, importable for launchers, and `run` calls it.

The tasks import what they need, as torch takes seconds to import and `-h` should not wait.
"""

from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig

from longmix import cli
from longmix.command_line.schema import configs_folder
from longmix.distributed.signals import resumable

cli.register()


@cli.entry_point
@resumable
def train(config: DictConfig) -> float | None:
    """Check the configuration, then train; the validation loss is what a sweep's search makes small."""
    from longmix.allocation import allocation_errors
    from longmix.training.run import train as run_training

    cure = "make seq_len, batch_size or the model smaller, or trainer.micro_batch_size."
    with allocation_errors("training", cure):
        return run_training(config).get("validation", {}).get("loss")


@cli.entry_point
def evaluate(config: DictConfig) -> None:
    """Rebuild the model from the checkpoint alone, or one after the other those of a sweep, then run the tasks."""
    from longmix.evaluation.run import evaluate_all

    evaluate_all(config)


@cli.entry_point
def generate(config: DictConfig) -> None:
    """Rebuild the model from the checkpoint alone, read the prompt, and write on; with `output` to a file."""
    from longmix.config import GenerateConfig, read
    from longmix.generation.answering import answer
    from longmix.generation.run import generate as write_on

    own = read(GenerateConfig, config)
    if own.output is None:
        write_on(config)
    else:
        answer(own)


@cli.entry_point
def prepare(config: DictConfig) -> None:
    """Tokenise every split that is not in the cache."""
    from longmix.data.prepare_run import prepare_splits
    from longmix.invocation import Invocation

    prepare_splits(config, Invocation.of_command())


TASKS: dict[str, Callable[[Any], Any]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "prepare": prepare,
}


def run(command: str) -> None:
    """Run a command with the words of `sys.argv`.

    Raises:
        SystemExit: with the exit code, where something was refused or failed.
    """
    cli.run(lambda: _main(command)(), command)


def _main(command: str) -> Callable[[], Any]:
    decorate = hydra.main(version_base="1.3", config_path=str(configs_folder()), config_name=command)
    return decorate(TASKS[command])
