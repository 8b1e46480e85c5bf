"""The peak rates of accelerators, from their vendors' data sheets. Cost models, reports and planning read this table.

Peaks are those of dense products; sheets also give twice as much, with sparsity. A GB of a sheet counts as 10^9 bytes.
Sheets give the bandwidth of NVLink and PCIe as the sum of both directions; this table gives one direction.
"""

import re
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Accelerator:
    """One device, and the links that join it to others.

    Attributes:
        name: part of the name that the driver gives.
        memory_bytes: bytes of the device's memory.
        bandwidth: bytes per second between the chip and that memory.
        bf16_flops: dense bf16 tensor-core operations per second, summed in float32.
        fp32_flops: float32 operations per second outside the tensor cores, torch's default for float32 products.
        link_bandwidth: bytes per second and direction to the other devices of its node.
        network_bandwidth: bytes per second and direction from its node to other nodes, for each device of the node.
        node_size: how many devices share the fast link.
        host_bandwidth: bytes per second and direction to the host's memory.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float
    fp32_flops: float
    link_bandwidth: float
    network_bandwidth: float
    node_size: int
    host_bandwidth: float = 64e9

    def flops(self, size: int) -> float:
        """Return the peak operations per second for products of numbers of `size` bytes: 2 for bf16, 4 for fp32."""
        return self.bf16_flops if size == 2 else self.fp32_flops


def _of(
    name: str,
    memory_gb: int,
    terabytes: float,
    bf16: float,
    fp32: float,
    link_gb: float,
    network_gb: float,
    node_size: int = 8,
    host_gb: float = 64,
) -> Accelerator:
    """Return one row, given in the units of data sheets: GB, TB/s, TFLOP/s and GB/s."""
    return Accelerator(
        name,
        round(memory_gb * GIGA),
        terabytes * TERA,
        bf16 * TERA,
        fp32 * TERA,
        link_gb * GIGA,
        network_gb * GIGA,
        node_size,
        host_gb * GIGA,
    )


ACCELERATORS = {
    row.name: row
    for row in (
        _of("GB200", 186, 8.0, 2500, 80, 900, 50, node_size=72, host_gb=225),
        _of("B200", 180, 8.0, 2250, 75, 900, 50),
        _of("H200", 141, 4.8, 989, 67, 450, 50),
        _of("H100 PCIe", 80, 2.0, 756, 51, 64, 50),
        _of("H100 NVL", 94, 3.9, 835, 60, 64, 50),
        _of("H100", 80, 3.35, 989, 67, 450, 50),
        _of("A100-SXM4-40GB", 40, 1.555, 312, 19.5, 300, 25, host_gb=32),
        _of("A100", 80, 2.039, 312, 19.5, 300, 25, host_gb=32),
        _of("L40S", 48, 0.864, 362, 91.6, 32, 25, host_gb=32),
        _of("RTX 4090", 24, 1.008, 165, 82.6, 32, 12.5, host_gb=32),
    )
}
"""The accelerators by name. `by_driver_name` takes the first whose name is part of the driver's, so longer names come
first: H100 is the SXM card, A100 the one with 80 GB. The network is no property of a device; the rows have what such
nodes usually have, 400 or 200 Gb/s of InfiniBand for each device. The way to the host is PCIe 5.0 x16, PCIe 4.0 x16 on
cards of the Ampere and Ada generations, and half of the NVLink-C2C that two GPUs of a GB200 share. The bridge between
two PCIe cards is left out.
"""


H200 = ACCELERATORS["H200"]
"""The accelerator for which the engines estimate costs."""

H200_EXPONENTIALS = 3.9e12
"""Exponentials per second of an H200: 16 per cycle on each of 132 multiprocessors at 1.83 GHz."""

SHARED_MEMORY = {
    **dict.fromkeys((80, 87), 166_912),
    **dict.fromkeys((86, 89, 120, 121), 101_376),
    **dict.fromkeys((90, 100, 103, 110), 232_448),
}
"""The most bytes of shared memory that a program may have, by compute capability times ten. A100 has 163 KiB; H100,
H200 and B200 have 227 KiB; cards such as RTX 3090, 4090, 5090, A6000, A10 and L40S have 99 KiB.
"""

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""The compute capabilities, times ten, for which reports and tests compile the kernels."""

TUNED = (80, 86, 90, 100)
"""The architectures with entries in launch tables; `launch.known_architecture` says which entries a GPU takes."""


def by_driver_name(name: str) -> Accelerator | None:
    """Return the accelerator that the driver calls `name`, or None if the table has no such row."""
    return next((found for known, found in ACCELERATORS.items() if known in name), None)


def by_word(word: str) -> Accelerator | None:
    """Return the accelerator that a word of a command line means, or None if the table has no such row.

    Case, spaces, dashes and underscores make no difference.
    """
    return {_plain(name): found for name, found in ACCELERATORS.items()}.get(_plain(word))


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
