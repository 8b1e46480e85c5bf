"""What a mixer takes of another one's weights.

Mixers of one class give each other everything that has the same name and shape. Those of other classes give what means
the same in all that have it, `Mixer.roles`: the projections to queries, keys, values and from the output, and the norms
of query and key heads. What has another shape is new, but for heads that fit:

- A projection with more heads has each head of the teacher several times, for grouped-query attention and for more
  value heads alike, and the output of r copies is divided by r.
- A wider head, as of a larger state, begins with the channels of the teacher's. The others are new in keys and values,
  and zero in queries and in the output, so that at first they change no score and no output.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

OUTPUT = "output.weight"
HEADS = ("query.weight", "key.weight", "value.weight", OUTPUT)
"""Projections that consist of heads."""


def shared_weights(
    mixer: nn.Module, teacher: nn.Module, roles: Sequence[str], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a mixer takes of another's weights; see the module.

    Args:
        mixer, teacher: the teacher may be without memory.
        roles: submodules that mean the same in both.
        weights: the teacher's, by name within it.
    """
    own, same = mixer.state_dict(), type(mixer) is type(teacher)
    names = [name for name in own if name in weights and (same or name.partition(".")[0] in roles)]
    found = {name: weights[name] for name in names if weights[name].shape == own[name].shape}
    for name in HEADS:
        widths = head_width(mixer, name), head_width(teacher, name)
        if name in names and name not in found:
            fitting = _fitting(own[name], weights[name], *widths, name)
            found |= {} if fitting is None else {name: fitting}
    return found


def head_width(mixer: nn.Module, name: str) -> int | None:
    """Channels of a head in a projection of `HEADS`; None of a mixer without heads."""
    kind = "key_dim" if name in ("query.weight", "key.weight") else "value_dim"
    width: int | None = getattr(mixer, "head_dim", None) or getattr(mixer, kind, None)
    return width


def _fitting(own: Tensor, theirs: Tensor, width: int | None, taught: int | None, name: str) -> Tensor | None:
    """The teacher's heads in the shape of a projection of more or wider ones; None if they do not fit.

    Args:
        own: [H * width, D], of the output [D, H * width].
        theirs: the same of the teacher, with heads of width `taught`.
        width, taught: see `head_width`.
        name: of the projection.
    """
    if width is None or taught is None or width < taught or own.ndim != theirs.ndim:
        return None
    if name == OUTPUT:
        own, theirs = own.T, theirs.T
    heads, rest = divmod(own.shape[0], width)
    known, more = divmod(theirs.shape[0], taught)
    if rest or more or not known or heads % known or own.shape[1:] != theirs.shape[1:]:
        return None
    copies = heads // known
    repeated = theirs.unflatten(0, (known, taught)).repeat_interleave(copies, 0)
    found = own.detach().clone().unflatten(0, (heads, width))
    if name in ("query.weight", OUTPUT):
        found[:, taught:] = 0
    found[:, :taught] = repeated / copies if name == OUTPUT else repeated
    found = found.flatten(0, 1)
    return found.T.contiguous() if name == OUTPUT else found
