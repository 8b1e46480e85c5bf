"""One thread, as the cases are small and waiting for others is most of their time; and the order of GPU tests."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FIRST = ("half_precision", "one_graph", "memory_beside", "equal_bit_for_bit", "long_sequence", "131072")
"""Parts of the names of GPU tests, in the order in which they run; the others follow. bfloat16 comes before float16."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests run in the order of what they tell; what takes most of the memory or an hour only where asked for."""
    unasked = [name for name in ("large_memory", "every_row") if name not in config.option.markexpr]
    # float16 takes the code of bfloat16, and compiling is most of the time: a sixth of its cases stands for all.
    halves = [item for item in items if item.get_closest_marker("gpu") and _is_float16(item.name)]
    spared = set() if "every_row" in config.option.markexpr else {*halves} - {*halves[::6]}
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        (left_out if item in spared or any(map(item.get_closest_marker, unasked)) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    places = [place for place, item in enumerate(items) if item.get_closest_marker("gpu")]
    ordered = sorted((items[place] for place in places), key=lambda item: _rank(item.name))
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _rank(name: str) -> tuple[int, bool]:
    found = [place for place, part in enumerate(FIRST) if part in name]
    return (found[0] if found else len(FIRST), _is_float16(name))


def _is_float16(name: str) -> bool:
    return "float16" in name and "bfloat16" not in name
