"""Layers of a converted model that keep the teacher's mixer: the pattern over the layers that says so."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from longmix.config import Choice, Pattern
from longmix.config.choices import copied
from longmix.errors import ConfigError
from longmix.naming import mixer_word

PATTERN = "pattern"


def with_kept(new: Choice | Pattern, teacher: Choice | Pattern, layers: Collection[int], num_layers: int) -> Pattern:
    """The mixers of a model in which some layers keep the teacher's and all others have the new one.

    Args:
        new: one mixer.
        teacher: that of the model that is converted.
        layers: that keep theirs, from 0.
        num_layers: of the model.

    Raises:
        ConfigError: `new` is a pattern, or a layer keeps a mixer of the same name with other settings.
    """
    if isinstance(new, Pattern):
        raise ConfigError(
            f"keep= chooses the layers of mixer={'+'.join(new.order)} too; give one mixer, or leave keep out."
        )
    name = mixer_word(new.entries)
    entries: dict[str, Any] = {PATTERN: [name] * num_layers, name: copied(new.entries)}
    for layer in sorted(layers):
        kept, choice = _of_layer(teacher, layer)
        if entries.get(kept, choice.entries) != choice.entries:
            raise ConfigError(
                f"mixer={name}: the teacher's layers have that mixer too, with other settings; keep= needs a mixer of "
                "another kind."
            )
        entries[PATTERN][layer] = kept
        entries[kept] = copied(choice.entries)
    return Pattern.of(new.key, entries)


def with_kept_first(
    new: Choice | Pattern, keep: int | list[int], teacher: Choice | Pattern, num_layers: int
) -> Pattern:
    """`with_kept` of the layers that `keep` names, or of the first ones if it says how many.

    Raises:
        ConfigError: see `with_kept` and `check_layers`.
    """
    check_layers(keep, num_layers)
    return with_kept(new, teacher, range(keep) if isinstance(keep, int) else keep, num_layers)


def _of_layer(mixer: Choice | Pattern, layer: int) -> tuple[str, Choice]:
    """Name and choice of the mixer of a layer."""
    if isinstance(mixer, Choice):
        return mixer_word(mixer.entries), mixer
    name = mixer.order[layer % len(mixer.order)]
    return name, mixer.members[name]


def with_new(new: Choice | Pattern, converted: Choice | Pattern) -> Choice | Pattern:
    """The mixers of a model that was converted before, with the settings that a command gives the new one.

    Args:
        new: the mixer that the command names.
        converted: what `with_kept` returned then.
    """
    if isinstance(new, Pattern) or isinstance(converted, Choice):
        return new
    name = mixer_word(new.entries)
    if name not in converted.members:
        return new
    return Pattern.of(converted.key, {**converted.entries, name: copied(new.entries)})


def check_layers(keep: int | list[int], num_layers: int) -> None:
    """Refuse layers that are not there, or that leave none to convert.

    Raises:
        ConfigError: naming the word.
    """
    count = keep if isinstance(keep, int) else len(keep)
    if isinstance(keep, list):
        wrong = [layer for layer in keep if not 0 <= layer < num_layers]
        if wrong:
            raise ConfigError(f"keep={_written(keep)}: the layers are 0 to {num_layers - 1}, and {wrong[0]} is none.")
        if len(set(keep)) < len(keep):
            raise ConfigError(f"keep={_written(keep)} names a layer twice.")
    if count >= num_layers:
        raise ConfigError(
            f"keep={_written(keep)} keeps all of the model's {num_layers} layers, so that nothing is converted; keep "
            f"at most {num_layers - 1}."
        )


def _written(keep: int | list[int]) -> str:
    return str(keep).replace(" ", "")


def same_but_for_layers(one: object, other: object) -> bool:
    """Whether two mixers of files or commands are patterns with as many layers of each name, in whatever order."""
    orders = [mixer.get(PATTERN) if isinstance(mixer, Mapping) else None for mixer in (one, other)]
    if not all(isinstance(order, list) for order in orders):
        return False
    counts = [Counter(map(str, order or ())) for order in orders]
    return counts[0] == counts[1]
