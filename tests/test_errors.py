"""Messages name a setting by the place where it stands."""

import pytest

from longmix.errors import ConfigError, settings_at


@pytest.mark.parametrize(
    ("place", "said", "now"),
    [
        ("task.needle", "task.needles=0 must be", "task.needle.needles=0 must be"),
        ("task.needle", "task.needle.depths=0 must be", "task.needle.depths=0 must be"),
        ("task.loss", "task.seq_len and task.prefixes", "task.loss.seq_len and task.loss.prefixes"),
        ("data.corpora.books", "data.corpus.path=x", "data.corpora.books.path=x"),
        ("data.corpus", "data.corpus.path=x", "data.corpus.path=x"),
    ],
)
def test_settings_at_another_place(place, said, now):
    with pytest.raises(ConfigError) as error, settings_at(place, "data.corpus" if "data" in place else "task"):
        raise ConfigError(said)
    assert str(error.value) == now
