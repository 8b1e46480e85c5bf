"""Words of commands that Hydra does not compose: what each takes, and the check of its values.

Nothing heavy is imported here.
"""

import re
from dataclasses import dataclass

from longmix.errors import ConfigError
from longmix.paths import check_file, check_path
from longmix.wording import did_you_mean, nearest


@dataclass(frozen=True)
class Argument:
    """A word of a command that Hydra does not compose.

    Attributes:
        name: as in `name=value`.
        meaning: one line.
        default: as the help shows it; "???" must be given.
        positional: may stand without its name too, in the order of the table.
        many: takes a list.
        switch: takes true or false.
        path: names a file or folder.
        file: names a file to write.
        choices: the values that are allowed; any where there are none.
        whole: its values are whole numbers, from the first to the second of these.
        pair: its values are two such numbers with a stroke between them.
        only: values of the command's first word that it goes with; any where there are none.
    """

    name: str
    meaning: str
    default: str = "null"
    positional: bool = False
    many: bool = False
    switch: bool = False
    path: bool = False
    file: bool = False
    choices: tuple[str, ...] = ()
    whole: tuple[int, int] | None = None
    pair: tuple[int, int] | None = None
    only: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """The description of this word in the help."""
        scope = f"of {', '.join(self.only)}: " if self.only else ""
        choices = f": {', '.join(self.choices)}" if self.choices else ""
        return f"{scope}{self.meaning}{choices}"

    def values(self, given: str) -> list[str]:
        """The values in `given`, which is the text behind the `=`.

        Raises:
            ConfigError: one of them is empty, not among `choices`, or no number where numbers are taken.
        """
        values = _listed(given) if self.many else [given]
        for value in values:
            self.check(value)
        return values

    def check(self, value: str) -> None:
        """Refuse a value that is not among `choices`, and an empty one, as an unset variable of the shell leaves it.

        Raises:
            ConfigError: with the nearest one that is.
        """
        allowed = ("true", "false") if self.switch else self.choices
        if allowed and value not in allowed:
            meant = did_you_mean(nearest(value, allowed))
            raise ConfigError(f"{self.name}={value} is not one of {', '.join(allowed)}.{meant}")
        if self.file:
            check_file(self.name, value)
        elif self.path:
            check_path(self.name, value, needed=self.default == "???")
        elif not value.strip():
            raise ConfigError(f"{self.name} is empty; was a variable of the shell not set? Give a value.")
        elif limits := self.whole or self.pair:
            self._check_numbers(value, *limits)

    def _check_numbers(self, value: str, least: int, most: int) -> None:
        """Refuse what is not of the form of `whole` or `pair`."""
        parts = value.split("/")
        fitting = len(parts) == (1 if self.whole else 2) and all(re.fullmatch("[0-9]{1,12}", part) for part in parts)
        if not fitting or not all(least <= int(part) <= most for part in parts):
            limits = f"from {least} to {most}"
            form = f"a whole number {limits}" if self.whole else f"two whole numbers {limits}, such as 64/128"
            raise ConfigError(f"{self.name}={value} must be {form}.")


def _listed(value: str) -> list[str]:
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return [part.strip() for part in inner.split(",")]
