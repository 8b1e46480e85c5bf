"""Short causal convolution of each channel (as in H3, Fu et al. 2022, arXiv 2212.14052), which crosses no document."""

import torch
from torch import Tensor, nn

from longmix.recipe import Recipe, set_recipe


class ShortConvolution(nn.Module):
    """y_t = silu(sum over lags 0 .. size - 1 of w_lag * x_{t - lag}), as far back as the document goes.

    Args:
        channels: number of channels.
        size: tokens that are mixed, the current one included.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(size, channels))
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)
        set_recipe(self.weight, Recipe("scalar", weight_decay=False))

    def forward(self, x: Tensor, before: Tensor, ids: Tensor | None) -> Tensor:
        """Mix.

        Args:
            x: [B, T, C].
            before: [B, size - 1, C], the inputs before them.
            ids: integer [B, size - 1 + T], the documents of both; None if all are one.

        Returns:
            [B, T, C].
        """
        length, past = x.shape[1], self.size - 1
        whole = torch.cat([before.to(x.dtype), x], 1)
        total = x * self.weight[0].to(x.dtype)
        for lag in range(1, self.size):
            lagged = whole[:, past - lag : past - lag + length]
            if ids is not None:
                same = ids[:, past:] == ids[:, past - lag : past - lag + length]
                lagged = lagged * same.unsqueeze(-1)
            total = total + lagged * self.weight[lag].to(x.dtype)
        return nn.functional.silu(total)

    def flops(self, length: int) -> int:
        """Floating-point operations for `length` tokens."""
        return 2 * length * self.weight.numel()
