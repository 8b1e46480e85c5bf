"""State tuning of a recurrent mixer: it trains the state before each document, and a memory with more features.

    state    S_0, which the recurrence goes on from; the layer is affine in it
    memory   y_t += M^T R phi(q_t),   phi_m(q) = exp(sqrt(K) (u_m . q / |q| - 1)),   R <- R - eta (C - diag C) R

The memory is after the "kernel upscaling" and "decorrelated backpropagation" of arXiv 2504.05097: M holds more features
than a head has keys, the rest of the model stays as it is, and R keeps the features uncorrelated, C being the mean of
their outer products over the tokens of a step. Unlike a state it does not decay. That paper's claims for it are not
verified here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.mixers.parts.between_steps import Observed, counted, mean_of
from longmix.recipe import Recipe, set_recipe


class TunedState(nn.Module):
    """The parameters that state tuning trains in one mixer, all zero at first.

    Args:
        initial: the engine's state before a document by name, [H, ...], of which shapes and dtypes are taken.
        features: size of the memory; 0 for none.
        decorrelation: eta; 0 leaves features as they are.
    """

    def __init__(self, initial: dict[str, Tensor], features: int = 0, decorrelation: float = 0.0) -> None:
        super().__init__()
        self.initial = nn.ParameterDict({name: torch.zeros_like(part) for name, part in initial.items()})
        self.memory = FeatureMemory(initial["memory"], features, decorrelation) if features else None
        for parameter in self.parameters():
            set_recipe(parameter, Recipe("scalar", weight_decay=False))


class FeatureMemory(Observed):
    """A trained memory before documents that is read through kernel features.

    Args:
        like: [H, K, V], whose sizes and dtype are taken.
        features: how many there are.
        decorrelation: eta.
    """

    supports: Tensor
    whitening: Tensor

    def __init__(self, like: Tensor, features: int, decorrelation: float) -> None:
        super().__init__(frozen=not decorrelation)
        heads, key_dim, value_dim = like.shape
        drawn = torch.randn(heads, features, key_dim, generator=torch.Generator().manual_seed(0))
        self.decorrelation = decorrelation
        self.content = nn.Parameter(like.new_zeros(heads, features, value_dim))
        self.register_buffer("supports", F.normalize(drawn, dim=-1).to(like))
        self.register_buffer("whitening", torch.eye(features).expand(heads, -1, -1).contiguous().to(like))

    def forward(self, query: Tensor) -> Tensor:
        """The read [B, T, H, V] for `query` [B, T, H, K], in float32 or better."""
        with torch.autocast(query.device.type, enabled=False):
            direction = F.normalize(query.to(self.supports.dtype), dim=-1)
            nearness = torch.einsum("bthk,hmk->bthm", direction, self.supports) - 1
            features = (math.sqrt(query.shape[-1]) * nearness).exp()
            whitened = torch.einsum("bthm,hnm->bthn", features, self.whitening)
            self.observe(whitened)
            return torch.einsum("bthm,hmv->bthv", whitened, self.content)

    def summed(self, features: Tensor) -> Tensor:
        """Outer products of features [B, T, H, M] with themselves."""
        total = torch.einsum("bthm,bthn->hmn", features, features)
        return counted(total, features.shape[0] * features.shape[1])

    def learn(self, together: Tensor) -> None:
        """Decorrelate the features by the step in the module's head."""
        mean = mean_of(together, self.whitening)
        crossed = mean - torch.diag_embed(mean.diagonal(dim1=-2, dim2=-1))
        self.whitening -= self.decorrelation * crossed @ self.whitening
