"""Variable tracking: which variable holds which value, through chains of assignments among noise."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from longmix.batch import IGNORE_INDEX
from longmix.data.synthetic.tasks import Example, require_at_least, require_room
from longmix.errors import ConfigError


@dataclass(frozen=True)
class VariableTracking:
    """Chains X1 = 12, X2 = X1, X3 = X2 ... scattered over noise, then a question (after RULER, arXiv 2404.06654).

    An assignment is three tokens: a mark, the variable, and the value or variable it takes. Those of all chains are
    mixed, each chain in its order; chains have values and variables of their own. As in RULER, noise has tokens of its
    own.

    Attributes:
        hops: assignments of a variable to a variable in each chain, which so has one variable more.
        chains: how many there are; all but the first are distractors where `question` is "variables".
        variables: names that the examples draw from.
        values: values that the examples draw from.
        noise: kinds of noise tokens.
        question: "value" asks for the value of every variable of all chains, in a random order; "variables" gives a
            value and asks for the variables that hold it, first to last, which is RULER's question.
    """

    hops: int = 2
    chains: int = 2
    variables: int = 64
    values: int = 64
    noise: int = 16
    question: Literal["value", "variables"] = "value"

    def __post_init__(self) -> None:
        require_at_least(
            hops=(self.hops, 0), chains=(self.chains, 1), values=(self.values, self.chains), noise=(self.noise, 1)
        )
        if self._assignments > self.variables:
            raise ConfigError(
                f"data.task.variables={self.variables} must be at least {self._assignments}, the names that "
                f"{self.chains} chains of {self.hops} hops take."
            )

    @property
    def vocab_size(self) -> int:
        """Tokens are below this: variables, values, noise, the mark of an assignment, and that of the question."""
        return self.variables + self.values + self.noise + 2

    @property
    def _assignments(self) -> int:
        return self.chains * (self.hops + 1)

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens."""
        asked = 1 + (self._assignments if self.question == "value" else self.hops + 1)
        count = self._assignments
        require_room(3 * count + asked, length, f"{count} assignments and the question")
        names = random.choice(self.variables, (self.chains, self.hops + 1), replace=False)
        values = self.variables + random.choice(self.values, self.chains, replace=False)
        assign, ask = self.vocab_size - 2, self.vocab_size - 1

        body = length - asked
        tokens = self.variables + self.values + random.integers(self.noise, size=length)
        starts = np.sort(random.choice(body - 2 * count, count, replace=False)) + 2 * np.arange(count)
        written = [0] * self.chains
        for start, chain in zip(
            starts, random.permutation(np.repeat(np.arange(self.chains), self.hops + 1)), strict=True
        ):
            hop = written[chain]
            source = names[chain, hop - 1] if hop else values[chain]
            tokens[start : start + 3] = assign, names[chain, hop], source
            written[chain] += 1

        targets = np.full(length, IGNORE_INDEX)
        tokens[body] = ask
        if self.question == "value":
            order = random.permutation(count)
            tokens[body + 1 :] = names.flatten()[order]
            targets[body + 1 :] = np.repeat(values, self.hops + 1)[order]
        else:
            tokens[body + 1], tokens[body + 2 :] = values[0], names[0, :-1]
            targets[body + 1 :] = names[0]
        return Example(tokens, targets)
