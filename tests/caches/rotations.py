"""Rotary positions in float64, as fixtures have them, in terms of complex numbers."""

import torch
from torch import Tensor

from longmix.mixers.parts.rotary import Rotary


class Exact64(Rotary):
    """Rotation by float64 angles, as the fixtures have it."""

    def frequencies(self, device: torch.device) -> Tensor:
        return self.base ** -(torch.arange(0, self.channels, 2, dtype=torch.float64, device=device) / self.channels)


def turned(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    angle = positions[:, None].double() * rotary.frequencies(x.device)
    number = (
        torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.cat((number.real, number.imag), -1)
