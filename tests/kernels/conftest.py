"""One thread: the cases are small, and waiting for other threads is most of their time on a busy machine."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
