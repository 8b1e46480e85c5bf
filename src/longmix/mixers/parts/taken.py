"""What a mixer takes of another one's weights.

Mixers of one class give each other everything that has the same name and shape. Those of other classes give what means
the same in all that have it, `Mixer.roles`: the projections to queries, keys, values and from the output, and the norms
of query and key heads. What has another shape is new, unless it is only that a projection has more heads, of the same
width: then each head of the other is repeated, for grouped-query attention and for more value heads alike, and the
output of r copies is divided by r.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


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
    width = getattr(mixer, "head_dim", None)
    if width is None or width != getattr(teacher, "head_dim", None):
        return found
    for name in ("query.weight", "key.weight", "value.weight"):
        if name in names and name not in found and (copies := _copies(own[name], weights[name], 0)):
            found[name] = weights[name].unflatten(0, (-1, width)).repeat_interleave(copies, 0).flatten(0, 1)
    name = "output.weight"
    if name in names and name not in found and (copies := _copies(own[name], weights[name], 1)):
        heads = weights[name].unflatten(1, (-1, width)).repeat_interleave(copies, 1)
        found[name] = heads.flatten(1, 2) / copies
    return found


def _copies(own: Tensor, theirs: Tensor, axis: int) -> int:
    """How often each head of the teacher stands along an axis; 0 if the shapes differ in another way."""
    if own.ndim != theirs.ndim or own.shape[axis] % theirs.shape[axis]:
        return 0
    rest = [size for place, size in enumerate(own.shape) if place != axis]
    others = [size for place, size in enumerate(theirs.shape) if place != axis]
    return own.shape[axis] // theirs.shape[axis] if rest == others else 0
