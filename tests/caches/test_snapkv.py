"""What a prompt's newest queries, and those of tokens to come, choose of it, against the authors' code."""

import pytest
import torch

from longmix.caches.snapkv import SnapKV, SpecKV
from longmix.errors import ConfigError
from tests.caches.direct import attended, built, case


@pytest.mark.parametrize("number", [0, 1])
def test_keeps_what_the_authors_keep(number):
    given = case("speckv", number)
    rows = given["query"], given["key"], given["value"]
    prompt, lookahead = int(given["prompt"]), int(given["lookahead"])
    words = ("max", "mean")
    kind = SpecKV(
        budget=int(given["capacity"]),
        window=int(given["window"]),
        pool=int(given["kernel"]),
        reduction=words[int(given["reduction"])],
        pooling=words[int(given["pool"])],
    )
    cache = built(kind, *rows)
    attended(cache, *rows, slice(0, prompt - 1))
    ahead = cache.looking_ahead(1 + lookahead)
    attended(ahead, *rows, slice(prompt - 1, prompt + lookahead))
    importance = cache._importance(ahead.newest_query, ahead.whole()[0], torch.zeros(1))[
        ..., : given["pooled"].shape[-1]
    ]
    torch.testing.assert_close(kind.of_group(importance), given["importance"], rtol=0, atol=1e-6)
    pooled = cache._pooled(importance)[:, :, 0]
    torch.testing.assert_close(pooled, given["pooled"], rtol=0, atol=1e-6)
    cache.prompt_ended_before(ahead)
    before = pooled.shape[-1]
    for head, wanted in enumerate(given["kept"][0].tolist()):
        held = cache.kept_key[0, head, : cache.kept_count[0]]
        found = [int((given["key"][0, :, head] == one).all(-1).nonzero()[0, 0]) for one in held]
        assert len(set(found)) == len(wanted) and {at for at in found if at >= before} == {
            at for at in wanted if at >= before
        }
        # neighbours that were pooled are equal: which of those at the edge stay is open, and here the first do
        of_found, of_wanted = (sorted(pooled[0, head, [at for at in one if at < before]]) for one in (found, wanted))
        torch.testing.assert_close(torch.stack(of_found), torch.stack(of_wanted), rtol=0, atol=1e-6)
        edge = of_found[0]
        assert [at for at in found if at < before and pooled[0, head, at] > edge] == [
            at for at in sorted(wanted) if at < before and pooled[0, head, at] > edge + 1e-6
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 32}, "cache.budget=32 must be a whole number of tokens, at least 33, or a share"),
        ({"window": 0}, "cache.window=0 must be at least 1"),
        ({"pool": 4}, "cache.pool=4 must be odd"),
        ({"pooling": "sum"}, "cache.pooling=sum must be max or mean"),
        ({"reduction": "sum"}, "cache.reduction=sum must be max or mean"),
        ({"lookahead": 0}, "cache.lookahead=0 must be at least 1, or null"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        (SpecKV if "lookahead" in settings else SnapKV)(**settings)
