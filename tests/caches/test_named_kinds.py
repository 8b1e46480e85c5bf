"""A kind of cache as one word means what the words of the command line mean."""

import pytest

from longmix.caches.exact import Exact
from longmix.caches.h2o import H2O
from longmix.caches.named import kinds_of
from longmix.caches.sink_recent import SinkRecent
from longmix.errors import ConfigError


def test_words_with_settings():
    words = ["exact", "h2o:budget=0.5:recent=0.25:mean=true", "sink_recent:recent=8", "exact:exact_layers=[0,-1]"]
    kinds = kinds_of(words, "task.caches")
    assert list(kinds) == words
    assert list(kinds.values()) == [
        Exact(exact_layers=[]),
        H2O(exact_layers=[], budget=0.5, recent=0.25, mean=True),
        SinkRecent(exact_layers=[], start=4, recent=8),
        Exact(exact_layers=[0, -1]),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["h20"], r"^task\.caches names h20: cache: there is no cache h20\. Did you mean h2o"),
        (["h2o:budget"], r"^task\.caches names h2o:budget: 'budget' is no SETTING=VALUE; write it like"),
        (["h2o:budgets=2"], r"^task\.caches names h2o:budgets=2: unknown key cache\.budgets"),
        (["h2o:budget=2.5"], r"^task\.caches names h2o:budget=2\.5: cache\.budget=2\.5 must be a whole number"),
        (["h2o:budget=[1"], r"^task\.caches names .*: '\[1' is no value"),
        (["exact", "exact"], r"^task\.caches names exact: it is there twice"),
    ],
)
def test_refuses(words, message):
    with pytest.raises(ConfigError, match=message):
        kinds_of(words, "task.caches")
