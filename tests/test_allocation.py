"""What a device cannot do is one line for the user, and no traceback."""

import pytest

from longmix.allocation import allocation_errors
from longmix.errors import ConfigError
from longmix_kernels.launch import known_architecture


def test_a_gpu_that_cannot_run_a_kernel_is_one_line():
    with (
        pytest.raises(ConfigError, match=r"^backend='triton' got tensors on a GPU of architecture sm_75; allowed are"),
        allocation_errors("training", "take less"),
    ):
        known_architecture(75)


def test_memory_that_is_used_up_is_one_line_with_its_cure():
    message = r"^training takes more memory than there is \(memory is used up\); take less$"
    with pytest.raises(ConfigError, match=message), allocation_errors("training", "take less"):
        raise MemoryError


def test_other_errors_stay_what_they_are():
    with pytest.raises(ValueError, match=r"^a defect$"), allocation_errors("training", "take less"):
        raise ValueError("a defect")
