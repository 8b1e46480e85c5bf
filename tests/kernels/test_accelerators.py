import pytest

from longmix_kernels.accelerators import ACCELERATORS, by_driver_name, by_word

DRIVER_NAMES = {
    "NVIDIA GB200": "GB200",
    "NVIDIA H200": "H200",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA A100-SXM4-40GB": "A100-SXM4-40GB",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA L40S": "L40S",
}


@pytest.mark.parametrize(("driver", "name"), DRIVER_NAMES.items())
def test_the_drivers_name_finds_the_right_row(driver, name):
    found = by_driver_name(driver)
    assert found is not None
    assert found.name == name


def test_an_unknown_device_is_not_guessed():
    assert by_driver_name("Some GPU of tomorrow") is None
    assert by_word("gpu-of-tomorrow") is None


@pytest.mark.parametrize("word", ["rtx4090", "RTX 4090", "rtx-4090", "Rtx_4090"])
def test_words_may_be_spelled_in_many_ways(word):
    assert by_word(word) is ACCELERATORS["RTX 4090"]


def test_units_are_those_of_bytes_and_seconds():
    h200 = ACCELERATORS["H200"]
    assert (h200.memory_bytes, h200.bandwidth, h200.bf16_flops) == (141_000_000_000, 4.8e12, 989e12)
    assert (h200.link_bandwidth, h200.network_bandwidth, h200.node_size) == (450e9, 50e9, 8)
    for row in ACCELERATORS.values():
        assert row.fp32_flops < row.bf16_flops
        assert row.network_bandwidth <= row.link_bandwidth < row.bandwidth
        assert 24e9 <= row.memory_bytes < 200e9
