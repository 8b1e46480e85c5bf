"""Losses that are those of a language model even where later tokens change earlier outputs: each prefix is run alone.

In teacher forcing a row is run once, and a mixer that looks ahead (`Mixer.leaky`) lets every token but the last know of
those it is to predict. A prefix has nothing after its last token, so that token's loss is honest, as in decoding. It
costs a pass for each target, so only targets at evenly spread positions are taken.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from longmix.batch import IGNORE_INDEX, Batch


def prefix_ends(length: int, prefixes: int) -> list[int]:
    """Lengths of at most `prefixes` prefixes of a row, evenly spread; the last is the whole row."""
    return sorted({-(-length * number // prefixes) for number in range(1, prefixes + 1)})


def prefixes_alone(batches: Iterable[Batch], ends: Sequence[int]) -> Iterator[Batch]:
    """Every prefix of every batch, with its last target only."""
    for batch in batches:
        for end in ends:
            ids = batch["document_ids"]
            piece = Batch(
                tokens=batch["tokens"][:, :end],
                targets=batch["targets"][:, :end],
                document_ids=None if ids is None else ids[:, :end],
            )
            yield _only(piece, [end])


def rows_whole(batches: Iterable[Batch], ends: Sequence[int]) -> Iterator[Batch]:
    """Every batch with the last targets of its prefixes only: the same targets in teacher forcing."""
    for batch in batches:
        yield _only(batch, ends)


def _only(batch: Batch, ends: Sequence[int]) -> Batch:
    targets = torch.full_like(batch["targets"], IGNORE_INDEX)
    places = torch.tensor(ends, device=targets.device) - 1
    targets[:, places] = batch["targets"][:, places]
    return Batch(tokens=batch["tokens"], targets=targets, document_ids=batch["document_ids"])
