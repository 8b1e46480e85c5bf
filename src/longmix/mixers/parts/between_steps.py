"""Statistics that mixers gather while they train: observed in the forward pass, applied after the optimizer step.

Between two optimizer steps the value does not move, so recomputing a forward pass for activation checkpointing, or
evaluating, sees what the first pass saw. A recomputed pass observes everything a second time, which leaves a mean as it
was. The value is a persistent buffer: saved, restored, and equal in all processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longmix.errors import ConfigError


class Observed(nn.Module):
    """Base of modules that observe forward passes and learn between optimizer steps.

    A subclass says in `summed` which sums of what it is shown it learns from, as one tensor, and in `learn` how. In
    between, sums of several passes and processes are added up.

    Args:
        frozen: never learn.
    """

    summed: Callable[..., Tensor]

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.frozen = frozen
        self._seen: Tensor | None = None

    @torch.no_grad()
    def observe(self, *shown: Tensor) -> None:
        """Add what `summed` makes of the arguments to the next update. In evaluation nothing is added."""
        if not self.training or self.frozen:
            return
        # A sum every time, so that a recomputed pass runs the operators of the first one.
        self._seen = self.summed(*shown) + (0 if self._seen is None else self._seen)

    @torch.no_grad()
    def apply_observed(self, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Learn from all observations since the last update, then forget them."""
        if self._seen is not None:
            self.learn(sum_over_processes(self._seen))
        self.forget()

    def forget(self) -> None:
        """Drop all observations, as after a step that was left out."""
        self._seen = None

    def learn(self, together: Tensor) -> None:
        """Learn from the sums over all passes of a step and all processes."""
        raise NotImplementedError


def counted(total: Tensor, count: int) -> Tensor:
    """A flat sum and the number of its terms, from which a mean over all passes and processes follows."""
    return torch.nn.functional.pad(total.flatten(), (0, 1), value=count)


def mean_of(together: Tensor, like: Tensor) -> Tensor:
    """The mean of added `counted` sums, in the shape of `like`."""
    return (together[:-1] / together[-1]).view_as(like)


class RunningMean(Observed):
    """Exponential moving average, over optimizer steps, of the mean over tokens.

    Args:
        shape: of the value.
        decay: share of the old value that an update keeps, in [0, 1); the first updates weigh equally instead.

    Raises:
        ConfigError: a decay outside [0, 1).
    """

    value: Tensor
    updates: Tensor

    def __init__(self, shape: tuple[int, ...], decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of a running mean is {decay}; it must be from 0 to below 1.")
        self.decay = decay
        self.register_buffer("value", torch.zeros(shape))
        self.register_buffer("updates", torch.zeros(()))

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the tokens of `x` [B, T, *shape], and their number."""
        return counted(x.detach().sum((0, 1), dtype=self.value.dtype), x.shape[0] * x.shape[1])

    def learn(self, together: Tensor) -> None:
        """Move the value towards the mean of the observations."""
        kept = torch.clamp(self.updates / (self.updates + 1), max=self.decay)
        self.value.lerp_(mean_of(together, self.value), 1 - kept)
        self.updates += 1


def finish_step(model: nn.Module, taken: bool, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
    """After an optimizer step, let a model's `Observed` modules learn; after a step left out, let them forget."""
    for module in model.modules():
        if isinstance(module, Observed):
            if taken:
                module.apply_observed(sum_over_processes)
            else:
                module.forget()
