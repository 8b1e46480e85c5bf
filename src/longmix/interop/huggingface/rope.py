"""Rotary positions as `rope_parameters` of transformers' `config.json`, there and back."""

from collections.abc import Mapping
from dataclasses import asdict
from math import log, nextafter
from typing import Any

from longmix.errors import ConfigError
from longmix.mixers.parts.rotary import Rotary
from longmix.mixers.parts.rotary_scaling import KINDS

THEIRS = {"original_length": "original_max_position_embeddings"}
"""Names in `rope_parameters` that differ from those of a scaling's attributes."""

_CURE = "use --as longmix, which holds any model."


def rope_of(rotary: Rotary | None, head_dim: int) -> dict[str, Any]:
    """The `rope_parameters` of Llama's family for a rotation.

    Raises:
        ConfigError: the family has no such positions.
    """
    if rotary is None:
        raise ConfigError(f"mixer.rotary_base=null cannot be said in Llama's family; {_CURE}")
    if rotary.scaling is None:
        partial = {} if rotary.channels == head_dim else {"partial_rotary_factor": _share(rotary.channels, head_dim)}
        return {"rope_type": "default", "rope_theta": rotary.base, **partial}
    settings = {THEIRS.get(name, name): value for name, value in asdict(rotary.scaling).items() if value is not None}
    return {"rope_type": rotary.scaling.kind, "rope_theta": rotary.base, **settings}


def positions_of(rotary: Rotary | None, head_dim: int) -> dict[str, Any]:
    """All of the mixer's settings that give a rotation, such as `rotary_base`."""
    scaling = None if rotary is None else rotary.scaling
    own = {} if scaling is None else asdict(scaling)
    factor, original_length = own.pop("factor", None), own.pop("original_length", None)
    return {
        "rotary_base": None if rotary is None else rotary.base,
        "rotary_fraction": 1.0 if rotary is None else _share(rotary.channels, head_dim),
        "rotary_scaling": None if scaling is None else scaling.kind,
        "rotary_factor": factor,
        "rotary_original_length": original_length,
        "rotary_options": {name: value for name, value in own.items() if value is not None} or None,
    }


def read_rope(rope: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """The mixer's settings for `rope_parameters`.

    Args:
        rope: as transformers hands them out.
        max_length: `max_position_embeddings`, which some settings follow if they are absent.

    Raises:
        ConfigError: a type that longmix lacks, or a setting of it.
    """
    kind = rope.get("rope_type", "default")
    found: dict[str, Any] = {"rotary_base": float(rope["rope_theta"])}
    if kind == "default":
        return found | {"rotary_fraction": float(rope.get("partial_rotary_factor", 1.0))}
    if kind not in KINDS:
        raise ConfigError(
            f"rope_parameters.rope_type={kind!r} in config.json: longmix has default, {', '.join(KINDS)} alone, so it "
            "cannot be imported."
        )
    given = {name: value for name, value in rope.items() if value is not None and name not in NOT_OF_A_SCALING}
    original = given.pop("original_max_position_embeddings", max_length)
    factor = float(given.pop("factor", max_length / original))
    mscale, all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if kind == "yarn" and mscale and all_dim:
        given.setdefault("attention_factor", _growth(factor, mscale) / _growth(factor, all_dim))
    found |= {"rotary_scaling": kind, "rotary_factor": factor, "rotary_options": given or None}
    return found if kind == "linear" else found | {"rotary_original_length": int(original)}


NOT_OF_A_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _share(channels: int, head_dim: int) -> float:
    """The fraction that rotates so many channels."""
    share = channels / head_dim
    return share if int(head_dim * share) == channels else nextafter(share, 1.0)


def _growth(factor: float, scale: float) -> float:
    """The attention factor for a part of the scores, as DeepSeek-V3's folders say it."""
    return 0.1 * scale * log(factor) + 1 if factor > 1 else 1.0
