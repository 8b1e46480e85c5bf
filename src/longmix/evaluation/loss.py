"""Loss of a model over evaluation windows: the one function that training's validation and `evaluate.py` both call."""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from longmix.batch import Batch, documents_of, each
from longmix.evaluation.statistics import LossStatistics
from longmix.model.backbone import ModelOutput
from longmix.model.head import SoftTargets


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move a batch's tensors; None (rows that are not packed) stays None."""
    return each(batch, lambda x: x.to(device, non_blocking=True))


def run_whole(model: nn.Module, batch: Batch, soft: SoftTargets | None = None) -> ModelOutput:
    """The output and losses of a `LanguageModel` on a batch, with those from a teacher's distributions if given."""
    taught = {} if soft is None else {"soft": soft}
    output: ModelOutput = model(batch["tokens"], batch["targets"], **documents_of(batch), **taught)
    return output


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    statistics: LossStatistics,
    *,
    device: torch.device | str = "cpu",
    precision: Callable[[], AbstractContextManager] = nullcontext,
    after_batch: Callable[[], bool] = lambda: True,
    run: Callable[[Batch], ModelOutput] | None = None,
    own: Callable[[Batch], Batch] = lambda batch: batch,
) -> LossStatistics:
    """Fill `statistics` with the model's losses, in eval mode and without touching any random state.

    Args:
        model: a `LanguageModel`.
        batches: dicts with tokens, targets and document_ids.
        statistics: the sums to add to.
        device: where the model is.
        precision: makes the autocast context of one forward pass.
        after_batch: called after each batch; False ends the evaluation early.
        run: runs a batch; None calls the model. Where processes share rows, it runs this process's slice.
        own: limits a batch to the targets that this process counts; None counts all.
    """
    run = functools.partial(run_whole, model) if run is None else run
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            moved = to_device(batch, device)
            with precision():
                output = run(moved)
            statistics.update(output.token_losses, own(moved)["targets"], moved["document_ids"], output.hits)
            if not after_batch():
                break
    finally:
        model.train(was_training)
    return statistics
