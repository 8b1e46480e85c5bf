from collections.abc import Iterator

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Iterator[Pool]:
    """Processes that run functions on slices; see `Pool.run`."""
    pool = Pool(tmp_path_factory.mktemp("pool") / "meeting")
    yield pool
    pool.close()
