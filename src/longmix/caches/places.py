"""Move keys and queries that are rotated already: their places in a cache are not their positions in the text."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from longmix.mixers.parts.rotary import Rotary


def moved(x: Tensor, before: Tensor, after: Tensor, rotary: "Rotary | None") -> Tensor:
    """Queries or keys as if their tokens stood elsewhere.

    The angles are those that a mixer rotates by, and their difference is exact, so that the result is that of one
    rotation by the new angle, up to one more rounding to the dtype of `x`.

    Args:
        x: [B, T, H, D], rotated for `before`.
        before, after: integer, broadcast over [B, T].
        rotary: the rotation; None for none, which moves nothing.
    """
    if rotary is None:
        return x
    frequencies = rotary.frequencies(x.device)
    exact = torch.promote_types(x.dtype, torch.float32)
    # the float32 products are those of `rotary_angles`; float64 holds their difference
    new, old = (place.to(frequencies.dtype)[..., None] * frequencies for place in (after, before))
    angle = (new.double() - old.double())[:, :, None]
    cosine, sine = angle.cos().to(exact), angle.sin().to(exact)
    first, second = x[..., : rotary.channels].to(exact).chunk(2, -1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)
    return turned if rotary.channels == x.shape[-1] else torch.cat((turned, x[..., rotary.channels :]), -1)
