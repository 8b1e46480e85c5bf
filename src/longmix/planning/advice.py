"""Changes that make a run fit. The planner itself judges each, the smallest first."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from longmix.errors import ConfigError
from longmix.planning.arguments import Choice, Request
from longmix.planning.plan import Plan, Planner

KINDS = ("micro_batch_size", "checkpointed", "strategy", "context_parallel", "seq_len")

SHORTEST = 256
"""The shortest window that is proposed, in tokens."""


@dataclass(frozen=True)
class Advice:
    """A change of the settings, and the plan with it.

    Attributes:
        words: what to add to the command line.
        plan: with them.
    """

    words: tuple[str, ...]
    plan: Plan


def single_changes(planner: Planner) -> list[Advice]:
    """Each kind of change alone: the smallest of its kind that fits, or the largest if none does."""
    found = []
    for kind in KINDS:
        tried: list[Advice] = []
        for choice in _steps(planner, kind):
            answer = _asked(planner, choice)
            if answer is not None:
                tried.append(answer)
                if answer.plan.memory.fits:
                    break
        if tried:
            found.append(min(tried, key=lambda each: (not each.plan.memory.fits, each.plan.memory.total)))
    return found


def smallest_change(planner: Planner) -> Advice | None:
    """The change of the fewest kinds that fits; a shorter window only where nothing else does.

    Among changes of as many kinds, the cheapest counts as smallest: micro-batches, then recomputing, FSDP, and context
    parallelism, each with the smallest step that suffices.
    """
    asked = planner.request.choice
    for length in (asked.seq_len, *_halves(asked.seq_len, SHORTEST)):
        start = dataclasses.replace(asked, seq_len=length)
        for number in range(len(KINDS)):
            for kinds in itertools.combinations(KINDS[:-1], number):
                found = _first_that_fits(planner, start, kinds)
                if found is not None:
                    return found
    return None


def _first_that_fits(planner: Planner, start: Choice, kinds: tuple[str, ...]) -> Advice | None:
    values = [[getattr(choice, kind) for choice in _steps(planner, kind)] for kind in kinds]
    for combination in itertools.product(*values):
        choice = dataclasses.replace(start, **dict(zip(kinds, combination, strict=True)))
        found = _asked(planner, choice)
        if found is not None and found.plan.memory.fits:
            return found
    return None


def _steps(planner: Planner, kind: str) -> Iterator[Choice]:
    """The choices that differ in one kind of setting alone, the smallest step first."""
    request = planner.request
    choice = request.choice
    values: list = []
    if kind == "micro_batch_size":
        values = [rows for rows in _halves(choice.micro_batch_size) if choice.micro_batch_size % rows == 0]
    elif kind == "checkpointed":
        values = [] if choice.checkpointed else [True]
    elif kind == "strategy":
        values = [] if choice.strategy == "fsdp" or request.gpus == 1 else ["fsdp"]
    elif kind == "context_parallel":
        doubled = itertools.takewhile(lambda n: n <= request.gpus, (choice.context_parallel << n for n in range(1, 20)))
        values = list(doubled)
    else:
        values = list(_halves(choice.seq_len, SHORTEST))
    for value in values:
        yield dataclasses.replace(choice, **{kind: value})


def _halves(number: int, least: int = 1) -> Iterator[int]:
    """Half of a number, a quarter, and so on, down to `least`."""
    while number // 2 >= least:
        number //= 2
        yield number


def _asked(planner: Planner, choice: Choice) -> Advice | None:
    """The plan of a choice; None if the choice is impossible."""
    try:
        return Advice(words(planner.request, choice), planner.plan(choice))
    except ConfigError:
        return None


def words(request: Request, choice: Choice) -> tuple[str, ...]:
    """The words that add a choice to the request's command line."""
    spelled = {"seq_len": "seq_len={}", "strategy": "trainer={}", "context_parallel": "trainer.context_parallel={}"}
    asked = request.choice
    found = []
    for name, text in spelled.items():
        value = getattr(choice, name)
        if value != getattr(asked, name):
            found.append(text.format(value))
    if choice.micro_batch_size != (request.node["trainer"]["micro_batch_size"] or request.rows(choice)):
        found.append(f"trainer.micro_batch_size={choice.micro_batch_size}")
    if choice.checkpointed != asked.checkpointed:
        found.append("model.activation_checkpointing=block")
    return tuple(found)
