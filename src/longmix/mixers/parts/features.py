"""Positive features of queries and keys, as logarithms, whose inner products stand for the weights of far keys.

With y the query or key at the length at which exp(q . k) is to be estimated, and projections w_a of each key head,

    favor                log phi = +-w . y - |y|^2 / 2 - ln(m) / 2 for m / 2 random w: positive orthogonal features in
                         their symmetric form (FAVOR+, Choromanski et al. 2021, arXiv 2009.14794, lemma 1); unbiased
    learned_exponential  the same, and w is trained (after Hedgehog, Zhang et al. 2024, arXiv 2402.04347)
    taylor               phi = (1 + w . y + (w . y)^2 / 2) / sqrt(m), w trained: the second-order Taylor polynomial of
                         each exponential, which is positive; that of Based (Arora et al. 2024, arXiv 2402.18668) is of
                         exp(q . k), and its features are not
    elu                  phi = (elu(w . y) + 1) / sqrt(m), w trained (after Katharopoulos et al. 2020, arXiv 2006.16236)

All begin from one draw: blocks of orthogonal directions, each of the length of a normal vector. It comes from a
generator of its own, is saved with the model and never made again. Only `favor` estimates exp(q . k).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmix.errors import ConfigError

FEATURES = ("favor", "learned_exponential", "taylor", "elu")
SYMMETRIC = ("favor", "learned_exponential")
"""Kinds of features that use each projection with both signs."""


class FeatureMap(nn.Module):
    """y [B, T, H, head_dim] -> log phi(y) [B, T, H, num_features], in float32 or better, also under autocast.

    Args:
        kind: one of `FEATURES`.
        heads: key heads, each with its own projections; H is a multiple.
        head_dim: size of a query or key.
        num_features: m.
        seed: of the draw.

    Raises:
        ConfigError: an unknown kind, or a number of features that it does not have.
    """

    projections: Tensor

    def __init__(self, kind: str, heads: int, head_dim: int, num_features: int, seed: int) -> None:
        super().__init__()
        check_kind(kind)
        if num_features < 1 or (kind in SYMMETRIC and num_features % 2):
            wanted = "even, a projection and its opposite each, or 0" if kind in SYMMETRIC else "at least 0"
            raise ConfigError(f"mixer.num_features={num_features} must be {wanted}, which is no features at all.")
        self.kind, self.num_features = kind, num_features
        count = num_features // 2 if kind in SYMMETRIC else num_features
        drawn = orthogonal_projections(heads, head_dim, count, torch.Generator().manual_seed(seed))
        if kind == "favor":
            self.register_buffer("projections", drawn)
        else:
            self.projections = nn.Parameter(drawn)

    def forward(self, y: Tensor) -> Tensor:
        """The features of `y`, as the class says."""
        exact = torch.promote_types(y.dtype, torch.float32)
        with torch.autocast(y.device.type, enabled=False):
            y, projections = y.to(exact), self.projections.to(exact)
            grouped = y.unflatten(2, (projections.shape[0], -1))
            along = torch.einsum("bthgd,hdn->bthgn", grouped, projections).flatten(2, 3)
            logs = _LOG_FEATURES[self.kind](along, y)
        return logs - 0.5 * math.log(self.num_features)

    def flops(self, length: int, heads: int) -> int:
        """Floating-point operations for `length` tokens of so many heads."""
        return 2 * length * heads * self.projections[0].numel()


def check_kind(kind: str) -> None:
    """Refuse an unknown kind of features.

    Raises:
        ConfigError: it is none of `FEATURES`.
    """
    if kind not in FEATURES:
        raise ConfigError(f"mixer.features={kind} is unknown; use one of {', '.join(FEATURES)}.")


def _log_exponential(along: Tensor, y: Tensor) -> Tensor:
    return torch.cat((along, -along), -1) - 0.5 * y.square().sum(-1, keepdim=True)


def _log_taylor(along: Tensor, y: Tensor) -> Tensor:
    return (along + 0.5 * along.square()).log1p()


def _log_elu(along: Tensor, y: Tensor) -> Tensor:
    return torch.where(along > 0, F.relu(along).log1p(), along)


_LOG_FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "favor": _log_exponential,
    "learned_exponential": _log_exponential,
    "taylor": _log_taylor,
    "elu": _log_elu,
}


def orthogonal_projections(heads: int, head_dim: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw directions that are orthogonal, `head_dim` at a time, as long as normal vectors: [heads, head_dim, count].

    Each on its own is a normal vector, which is what makes features unbiased.
    """
    blocks = -(-count // head_dim)
    normal = torch.randn(heads, blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(normal)
    # Without the signs, directions would not be uniform on the sphere.
    basis = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    lengths = torch.randn(heads, blocks, head_dim, head_dim, generator=generator, dtype=torch.float64).norm(dim=-2)
    scaled = basis * lengths.unsqueeze(-2)
    return scaled.transpose(1, 2).flatten(2)[..., :count].float()


def predicted_error(radius: float, num_features: int) -> float:
    """Relative standard deviation of one estimate of exp(q . k) by `favor`, for q . k = 0 and |q|^2 = |k|^2 = radius.

    With z = q + k and independent projections, exp(w . z) averaged over both signs has the relative variance
    cosh(|z|^2) - 1, and m / 2 of them are averaged. Orthogonal ones do a little better.
    """
    return math.sqrt(2 * (math.cosh(2 * radius) - 1) / num_features)


def enough_features(radius: float) -> int:
    """How many features keep that error near 1 at most: exp(2 * radius)."""
    return math.ceil(math.exp(2 * radius))
