"""The cost of a whole generation, and of right answers (Sadhukhan et al. 2025, Kinetics, arXiv 2506.05333).

    eFLOP(c, T, n) = sum over t < T of FLOP(c + t) + I * bytes(c + t), for n samples after a prompt of c tokens

All sums are exact, from the mixers' own counts; a limit, as of a window or a budget, is a min within the sum. The paper
counts alike, with integrals for sums. It reads the keys of the prompt once for all samples with dense attention, and
for each sample with sparse attention, whose choices differ; so do `Mixer.shared_bytes` here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longmix.analysis.cost_model import Cost, branches, first_context, read_weights
from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.projections import weight_count
from longmix.model.backbone import LanguageModel


class LayerCache(Protocol):
    """What is counted of the cache of one layer, in the place of all keys and values.

    It may have two methods more, which `CountedCache` calls where they are there: `seen_keys(length)`, how many keys
    the token after `length` others is scored with, its own among them, or else all; and `shared_bytes(prompt, steps)`,
    as `Mixer.shared_bytes`, or else nothing.
    """

    def bytes(self, length: int) -> int:
        """Bytes held of a row of `length` tokens."""

    def step_bytes(self, length: int) -> int:
        """Bytes that decoding one token after `length` others reads and writes."""


@dataclass(frozen=True)
class GenerationCost(Cost):
    """Cost of `samples` generations of `new` tokens after the same `prompt` tokens, the prompt's own pass left out.

    `weight_bytes` are of one of the prompts whose samples are decoded together, `held_bytes` of all samples at the end,
    with what they share of the prompt once.
    """

    prompt: int
    new: int
    samples: int


def generation_cost(
    model: LanguageModel,
    prompt: int,
    new: int,
    samples: int = 1,
    cache: LayerCache | None = None,
    *,
    batch: int = 1,
    shared_prompt: bool = True,
) -> GenerationCost:
    """Cost of `samples` generations of `new` tokens, from the model's own counts; in the dtype of its weights.

    Args:
        model: on any device, the meta device included.
        prompt: tokens before the first that is generated.
        new: tokens of each sample.
        samples: how many go on from the prompt, decoded side by side.
        cache: of each layer of `mixer=flash`, in the place of all its keys and values.
        batch: prompts whose samples are decoded together and so share the reading of weights.
        shared_prompt: samples read together what they share of the prompt, and hold it once.

    Raises:
        ConfigError: no layer of the model takes the cache.
    """
    counted = _counted(model, cache)
    weights = weight_count(model.modules())
    spared = sum(part.spared_flops(prompt, new) for part in counted if isinstance(part, CountedCache))
    mixing = model.flops(prompt + new) - model.flops(prompt) - 2 * weights * new - spared
    alone = sum(part.decoding_bytes(prompt, new) for part in counted)
    held = sum(part.state_bytes(prompt + new) for part in counted)
    others = samples - 1 if shared_prompt else 0
    read_before, read_after = (_shared(counted, prompt, steps) if others else 0 for steps in (new, new + 1))
    return GenerationCost(
        prompt,
        new,
        samples,
        parameter_flops=2 * weights * new * samples,
        mixing_flops=mixing * samples,
        weight_bytes=read_weights(model) * new / batch,
        state_bytes=alone * samples - read_before * others,
        held_bytes=held * samples - (read_after - read_before) * others,  # held is what the next step would read
    )


class CountedCache:
    """The counts of a layer of `mixer=flash` with a cache, by the names of `Mixer`.

    Args:
        mixer: the layer's.
        cache: its cache.
    """

    def __init__(self, mixer: Flash, cache: LayerCache) -> None:
        self.mixer, self.cache = mixer, cache
        self.optional: Any = cache

    def state_bytes(self, length: int) -> int:
        """Bytes held after `length` tokens."""
        return self.cache.bytes(length) + self.mixer.carried_bytes()

    def decoding_bytes(self, length: int, steps: int) -> int:
        """Bytes that `steps` tokens after `length` others read and write."""
        read = sum(self.cache.step_bytes(length + step) for step in range(steps))
        return read + steps * self.mixer.carried_bytes()

    def shared_bytes(self, prompt: int, steps: int) -> int:
        """See `Mixer.shared_bytes`."""
        return int(self.optional.shared_bytes(prompt, steps)) if hasattr(self.cache, "shared_bytes") else 0

    def spared_flops(self, length: int, steps: int) -> int:
        """Operations of the pairs that the mixer alone would compute, and with the cache does not."""
        if not hasattr(self.cache, "seen_keys"):
            return 0
        every = self.mixer.visible_pairs(length + steps) - self.mixer.visible_pairs(length)
        seen = sum(self.optional.seen_keys(length + step) for step in range(steps))
        return self.mixer.pair_flops() * (every - int(seen))


def _counted(model: LanguageModel, cache: LayerCache | None) -> list[Mixer | CountedCache]:
    parts = branches(model)
    if cache is None:
        return [*parts]
    if not any(isinstance(part, Flash) for part in parts):
        names = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in model.mixers()))
        raise ConfigError(f"no layer takes a cache: caches are for mixer=flash, and the layers are of {names}.")
    return [CountedCache(part, cache) if isinstance(part, Flash) else part for part in parts]


def _shared(parts: Iterable[Mixer | CountedCache], prompt: int, steps: int) -> int:
    return sum(part.shared_bytes(prompt, steps) for part in parts)


def break_even(contexts: Sequence[int], is_cheaper: Callable[[int], bool]) -> int | None:
    """The first context from which on something is cheaper, up to the last of these; None if it is not so there.

    Args:
        contexts: ascending, each looked at. The context is found by halving between the two around it, as if it were
            the only one there where the answer changes.
        is_cheaper: of a context.
    """
    last = first_context(contexts, [is_cheaper(context) for context in contexts])
    if last is None:
        return None
    place = contexts.index(last)
    dearer, cheaper = contexts[place - 1] if place else 0, last
    while cheaper - dearer > 1:
        middle = (dearer + cheaper) // 2
        dearer, cheaper = (dearer, middle) if is_cheaper(middle) else (middle, cheaper)
    return cheaper


def coverage(correct: Sequence[int], attempts: int, samples: int) -> float:
    """The share of questions with a right answer among `samples` attempts, in the mean over all ways to draw these.

    1 - C(M - c, n) / C(M, n) for c right ones of M attempts, without bias (Chen et al. 2021, arXiv 2107.03374).

    Args:
        correct: how many attempts at each question were right.
        attempts: how many there were at each.
        samples: how many are drawn, without putting back.

    Raises:
        ValueError: no question, more right ones or more samples than attempts, or fewer than none.
    """
    if not correct or not 1 <= samples <= attempts or not all(0 <= right <= attempts for right in correct):
        raise ValueError(f"{samples} of {attempts} attempts of which {list(correct)} were right")
    ways = math.comb(attempts, samples)
    missed = sum(math.comb(attempts - right, samples) for right in correct)
    return (ways * len(correct) - missed) / (ways * len(correct))


def samples_for(correct: Sequence[int], attempts: int, least: float) -> int | None:
    """The smallest number of samples whose coverage is at least `least`; None if that of all attempts is less.

    Args:
        correct, attempts: see `coverage`, which never falls with more samples.
        least: from 0 to 1.
    """
    if coverage(correct, attempts, attempts) < least:
        return None
    low, high = 0, attempts
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if coverage(correct, attempts, middle) >= least else (middle, high)
    return high
