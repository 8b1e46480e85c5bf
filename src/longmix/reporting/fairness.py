"""Whether runs may be compared: what was the same for all of them, and what was not."""

from collections.abc import Callable
from dataclasses import dataclass

from longmix.reporting.compared import content_of
from longmix.reporting.panels import by_length
from longmix.reporting.runs import Run
from longmix.reporting.settings import block_of, corpus_of, tokenizer_of
from longmix.wording import counted

EQUAL_PARAMETERS = 0.04
"""Two models within the default `match.tolerance` of one number differ by no more than this."""


@dataclass(frozen=True)
class Fact:
    """Something about a whole comparison.

    Attributes:
        words: the fact.
        good: True makes the comparison fairer, False less fair; None is neither.
    """

    words: str
    good: bool | None


def fairness(runs: list[Run]) -> list[Fact]:
    """Parameters, tokens, data, blocks, repetitions, leaks and machines of runs that are laid side by side."""
    return [
        *(_parameters(runs), _tokens(runs)),
        *(*_data(runs), *_blocks(runs), *_learning_rates(runs)),
        *(_repetitions(runs), *_leaks(runs), *_machine(runs)),
    ]


def _parameters(runs: list[Run]) -> Fact:
    smallest, largest = _range(runs, lambda run: run.summary["parameters"]["total"])
    difference = largest / smallest - 1
    if difference == 0:
        return Fact(f"{smallest:,} parameters each", True)
    words = f"{smallest:,} to {largest:,} parameters, {difference:.1%} apart"
    if difference <= EQUAL_PARAMETERS:
        return Fact(words, True)
    return Fact(f"{words}; match.parameters=N makes them equal", False)


def _tokens(runs: list[Run]) -> Fact:
    smallest, largest = _range(runs, lambda run: run.summary["tokens"])
    if smallest != largest:
        return Fact(f"{smallest:,} to {largest:,} tokens", False)
    steps, more_steps = _range(runs, lambda run: run.summary["tokens_per_step"])
    if steps != more_steps:
        return Fact(f"{smallest:,} tokens each, but {steps:,} to {more_steps:,} in a step", False)
    return Fact(f"{smallest:,} tokens each, {steps:,} in a step", True)


def _data(runs: list[Run]) -> list[Fact]:
    """Different data, or different tokens of them: losses of such runs are of different questions."""
    corpora = sorted({corpus for run in runs if (corpus := corpus_of(run.settings)) is not None})
    if len(corpora) > 1:
        return [Fact(f"trained on different data: {_listed(corpora)}; their losses do not compare", False)]
    contents = {content for run in runs if (content := content_of(run)) is not None}
    if len(contents) > 1:
        return [Fact("the data had other content, or other tokens, in some runs; their losses do not compare", False)]
    tokenizers = sorted({words for run in runs if (words := tokenizer_of(run.settings)) is not None})
    if len(tokenizers) > 1:
        return [Fact(f"different tokenizers: {_listed(tokenizers)}; bits per byte compare, losses do not", False)]
    return [Fact(f"data: {corpus}", None) for corpus in corpora]


def _blocks(runs: list[Run]) -> list[Fact]:
    """Mixers that ran in another layer than most: what they win or lose may be the layer's."""
    mixers: dict[str, list[str]] = {}
    for run in runs:
        block = block_of(run.settings)
        if block is not None:
            mixers.setdefault(block, []).append(run.summary["mixer"])
    if len(mixers) < 2:
        return []
    usual = max(mixers, key=lambda block: len(mixers[block]))
    return [
        Fact(
            f"{_listed(sorted(set(names)))} ran in another block ({block}) than the others ({usual}): a difference may "
            "be the block's",
            False,
        )
        for block, names in mixers.items()
        if block != usual
    ]


def _learning_rates(runs: list[Run]) -> list[Fact]:
    rates = {run.settings["optimizer.learning_rate"] for run in runs if "optimizer.learning_rate" in run.settings}
    if len(rates) < 2 or not all(isinstance(rate, int | float) for rate in rates):
        return []
    return [Fact(f"learning rates from {min(rates):g} to {max(rates):g}", None)]


def _listed(words: list[str], most: int = 4) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return "; ".join(words[:most]) + more


def _repetitions(runs: list[Run]) -> Fact:
    mixers = [[run.summary["mixer"] for run in group] for group in by_length(runs).values()]
    fewest = min(group.count(mixer) for group in mixers for mixer in group)
    if fewest > 1:
        return Fact(f"at least {counted(fewest, 'run')} of each mixer and length", True)
    return Fact("one run of a mixer and length: small differences may be chance", None)


def _leaks(runs: list[Run]) -> list[Fact]:
    leaky = sorted({run.summary["mixer"] for run in runs if run.evaluations.causal is False})
    return [Fact(f"{mixer} sees later tokens: its loss is not that of a language model", False) for mixer in leaky]


def _machine(runs: list[Run]) -> list[Fact]:
    machines = sorted({run.summary["device"] for run in runs if "device" in run.summary})
    if len(machines) > 1:
        return [Fact(f"speed on different machines: {', '.join(machines)}", False)]
    torch = sorted({str(run.summary.get("versions", {}).get("torch", "?")) for run in runs})
    return [Fact(f"{machine}, torch {' and '.join(torch)}", None) for machine in machines]


def _range(runs: list[Run], value: Callable[[Run], int]) -> tuple[int, int]:
    values = [value(run) for run in runs]
    return min(values), max(values)
