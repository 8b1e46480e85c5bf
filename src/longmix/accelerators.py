"""What accelerators can do: the table of the engines, `longmix_kernels.accelerators`, under longmix's name."""

from longmix_kernels.accelerators import ACCELERATORS, Accelerator, by_driver_name, by_word

__all__ = ["ACCELERATORS", "Accelerator", "by_driver_name", "by_word"]
