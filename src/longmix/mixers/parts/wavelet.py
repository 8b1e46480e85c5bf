"""A causal wavelet transform without decimation: details of a sequence at several scales, which sum to it.

With a_0 = x and a_j[t] = (a_{j-1}[t] + a_{j-1}[t - 2^(j-1)]) / 2, zero before the document (the Haar filter "a trous"),
the details are a_{j-1} - a_j for j = 1 .. J, and the last average a_J. The response reaches 2^J - 1 tokens back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalWavelet(nn.Module):
    """Details of GELU(x), called as `ShortConvolution` is.

    Args:
        channels: number of channels.
        levels: J.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.channels, self.levels = channels, levels

    def forward(self, x: Tensor, before: Tensor, ids: Tensor | None) -> Tensor:
        """The details, from the finest, and the last average: [B, T, (levels + 1) C].

        Args:
            x: [B, T, C].
            before: [B, 2^levels - 1, C], the inputs before them.
            ids: integer [B, 2^levels - 1 + T], the documents of both; None if all are one.
        """
        average, found = F.gelu(torch.cat([before.to(x.dtype), x], 1)), []
        for level in range(self.levels):
            lag = 2**level
            earlier = average[:, :-lag]
            if ids is not None:
                earlier = earlier * (ids[:, lag:] == ids[:, :-lag]).unsqueeze(-1)
            coarser = 0.5 * (average + F.pad(earlier, (0, 0, lag, 0)))
            found.append(average - coarser)
            average = coarser
        return torch.cat([part[:, before.shape[1] :] for part in (*found, average)], -1)

    def flops(self, length: int) -> int:
        """Floating-point operations for `length` tokens: per channel and scale a sum and a difference."""
        return 2 * length * self.levels * self.channels
