"""Batches of windows, which data give and models take."""

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:  # preparing data needs no torch, which takes seconds to import
    import torch

IGNORE_INDEX = -100
"""A target where nothing is to be predicted."""


class Batch(TypedDict):
    """Rows of windows.

    Attributes:
        tokens: int64 [b, T].
        targets: int64 [b, T], `IGNORE_INDEX` where nothing is to be predicted.
        document_ids: int32 [b, T], or None when no row holds a boundary between documents.
    """

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    document_ids: "torch.Tensor | None"
