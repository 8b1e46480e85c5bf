"""Counted bytes against those that there are, after a prompt and after the token behind it."""

import pytest
import torch

from longmix.caches.kinds import kind_files, kind_of
from longmix.generation.questions import written_ahead
from longmix.generation.session import Session
from longmix.mixers.parts.states import caches
from tests.caches.test_caches import SHORT, model_of, tokens_of

MORE = {
    "speckv-budget": {"budget": 12, "window": 4, "lookahead": 3},
    "h2o-share": {"budget": 0.4, "recent": 0.1},
    "quantised-odd": {"group": 7, "residual": 14, "bits": 8},
}
ESTIMATES = ("squeezed",)
"""Kinds that read what the text asks for."""


@pytest.mark.parametrize(
    "length", [19, pytest.param(20, marks=pytest.mark.slow), pytest.param(33, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [*kind_files(), *SHORT, *MORE])
def test_counted_bytes_are_those_that_there_are(name, length):
    kind, model, prompts = (
        kind_of(name.partition("-")[0], (SHORT | MORE).get(name)),
        model_of(),
        tokens_of(*2 * [length]),
    )
    ahead = kind.lookahead_tokens(4)
    session = Session(model, 2, kind)
    session.prefill(prompts, lookahead=None if ahead is None else written_ahead(model, prompts, ahead))
    assert sum(cache.held_bytes() for cache in caches(session.state)) == 2 * session.counted_bytes(length)
    session.step(torch.zeros(2, dtype=torch.int64))
    if kind.name not in ESTIMATES:
        read = sum(cache.read_bytes() for cache in caches(session.state))
        assert read == 2 * session.counted_read_bytes(length)
