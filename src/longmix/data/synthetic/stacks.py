"""Stacks: elements pushed onto many stacks and popped again, last in, first out."""

from dataclasses import dataclass

import numpy as np

from longmix.batch import IGNORE_INDEX
from longmix.data.synthetic.tasks import Example, require_at_least, require_room

TOKENS_OF_AN_OPERATION = 3


@dataclass(frozen=True)
class Stacks:
    """Pushes and pops on stacks that are told apart by their names (Kimi Team 2025, arXiv 2510.26692, section 5.1).

    An operation is three tokens: push or pop, the stack, the element. The element of a pop is to be predicted at its
    stack. While some stack has an element, one operation in two is a pop, of a stack drawn among those that have one.
    The paper has 64 stacks; it does not say how operations are written and drawn.

    Attributes:
        stacks: how many there are.
        elements: kinds of them.
    """

    stacks: int = 64
    elements: int = 64

    def __post_init__(self) -> None:
        require_at_least(stacks=(self.stacks, 1), elements=(self.elements, 2))

    @property
    def vocab_size(self) -> int:
        """Tokens are below this: elements, stacks, push, pop, and the blank."""
        return self.elements + self.stacks + 3

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One example of `length` tokens; up to two blanks stand before the first operation."""
        require_room(2 * TOKENS_OF_AN_OPERATION, length, "a push and a pop")
        push, pop, blank = self.vocab_size - 3, self.vocab_size - 2, self.vocab_size - 1
        tokens, targets = np.full(length, blank), np.full(length, IGNORE_INDEX)
        held: dict[int, list[int]] = {}
        for place in range(length % TOKENS_OF_AN_OPERATION, length, TOKENS_OF_AN_OPERATION):
            last = place + TOKENS_OF_AN_OPERATION == length
            if held and (last or random.integers(2)):
                stack = int(random.choice(list(held)))
                element, kind = held[stack].pop(), pop
                targets[place + 1] = element
                if not held[stack]:
                    del held[stack]
            else:
                stack, element, kind = int(random.integers(self.stacks)), int(random.integers(self.elements)), push
                held.setdefault(stack, []).append(element)
            tokens[place : place + TOKENS_OF_AN_OPERATION] = kind, self.elements + stack, element
        return Example(tokens, targets)
