"""Buffers of caches lie in huge pages where Linux has them."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longmix.caches.cache import CacheShape
from longmix.caches.exact import Exact
from longmix.caches.huge_pages import HUGE_PAGE, in_huge_pages

MAPPINGS = Path("/proc/self/smaps")
needs_mappings = pytest.mark.skipif(
    not MAPPINGS.exists() or "VmFlags:" not in MAPPINGS.read_text(), reason="the kernel does not say what was asked"
)


def is_asked(x: torch.Tensor) -> bool:
    """Say whether the kernel was asked for huge pages for the middle of a tensor."""
    middle, within = x.data_ptr() + x.nbytes // 2, False
    for line in MAPPINGS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif within and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


@needs_mappings
@pytest.mark.parametrize("window", [None, 20_000])
def test_kernel_is_asked_for_large_buffers(window):
    shape = CacheShape(1, 2, 1, 64, 64, torch.float32, torch.device("cpu"), 0, None, window)
    cache = Exact().build(shape)
    cache.reserve(20_000)
    new = [torch.randn(1, 1, 2, 64) for _ in range(3)]
    with torch.no_grad():
        cache.attend(*new, positions=torch.zeros(1, 1, dtype=torch.int64), scale=1.0)
    held = cache if window else cache.store
    assert held.key.nbytes > 4 * HUGE_PAGE and torch.equal(held.key[:, :, 0], new[1][:, 0])
    assert is_asked(held.key) and is_asked(held.value)


@needs_mappings
def test_kernel_is_asked_for_whole_pages_of_its_own_alone():
    wide = torch.frombuffer(mmap.mmap(-1, 8 * HUGE_PAGE), dtype=torch.uint8)  # which nobody had before
    start = -wide.data_ptr() % HUGE_PAGE
    page = wide[start + 2 * HUGE_PAGE :][: 2 * HUGE_PAGE - 1]  # one whole page and not quite another
    assert in_huge_pages(page) is page
    assert is_asked(wide[start + 2 * HUGE_PAGE :][:HUGE_PAGE])
    assert not is_asked(wide[start + 3 * HUGE_PAGE :][:HUGE_PAGE])
    assert not is_asked(wide[start + HUGE_PAGE :][:HUGE_PAGE])


def test_tensors_without_numbers_stay_as_they_are():
    with FakeTensorMode():
        fake = torch.empty(HUGE_PAGE)
        assert in_huge_pages(fake) is fake
    meta = torch.empty(HUGE_PAGE, device="meta")
    assert in_huge_pages(meta) is meta
