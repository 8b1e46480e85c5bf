"""One key or value for a block of them, by a small network that knows where in the block each stands."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.recipe import Recipe, set_recipe


class BlockCompression(nn.Module):
    """A network of two layers over all tokens of a block together, the same for all heads and blocks.

    Args:
        head_dim: channels of a head.
        size: tokens of a block.
        hidden: channels between the layers.

    Attributes:
        products: the names of weights that nothing reads but products, which autocast rounds, as a linear layer's.
    """

    products: ClassVar = ("enter", "leave")

    def __init__(self, head_dim: int, size: int, hidden: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(size, head_dim))  # of a token in its block, which is added to it
        set_recipe(self.position, Recipe("scalar"))
        # No layers of their own, since what counts the weights of a step counts those of all linear layers.
        self.enter = nn.Parameter(torch.empty(hidden, size * head_dim))
        self.leave = nn.Parameter(torch.empty(head_dim, hidden))
        for weight in (self.enter, self.leave):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, blocks: Tensor) -> Tensor:
        """[B, N, size, H, head_dim] -> [B, N, H, head_dim]."""
        placed = blocks + self.position.to(blocks.dtype)[:, None]
        hidden = F.gelu(F.linear(placed.transpose(2, 3).flatten(3), self.enter))
        return F.linear(hidden, self.leave)

    def flops(self, blocks: int) -> int:
        """Operations for so many blocks of one head."""
        return 2 * blocks * (self.enter.numel() + self.leave.numel())
