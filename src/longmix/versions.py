"""Versions that a result depends on."""

import platform
from importlib import metadata

import torch

import longmix

PACKAGES = ("torch", "triton", "lightning", "hydra-core", "wandb", "tokenizers", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for repeating a run."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "longmix": longmix.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
