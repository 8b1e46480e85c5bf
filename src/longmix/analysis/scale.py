"""A scale model: the same mixers in a few layers, with sizes so small that a short row has something outside them.

A selection by ranks leaks what the later tokens have to say in it. The fewer these are, the more of that is about the
next one, so that training notices it at once in rows of 8 tokens and hardly in rows of 64; and a window that holds the
whole row selects nothing.
"""

import copy
import warnings

import torch

from longmix.config import Node, locate
from longmix.errors import ConfigError
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model


def scale_model(config: Node, length: int, vocab_size: int) -> LanguageModel:
    """A model with fresh weights for rows of `length` tokens, on the current default device.

    Args:
        config: a resolved training configuration. Windows and blocks of its mixers become a quarter of a row where they
            are longer, and of its layers two stay, or as many as its pattern of mixers has.
        length: tokens of a row.
        vocab_size: of the model.
    """
    small = copy.deepcopy(config)
    mixer, model = small["mixer"], small["model"]
    model["num_layers"] = min(model["num_layers"], max(2, len(mixer.get("pattern", ()))))
    for node in [mixer[name] for name in dict.fromkeys(mixer["pattern"])] if "pattern" in mixer else [mixer]:
        for name, least in sizes_of(node).items():
            _shrink(small, node, name, max(1, length // 4), least)
    with warnings.catch_warnings(action="ignore"):  # what there is to say was said of the model itself
        return build_model(small, vocab_size)


def sizes_of(node: Node) -> dict[str, int]:
    """The sizes that a mixer's node sets, of those that its class names in `Mixer.sizes`, and the least of each."""
    sizes: dict[str, int] = getattr(locate(node["_target_"], "mixer"), "sizes", {})
    return {name: least for name, least in sizes.items() if isinstance(node.get(name), int)}


def _shrink(config: Node, node: Node, name: str, most: int, least: int) -> None:
    """Set a size to at most `most`, or to the least that its mixer takes."""
    before = node[name]
    for size in (most, least, before):
        node[name] = min(before, size)
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                build_model(config, 1)
        except ConfigError:
            continue
        return
