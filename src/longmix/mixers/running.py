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
    """Base of what learns between optimizer steps from what forward passes showed it."""

    def apply_observed(self, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Learn from what was observed since the last time, if anything was, and forget it."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what was observed, as after a step that was left out."""
        raise NotImplementedError


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
        self._sum: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take [B, T, *shape] into account at the next update; in evaluation nothing is."""
        if not self.training:
            return
        total = x.detach().to(self.value.dtype).sum((0, 1))
        self._sum = total if self._sum is None else self._sum + total
        self._count += x.shape[0] * x.shape[1]

    @torch.no_grad()
    def apply_observed(self, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Move the value towards what was observed since the last time, if anything was."""
        if self._sum is not None:
            together = torch.cat([self._sum.flatten(), self._sum.new_tensor([float(self._count)])])
            together = sum_over_processes(together)
            mean = (together[:-1] / together[-1]).view_as(self.value)
            kept = torch.clamp(self.updates / (self.updates + 1), max=self.decay)
            self.value.lerp_(mean, 1 - kept)
            self.updates += 1
        self.forget()

    def forget(self) -> None:
        """Drop what was observed, as after a step that was left out."""
        self._sum, self._count = None, 0


def finish_step(model: nn.Module, taken: bool, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
    """Let a model's `Observed` modules learn after an optimizer step, or forget what a step left out had shown."""
    for module in model.modules():
        if isinstance(module, Observed):
            if taken:
                module.apply_observed(sum_over_processes)
            else:
                module.forget()
