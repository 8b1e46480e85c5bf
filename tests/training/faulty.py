"""`train.py` in several processes of which one meets a fault, for real: killed, stopped, NaN, or without disk space.

`python faulty.py WORDS...` runs train.py in this process; so does each process that `launched.start` forks. Whether and
when something happens is said in the environment: FAULT="kill:1" is for the process of rank 1. Nothing of longmix is
replaced but for the training step whose end or beginning is the moment.
"""

import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train.py"
STEP = 5
"""The fault comes once so many steps are taken; with a checkpoint every 3 steps the last one is of step 3."""


def at(step: int, action: Callable) -> None:
    """Call `action(module)` when `step` steps are taken and the next begins."""
    from longmix.training.module import TrainingModule

    original = TrainingModule.training_step

    def training_step(self, batch, batch_idx):
        if self.step == step:
            action(self)
        original(self, batch, batch_idx)

    TrainingModule.training_step = training_step


def end_with(number: signal.Signals) -> None:
    at(STEP, lambda _: os.kill(os.getpid(), number))


def stopped_in_a_step() -> None:
    """The others wait for it wherever they exchange next: for gradients, weights or parts of a row."""

    def stop(module) -> None:
        module.model.blocks[0].mlp.down.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGSTOP))

    at(STEP, stop)


def kill_first_attempt() -> None:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        end_with(signal.SIGKILL)


def full_disk() -> None:
    # past this size every write fails with an OSError, as it does on a full disk
    at(STEP, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))


def nan_output() -> None:
    """In one step, and again when that step is looked into, a layer's output is NaN."""

    def spoil(module) -> None:
        def hook(_layer, _inputs, output):
            return output * float("nan") if module.step == STEP else output

        module.model.blocks[0].mlp.down.register_forward_hook(hook)

    at(STEP, spoil)


def nan_gradient() -> None:
    """Likewise for the gradient that a layer gets, with finite outputs."""

    def spoil(module) -> None:
        def hook(_layer, _inputs, output):
            if module.step == STEP:
                output.register_hook(lambda gradient: gradient * float("nan"))

        module.model.blocks[0].mlp.down.register_forward_hook(hook)

    at(STEP, spoil)


def before_the_data(number: signal.Signals) -> None:
    from longmix.data.text_data import TokenData

    TokenData.prepare_data = lambda self: os.kill(os.getpid(), number)


def inf_state() -> None:
    """An optimizer's value is infinite in a way that no loss shows: the weight stays as it is."""

    def spoil(module) -> None:
        for optimizer in module.trainer.optimizers:
            for state in optimizer.state.values():
                state["exp_avg_sq"].view(-1)[0] = float("inf")

    at(STEP, spoil)


def signalled_in_the_last_validation() -> None:
    """SIGTERM behind the first batch of it."""
    from longmix.distributed.signals import process_watch
    from longmix.training.supervisor import Supervisor

    original = Supervisor.validate

    def validate(self, trainer, module):
        if module.step == module.total_steps:
            ask, asked = process_watch().anywhere, []

            def anywhere(device):
                asked.append(True)
                if len(asked) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                print(f"asked {len(asked)}", flush=True)
                return ask(device)

            process_watch().anywhere = anywhere
        return original(self, trainer, module)

    Supervisor.validate = validate


def handler_before() -> None:
    """Someone has SIGUSR2 before the run, as submitit does; the run is told to end by it."""

    def requeue(number, _frame):
        saved = sorted(path.name for path in Path().glob("runs/*/checkpoints/step-*"))
        print(f"handed on {signal.Signals(number).name} with {saved}", flush=True)

    signal.signal(signal.SIGUSR2, requeue)
    if os.environ["RANK"] == "0":
        end_with(signal.SIGUSR2)


def kill_in_the_configuration() -> None:
    """Half of `config.yaml` is written."""
    original = Path.write_text

    def write_text(self, text, *arguments, **options):
        if "config.yaml" not in self.name:
            return original(self, text, *arguments, **options)
        original(self, text[: len(text) // 2], *arguments, **options)
        return os.kill(os.getpid(), signal.SIGKILL)

    Path.write_text = write_text


FAULTS = {
    "kill-in-the-configuration": kill_in_the_configuration,
    "kill": lambda: end_with(signal.SIGKILL),
    "kill-once": kill_first_attempt,
    "stop": stopped_in_a_step,
    "sigusr1": lambda: end_with(signal.SIGUSR1),
    "sigusr2": handler_before,
    "nan-output": nan_output,
    "nan-gradient": nan_gradient,
    "inf-state": inf_state,
    "signalled-in-the-last-validation": signalled_in_the_last_validation,
    "signalled-in-the-data": lambda: before_the_data(signal.SIGTERM),
    "full-disk": full_disk,
}


def print_weights_at_the_end() -> None:
    """A number that two processes print alike if all their weights are the same bits."""
    import torch

    from longmix.training.module import TrainingModule

    def on_train_end(self) -> None:
        weights = torch.cat([weight.detach().flatten().view(torch.int32) for weight in self.model.parameters()])
        print(f"weights {int((weights.long() * torch.arange(1, len(weights) + 1)).sum())}", flush=True)

    if "FAULT" in os.environ:
        TrainingModule.on_train_end = on_train_end


def run_train(words: list[str]) -> None:
    """train.py, with the fault if it is this process's."""
    from longmix.distributed.ranks import own_ranks, process_rank

    fault, _, rank = os.environ.get("FAULT", "").partition(":")
    if fault and own_ranks() is not None and rank in (str(process_rank()), "all"):
        FAULTS[fault]()
    print_weights_at_the_end()
    sys.argv = [sys.argv[0], *words]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    run_train(sys.argv[1:])
