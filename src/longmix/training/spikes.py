"""Tells steps whose loss or gradient norm lies far above those before, as OLMo-core's SkipStepOptimizer does.

The window and the judgement stay on the device; the loop reads the answer where it asks whether the step is finite.
"""

import torch
from torch import Tensor

SPIKES = "spikes"
"""Entry of a checkpoint: the window, a list of losses and one of gradient norms, oldest first."""


class SpikeGuard:
    """The losses and gradient norms of the last steps, and whether another step's are spikes among them.

    Nothing is a spike until half the window is full. A spike enters the window too, so that a level that has changed
    for good is soon none.

    Args:
        sigma: how many standard deviations above the mean a spike begins.
        size: steps in the window.
        stops: a spike ends the run; else its step is left out.

    Attributes:
        window: float64 [2, up to `size`], losses and gradient norms, oldest first.
    """

    def __init__(self, sigma: float, size: int = 128, stops: bool = False) -> None:
        self.sigma, self.size, self.stops = sigma, size, stops
        self.window = torch.empty(2, 0, dtype=torch.float64)

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Whether a step is a spike, a bool on its device, which nothing waits for; false where it is not finite."""
        seen = torch.stack([loss, gradient_norm]).double()
        if self.window.shape[1] < max(2, self.size // 2):
            return torch.zeros((), dtype=torch.bool, device=seen.device)
        deviation, mean = torch.std_mean(self.window.to(seen.device), dim=1)
        return (seen - mean > self.sigma * deviation).any() & torch.isfinite(seen).all()

    def note(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """Add a step, which must be finite, to the window."""
        seen = torch.stack([loss, gradient_norm]).double()[:, None]
        self.window = torch.cat([self.window.to(seen.device), seen], dim=1)[:, -self.size :]

    def forget(self) -> None:
        """Empty the window, as where a stage begins with windows of another length."""
        self.window = self.window[:, :0]

    def describe(self, loss: Tensor, gradient_norm: Tensor) -> str:
        """Why a step is a spike, before it is added; waits for the device."""
        deviation, mean = torch.std_mean(self.window, dim=1)
        values = zip(("loss", "gradient norm"), (loss, gradient_norm), mean.tolist(), deviation.tolist(), strict=True)
        beyond = [
            f"a {name} of {value.item():.4g}, {_sigmas(value.item() - average, spread)} above the mean {average:.4g}"
            for name, value, average, spread in values
            if value.item() - average > self.sigma * spread
        ]
        return f"{' and '.join(beyond)} of the last {self.window.shape[1]} steps (loop.spike_sigma={self.sigma:g})"

    def restore(self, saved: list[list[float]]) -> None:
        """Continue with the window of a checkpoint."""
        self.window = torch.tensor(saved, dtype=torch.float64).reshape(2, -1)[:, -self.size :]


def _sigmas(distance: float, deviation: float) -> str:
    return f"{distance / deviation:.1f} standard deviations" if deviation > 0 else "standard deviations without number"
