"""What accelerators can do, from their vendors' data sheets: the one table of cost models, reports and planning.

Peaks are dense: sheets give twice as much with sparsity. Memory is what the sheet calls GB, taken as 10^9 bytes. NVLink
and PCIe are sold by the sum of both directions; here stands one of them.
"""

import re
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Accelerator:
    """One device, and what joins it to others.

    Attributes:
        name: part of the name that the driver gives.
        memory_bytes: on the device.
        bandwidth: bytes per second between it and its memory.
        bf16_flops: dense bf16 tensor-core operations per second, summed in float32.
        fp32_flops: float32 operations per second outside the tensor cores, torch's default for float32 products.
        link_bandwidth: bytes per second and direction to the others of its node.
        network_bandwidth: bytes per second and direction from its node to other nodes, for each device of the node.
        node_size: devices that share the fast link.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float
    fp32_flops: float
    link_bandwidth: float
    network_bandwidth: float
    node_size: int

    def flops(self, size: int) -> float:
        """Return the operations per second of products of numbers of `size` bytes: 2 for bf16, 4 for fp32."""
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
) -> Accelerator:
    """One row, in the units of data sheets: GB, TB/s, TFLOP/s and GB/s."""
    return Accelerator(
        name,
        round(memory_gb * GIGA),
        terabytes * TERA,
        bf16 * TERA,
        fp32 * TERA,
        link_gb * GIGA,
        network_gb * GIGA,
        node_size,
    )


ACCELERATORS = {
    row.name: row
    for row in (
        _of("GB200", 186, 8.0, 2500, 80, 900, 50, node_size=72),
        _of("B200", 180, 8.0, 2250, 75, 900, 50),
        _of("H200", 141, 4.8, 989, 67, 450, 50),
        _of("H100 PCIe", 80, 2.0, 756, 51, 64, 50),
        _of("H100 NVL", 94, 3.9, 835, 60, 64, 50),
        _of("H100", 80, 3.35, 989, 67, 450, 50),
        _of("A100-SXM4-40GB", 40, 1.555, 312, 19.5, 300, 25),
        _of("A100", 80, 2.039, 312, 19.5, 300, 25),
        _of("L40S", 48, 0.864, 362, 91.6, 32, 25),
        _of("RTX 4090", 24, 1.008, 165, 82.6, 32, 12.5),
    )
}
"""By name, in an order in which the first that is part of the driver's name is the right one: H100 is the SXM card,
A100 the one with 80 GB. Networks are what such nodes usually have, 400 or 200 Gb/s of InfiniBand for each device, and
not a property of the device; the bridge that joins two PCIe cards is left out.
"""


H200 = ACCELERATORS["H200"]
"""The one that the engines' estimates are for."""

H200_EXPONENTIALS = 3.9e12
"""Per second: 16 per cycle and multiprocessor, of which an H200 has 132 at 1.83 GHz."""

SHARED_MEMORY = {
    **dict.fromkeys((80, 87), 166_912),
    **dict.fromkeys((86, 89, 120, 121), 101_376),
    **dict.fromkeys((90, 100, 103, 110), 232_448),
}
"""Most bytes of shared memory that a program may have, by compute capability times ten: A100 has 163 KiB, H100, H200
and B200 have 227 KiB, and cards such as RTX 3090, 4090, 5090, A6000, A10 and L40S have 99 KiB.
"""

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, for which reports and tests compile the kernels."""

TUNED = (80, 86, 90, 100)
"""Those of which launch tables have entries; `launch.known_architecture` says which entries a GPU takes."""


def by_driver_name(name: str) -> Accelerator | None:
    """The accelerator whose driver calls it `name`, or None for one that is not in the table."""
    return next((found for known, found in ACCELERATORS.items() if known in name), None)


def by_word(word: str) -> Accelerator | None:
    """The accelerator that a word of a command line means, whatever its case, spaces and dashes; None for no such."""
    return {_plain(name): found for name, found in ACCELERATORS.items()}.get(_plain(word))


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
