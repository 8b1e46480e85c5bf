"""Classes that the tests name by `_target_`."""

from collections.abc import Sequence

from longmix.errors import ConfigError


class Part:
    """Speaks of itself as if it stood in its usual place."""

    usual_place = "data.part"

    def __init__(self, size: int = 1, inner: "Part | None" = None) -> None:
        if size < 1:
            raise ConfigError(f"data.part.size={size} must be at least 1; data.partly.size is another.")
        self.size, self.inner = size, inner


class Whole:
    """Holds parts in every way."""

    def __init__(
        self, one: Part | None = None, named: dict[str, Part] | None = None, several: Sequence[Part] = ()
    ) -> None:
        self.one, self.named, self.several = one, named, several
