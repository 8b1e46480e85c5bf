"""What mixes a few neighbouring tokens and crosses no document: the short convolution and the token shift.

The convolution is that of H3 (Fu et al. 2022, arXiv 2212.14052), the shift that of RWKV (Peng et al. 2023, arXiv
2305.13048).
"""

import torch
from torch import Tensor, nn

from longmix.errors import ConfigError
from longmix.recipe import Recipe, set_recipe


def token_shift(x: Tensor, before: Tensor, ids: Tensor | None) -> Tensor:
    """The token before each token, and zero before the first of a document.

    Args:
        x: [B, T, C].
        before: [B, 1, C], the input before them.
        ids: integer [B, 1 + T], the documents of both; None if all are one.

    Returns:
        [B, T, C].
    """
    if x.shape[1] > 1:
        return _lagged(torch.cat([before.to(x.dtype), x], 1), 1, x.shape[1], ids)
    lagged = before.to(x.dtype)
    return lagged if ids is None else lagged * (ids[:, 1:] == ids[:, :1]).unsqueeze(-1)


def _lagged(whole: Tensor, lag: int, length: int, ids: Tensor | None) -> Tensor:
    """What came `lag` tokens before each of the last `length` of `whole` [B, .., C]; zero in another document."""
    start = whole.shape[1] - length
    lagged = whole[:, start - lag : whole.shape[1] - lag]
    if ids is None:
        return lagged
    same = ids[:, start:] == ids[:, start - lag : ids.shape[1] - lag]
    return lagged * same.unsqueeze(-1)


def check_convolution(size: int) -> None:
    """Refuse what is neither no convolution, 0, nor one of several tokens.

    Raises:
        ConfigError: naming `mixer.convolution`.
    """
    if size < 0 or size == 1:
        raise ConfigError(f"mixer.convolution={size} must be 0, which is none, or at least 2 tokens.")


class ShortConvolution(nn.Module):
    """y_t = silu(sum over lags 0 .. size - 1 of w_lag * x_{t - lag}), as far back as the document goes.

    Args:
        channels: number of channels.
        size: tokens that are mixed, the current one included.
        bias: add one number per channel before the SiLU, zero at first.
    """

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.size = size
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
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
        whole = torch.cat([before.to(x.dtype), x], 1)
        if x.shape[1] == 1:
            total = self._of_last(whole, ids)
        else:
            total = x * self.weight[0].to(x.dtype)
            for lag in range(1, self.size):
                total = total + _lagged(whole, lag, x.shape[1], ids) * self.weight[lag].to(x.dtype)
        return nn.functional.silu(total if self.bias is None else total + self.bias.to(x.dtype))

    def _of_last(self, whole: Tensor, ids: Tensor | None) -> Tensor:
        """The sum over lags for the last of `whole` [B, size, C], in one product: [B, 1, C]."""
        weight = self.weight.to(whole.dtype).flip(0)
        weighted = whole * (weight if ids is None else weight * (ids == ids[:, -1:]).unsqueeze(-1))
        return weighted.sum(1, keepdim=True)

    def flops(self, length: int) -> int:
        """Floating-point operations for `length` tokens."""
        return 2 * length * self.weight.numel()
