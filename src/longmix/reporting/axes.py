"""Axes of the page's panels: where values stand, and which round numbers are told beside them."""

import math

UNITS = ((1e9, "G"), (1e6, "M"), (1e4, "k"))
"""From which size ticks are told in which unit; thousands from ten thousand on."""

MOST_TICKS = 9
"""On an axis that doubles."""


class Axis:
    """Maps values to pixels.

    Args:
        values: what has to fit.
        first, last: pixels of the smallest and the largest.
        log: the axis doubles; values must be above 0.
        from_zero: the smallest is 0.
    """

    def __init__(self, values: list[float], first: float, last: float, log: bool = False, from_zero: bool = False):
        self.log, self.first, self.last = log, first, last
        low, high = min(values), max(values)
        if log:
            self.low, self.high = math.log2(low), math.log2(high)
            self.ticks = doubling_ticks(values)
            margin = 0.03 * (self.high - self.low)
        elif from_zero and low >= 0:
            high = high or 1.0  # nothing was found: the axis is that of what might have been
            self.ticks = nice_ticks(0.0, high)
            step = self.ticks[1] - self.ticks[0]
            if self.ticks[-1] < high:
                self.ticks.append(self.ticks[-1] + step)
            self.low, self.high, margin = 0.0, self.ticks[-1], 0.0
        else:
            self.low, self.high = low, high
            self.ticks = nice_ticks(low, high)
            margin = 0.05 * (high - low)
        self.low, self.high = self.low - margin, self.high + margin
        if self.high == self.low:
            self.low, self.high = self.low - 1, self.high + 1

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        place = math.log2(value) if self.log else value
        return self.first + (place - self.low) / (self.high - self.low) * (self.last - self.first)


def doubling_ticks(values: list[float]) -> list[float]:
    """Powers of two among some values, at most `MOST_TICKS`; the values themselves where fewer than two lie there."""
    low, high = math.ceil(math.log2(min(values)) - 1e-9), math.floor(math.log2(max(values)) + 1e-9)
    powers = [2.0**power for power in range(low, high + 1)]
    if len(powers) < 2:
        own = sorted(set(values))
        return own[:: -(-len(own) // MOST_TICKS)]
    return powers[:: -(-len(powers) // MOST_TICKS)]


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(ticks: list[float]) -> list[str]:
    """Ticks in words, all in the same unit but for powers of two, which are 512, 1k, 2k."""
    if all(tick >= 1 and math.log2(tick).is_integer() for tick in ticks):
        return [f"{tick:g}" if tick < 1024 else f"{tick / 1024:g}k" for tick in ticks]
    largest = max(map(abs, ticks), default=0.0)
    size, letter = next(
        ((min(size, 1e3 if letter == "k" else size), letter) for size, letter in UNITS if largest >= size), (1.0, "")
    )
    return [f"{tick / size:,.10g}{letter if tick else ''}" for tick in ticks]
