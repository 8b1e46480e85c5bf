"""Everyday arithmetic in words, and how near an answer comes, as StreetMath judges it (Tseng et al. 2025).

Questions are ours: a basket, a discount, a tip, a tax, the price of one of several, a trip. Each is a function of seed
and number. Scoring is the authors': the first number after "Final answer:", else the first number of all; it is exact,
a good approximation within 20 %, mildly off within 60 %, else way off; without a number it is uncategorized.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LABELS = ("Exact math", "Good approximation", "Mildly off", "Way off", "Uncategorized")
GOOD, MILD = 0.2, 0.6
"""Largest relative errors of a good approximation and of an answer that is mildly off."""

EXACT = 1e-6
"""Largest absolute difference of an exact answer."""

_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_FINAL = re.compile(rf"final answer\s*:[^\d-]*({_NUMBER})", re.IGNORECASE)
_ANY = re.compile(_NUMBER)

GOODS = ("apples", "notebooks", "candles", "mugs", "lamps", "towels", "pens", "plants", "kites", "baskets")
PLACES = ("market", "corner shop", "bakery", "bookshop", "garden centre")


@dataclass(frozen=True)
class Question:
    """A question in words and its exact answer."""

    kind: str
    text: str
    exact: float


def number_in(text: str) -> float | None:
    """The number that an answer gives: after "Final answer:" if it says so, else the first; None without one."""
    found = _FINAL.search(text)
    written = found.group(1) if found else (first.group() if (first := _ANY.search(text)) else None)
    return None if written is None else float(written.replace(",", ""))


def label_of(number: float | None, exact: float) -> str:
    """One of `LABELS`."""
    if number is None:
        return LABELS[4]
    error = abs(number - exact)
    if error <= EXACT:
        return LABELS[0]
    relative = error / max(abs(exact), EXACT)
    return LABELS[1] if relative <= GOOD else LABELS[2] if relative <= MILD else LABELS[3]


def question(kind: str, seed: int, number: int) -> Question:
    """Question `number` of a kind, one of `KINDS`."""
    random = np.random.default_rng([seed, list(KINDS).index(kind), number])
    text, exact = KINDS[kind](random)
    return Question(kind, text, exact)


def _price(random: np.random.Generator, low: int, high: int) -> float:
    """Dollars and cents."""
    return int(random.integers(100 * low, 100 * high)) / 100


def _basket(random: np.random.Generator) -> tuple[str, float]:
    names = random.choice(GOODS, 3, replace=False)
    counts, prices = random.integers(2, 8, 3), [_price(random, 1, 20) for _ in range(3)]
    listed = [f"{count} {name} at ${price:.2f} each" for count, name, price in zip(counts, names, prices, strict=True)]
    total = sum(int(count) * round(100 * price) for count, price in zip(counts, prices, strict=True)) / 100
    return f"At the {random.choice(PLACES)} you buy {', '.join(listed)}. About how much do you pay in dollars?", total


def _discount(random: np.random.Generator) -> tuple[str, float]:
    price, off = _price(random, 20, 300), int(random.integers(1, 15)) * 5
    text = f"A coat costs ${price:.2f} and is sold at {off}% off. About how much does it cost then in dollars?"
    return text, price * (100 - off) / 100


def _tip(random: np.random.Generator) -> tuple[str, float]:
    bill, tip, people = _price(random, 30, 400), int(random.choice([10, 12, 15, 18, 20])), int(random.integers(2, 9))
    text = f"A dinner for {people} costs ${bill:.2f}. You add a tip of {tip}% and share the bill evenly."
    return f"{text} About how much does each pay in dollars?", bill * (100 + tip) / 100 / people


def _tax(random: np.random.Generator) -> tuple[str, float]:
    price, tenths = _price(random, 5, 900), int(random.integers(40, 101))
    text = f"The price on the tag is ${price:.2f}, and a tax of {tenths / 10:.1f}% is added at the till."
    return f"{text} About how much do you pay in dollars?", price * (1000 + tenths) / 1000


def _each(random: np.random.Generator) -> tuple[str, float]:
    count, price, name = int(random.integers(6, 49)), _price(random, 10, 200), random.choice(GOODS)
    return f"A box of {count} {name} costs ${price:.2f}. About how much does one cost in dollars?", price / count


def _trip(random: np.random.Generator) -> tuple[str, float]:
    miles, per_gallon, price = int(random.integers(80, 1500)), int(random.integers(18, 55)), _price(random, 2, 6)
    text = f"You drive {miles} miles in a car that goes {per_gallon} miles on a gallon, at ${price:.2f} a gallon."
    return f"{text} About how much do you pay for fuel in dollars?", miles / per_gallon * price


KINDS: dict[str, Callable[[np.random.Generator], tuple[str, float]]] = {
    "basket": _basket,
    "discount": _discount,
    "tip": _tip,
    "tax": _tax,
    "each": _each,
    "trip": _trip,
}
"""The kinds of questions, each with the function that makes text and exact answer of one."""


def prompt_of(asked: Question, shots: int, seed: int) -> str:
    """The text before the answer: `shots` other questions of the kind, answered to two digits, then this one.

    A model of text goes on from it, without a chat's frame.
    """
    others = (question(asked.kind, seed + 1, number) for number in range(shots))
    shown = [f"Question: {other.text}\nFinal answer: {_rounded(other.exact)}\n\n" for other in others]
    return "".join([*shown, f"Question: {asked.text}\nFinal answer:"])


def _rounded(value: float) -> str:
    """To two significant digits, as people say it: 0.64, 4.2, 380."""
    return f"{float(f'{value:.2g}'):.2f}".rstrip("0").rstrip(".")
