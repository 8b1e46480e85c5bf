from collections.abc import Callable, Iterator

import pytest
from pool import Pool
from sliced import LENGTH

from longmix.config import resolved

SMALL = ("model.num_layers=1", "model.d_model=24", "model.num_heads=2", "model.mlp_hidden=16", f"seq_len={LENGTH}")


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Iterator[Pool]:
    """Processes that run functions on slices; see `Pool.run`."""
    pool = Pool(tmp_path_factory.mktemp("pool") / "meeting")
    yield pool
    pool.close()


@pytest.fixture
def node_of(composed, tmp_path) -> Callable[[str], dict]:
    """The configuration of a small model whose mixer is given in words: `node_of("rwkv7 head_dim=12")`."""

    def compose(words: str) -> dict:
        mixer, *settings = words.split()
        overrides = [f"mixer={mixer}", *(f"mixer.{setting}" for setting in settings)]
        return resolved(composed([*SMALL, *overrides], "train", tmp_path))

    return compose
