"""Gaussian features by landmarks: SOFT's kernel, as an inner product of features (Lu et al. 2021, arXiv 2110.11945).

With landmarks z_1 .. z_m of each head, A_ab = G(z_a, z_b), G(x, z) = exp(-|x - z|^2 / 2) and A + 0.01 I = L L^T,

    phi(x) = L^-1 (G(z_1, x), ..., G(z_m, x)),    phi(q) . phi(k) = G(q, Z) (A + 0.01 I)^-1 G(Z, k)

which is Nystroem's estimate of G(q, k). The authors invert A by Newton's iteration. Here it is factored, so that
queries and keys have features of their own and a causal state can hold sums of them.

Notable: features may be negative, so nothing divides by their sum; the head-wise norm stands in for it. Queries and
keys are brought to length sqrt(radius), on which landmarks begin too, in random directions: at unit variance and the
paper's scale the typical kernel of a random landmark is 0.009 for heads of 32 channels, and its features are dead.
"""

import torch
from torch import Tensor, nn

from longmix.mixers.parts.features import orthogonal_projections

RIDGE = 0.01
"""Added to the diagonal of the landmarks' kernel, as in the authors' code."""


class GaussianFeatures(nn.Module):
    """y [B, T, H, head_dim] -> phi(y) [B, T, H, landmarks], in float32 or better, also under autocast.

    Args:
        heads: each with its own landmarks, which are trained.
        head_dim: size of a query or key.
        landmarks: m.
        radius: squared length that queries, keys and the first landmarks have; None leaves them as they are.
        seed: of the first landmarks.
    """

    def __init__(self, heads: int, head_dim: int, landmarks: int, radius: float | None, seed: int = 0) -> None:
        super().__init__()
        self.radius = radius
        drawn = orthogonal_projections(heads, head_dim, landmarks, torch.Generator().manual_seed(seed))
        self.landmarks = nn.Parameter(_at_length(drawn.mT, 1.0 if radius is None else radius).contiguous())

    def whitening(self) -> Tensor:
        """L^-1 [H, m, m], in float32 or better."""
        with torch.autocast(self.landmarks.device.type, enabled=False):
            landmarks = self.landmarks.to(torch.promote_types(self.landmarks.dtype, torch.float32))
            kernel = _kernel(landmarks, landmarks)
            identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
            # The plain function would wait for a GPU to say whether it succeeded; with the ridge it does.
            factor = torch.linalg.cholesky_ex(kernel + RIDGE * identity).L
            return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)

    def forward(self, y: Tensor, whitening: Tensor) -> Tensor:
        """The features of `y`, given what `whitening` returns."""
        exact = torch.promote_types(y.dtype, torch.float32)
        with torch.autocast(y.device.type, enabled=False):
            y = y.to(exact)
            if self.radius is not None:
                y = _at_length(y, self.radius)
            kernel = _kernel(y.transpose(1, 2), self.landmarks.to(exact))
            return (kernel @ whitening.to(exact).mT).transpose(1, 2)

    def flops(self, length: int) -> int:
        """Floating-point operations of the features of `length` tokens; those of `whitening` are few."""
        heads, landmarks, head_dim = self.landmarks.shape
        return 2 * length * heads * landmarks * (head_dim + landmarks)


def _at_length(y: Tensor, radius: float) -> Tensor:
    return y * (radius / y.square().sum(-1, keepdim=True).clamp_min(1e-12)).sqrt()


def _kernel(x: Tensor, landmarks: Tensor) -> Tensor:
    """exp(-|x - z|^2 / 2) of x [..., H, N, d] and landmarks [H, m, d]: [..., H, N, m]."""
    along = x @ landmarks.mT
    lengths = x.square().sum(-1, keepdim=True) + landmarks.square().sum(-1).unsqueeze(-2)
    return (along - 0.5 * lengths).exp()
