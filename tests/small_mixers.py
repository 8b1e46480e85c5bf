"""Mixers of configs/mixer made so small that a few dozen tokens show what thousands do, as their classes say."""

from longmix.config import Plain, locate


def small_mixer(node: Plain, tokens: int) -> Plain:
    """A mixer's node, or a pattern of them, with `Mixer.sizes` at most `tokens` and the settings of `Mixer.small`.

    What is 0 or null stays so.
    """
    if "pattern" in node:
        return {name: part if name == "pattern" else small_mixer(part, tokens) for name, part in node.items()}
    kind = locate(node["_target_"], "mixer")
    sizes = {name: max(least, min(node[name], tokens)) for name, least in kind.sizes.items() if node.get(name)}
    return {**node, **sizes, **{name: value for name, value in kind.small.items() if node.get(name)}}
