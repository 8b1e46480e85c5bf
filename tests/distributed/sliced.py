"""The same loss and gradients in one process and in several; functions that the processes of a pool run."""

import functools
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F

from longmix.config import ModelConfig
from longmix.distributed import exchange
from longmix.distributed.exchange import exchanged
from longmix.distributed.slices import Slices
from longmix.mixers.parts.metrics import Measure, accumulate
from longmix.model.backbone import LanguageModel, ModelOutput
from longmix.model.build import build_model
from longmix.model.tuned_states_file import tune_states

VOCABULARY = 47
LENGTH = 44
"""Slices of 22 and of 11 tokens."""

DOCUMENTS = [
    [5, 6, 28, 1, 1, 3],  # a border inside a slice, one at its edge, a document over three slices, single tokens
    [44],
    [10, 1, 1, 21, 11],  # single tokens on both sides of an edge, and slices that are one document each
    [1, 32, 11],
]


@dataclass(frozen=True)
class Case:
    """A model and how it runs.

    Attributes:
        node: the configuration.
        packed: rows of several documents.
        tuned: documents begin from states that are parameters.
        mixed: float32 weights, products in bfloat16; else all is in float64.
    """

    node: dict[str, Any]
    packed: bool = False
    tuned: bool = False
    mixed: bool = False

    def model(self) -> LanguageModel:
        """With weights of which none begins at zero."""
        torch.manual_seed(3)
        model = build_model(ModelConfig.of(self.node), VOCABULARY).double()
        if self.tuned:
            tune_states(model)
        for weight in model.parameters():
            weight.data += 0.2 * torch.randn_like(weight)
        return model.float() if self.mixed else model

    def precision(self) -> torch.autocast:
        """What a forward pass runs in."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.mixed)


def rows(packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens, targets and documents of whole rows. No token comes twice: equals are chosen among arbitrarily."""
    generator = torch.Generator().manual_seed(4)
    count = len(DOCUMENTS)
    drawn = [torch.randperm(VOCABULARY, generator=generator)[:LENGTH] for _ in range(2 * count)]
    tokens, targets = torch.stack(drawn).split(count)
    if not packed:
        return tokens, targets, None
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in DOCUMENTS]
    return tokens, targets, torch.stack(ids).int()


def in_one_process(case: Case) -> dict[str, torch.Tensor]:
    """Outputs, losses of the tokens, other losses, all gradients, and what mixers measured."""
    model, (tokens, targets, ids) = case.model(), rows(case.packed)
    with case.precision():
        output = model(tokens, targets, document_ids=ids)
    loss = output.token_losses.mean() + sum(output.losses.values())
    loss.backward()
    others = {f"loss {name}": value.detach() for name, value in output.losses.items()}
    figures = {name: measure.figure() for name, measure in measured(output, case).items()}
    found = {"output": output.hidden.detach(), "losses": output.token_losses.detach(), **others}
    return found | gradients(model) | figures


def in_slices(group: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    """The same of this process's slice: outputs and losses of its tokens, and its share of everything else."""
    model, (tokens, targets, ids) = case.model(), rows(case.packed)
    slices = Slices(LENGTH, ids, group)
    with case.precision():
        state = model.slice_state(slices)
        output = model(slices.own(tokens), slices.own(targets), state=state, document_ids=slices.ids)
    loss = (output.token_losses / tokens.numel()).sum() + sum(output.losses.values()) / slices.size
    loss.backward()
    others = {f"loss {name}": value.detach() / slices.size for name, value in output.losses.items()}
    found = {"output": output.hidden.detach(), "losses": output.token_losses.detach(), **others}
    return found | gradients(model) | measured(output, case)


def measured(output: ModelOutput, case: Case) -> dict[str, Measure]:
    """What mixers measured; nothing in mixed precision, which decides otherwise between labels that are close."""
    measures: dict[str, Measure] = {}
    accumulate(measures, {} if case.mixed else output.metrics)
    return measures


def cut_off(group: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    """`in_slices` where nothing but zeros comes from other processes."""
    with patch.object(exchange, "exchanged", lambda x, sent, got, group: 0 * exchanged(x, sent, got, group)):
        return in_slices(group, case)


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    """All there are, by name."""
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def together(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Outputs and token losses of all slices side by side, everything else added up, figures of what was measured."""
    assert len({tuple(result) for result in results}) == 1
    return {name: _together(name, [result[name] for result in results]) for name in results[0]}


def _together(name: str, parts: list[Any]) -> torch.Tensor:
    if isinstance(parts[0], Measure):
        return functools.reduce(lambda total, part: total.plus(part), parts).figure()
    return torch.cat(parts, 1) if name in ("output", "losses") else sum(parts)


def largest_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference relative to the largest number of the same tensor, and the tensor's name."""
    assert list(found) == list(wanted)
    errors = {
        name: float(F.l1_loss(found[name], x, reduction="none").max() / x.abs().max().clamp(min=1e-300))
        for name, x in wanted.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst
