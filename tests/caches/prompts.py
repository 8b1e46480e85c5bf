"""Caches after prompts of several lengths, and their steps, without a model around them."""

import torch

from tests.caches.direct import attended, built

KEY_HEADS, GROUP, WIDTH = 2, 2, 8


def rows(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, WIDTH) for heads in (KEY_HEADS * GROUP, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def padded(tensors, lengths):
    """Prompts of these lengths at the end of one batch, and the documents of their tokens."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int32)
    found = [x.new_full((len(lengths), longest, *x.shape[2:]), 7.0) for x in tensors]
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = 1
        for to, x in zip(found, tensors, strict=True):
            to[row, longest - length :] = x[row, :length]
    return found, ids


@torch.no_grad()
def begun(kind, tensors, lengths):
    """A cache that has read prompts of these lengths, the first tokens of each row."""
    prompts, ids = padded(tensors, lengths)
    cache = built(kind, *prompts)
    longest = max(lengths)
    positions = torch.arange(longest) - (longest - torch.tensor(lengths))[:, None]
    positions = torch.where(positions < 0, positions + longest, positions)
    if min(lengths) == longest:
        attended(cache, *prompts, slice(0, longest))
    else:
        cache.attend(*prompts, torch.where(ids > 0, positions, torch.arange(longest)), ids)
    cache.prompt_ended()
    return cache


@torch.no_grad()
def step(cache, tensors, places, count=1, ids=None):
    """The output of the next tokens of each row, which stand at these places of the tensors."""
    part = [torch.stack([x[row, place : place + count] for row, place in enumerate(places)]) for x in tensors]
    positions = cache.next_position[:, None] + torch.arange(count)
    return cache.attend(*part, positions, ids)[0]
