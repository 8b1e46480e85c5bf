"""Estimate what block-local attention with far keys costs by its mathematics. Nothing here is measured.

Bytes are those that have to pass between chip and memory. Each kernel reads or writes each tensor once; what programs
side by side read again counts as coming from a cache. Operations are those of products of matrices, and a multiply-add
counts as two. A token here is a token of a query head, and a key head has `group` query heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from longmix_kernels.cost import Work, per_row
from longmix_kernels.runtime import has_values
from longmix_kernels.scatter.bounds import exact_bounds
from longmix_kernels.scatter.inputs import Inputs

FORWARD = ("exact", "sums", "scan", "merge")
BACKWARD = ("exact_backward", "sums_again", "scan_again", "grad_query", "grad_sums", "grad_scan", "grad_key")
"""The kernels of a call, in the order in which they run; those of the exact part are the attention engine's."""


def call_flops(inputs: Inputs) -> int:
    """Return the operations of a call by its definition.

    Each exact pair counts 2 (D + Dv). Each row that has far keys counts the sums over keys, and their reading by
    queries.
    """
    batch, queries, heads, dim = inputs.query.shape
    keys, key_heads, value_dim = inputs.value.shape[1:]
    ids = inputs.document_ids
    if ids is not None and not has_values(ids):
        ids = None
    device = torch.device("cpu") if ids is None else ids.device
    first, lo, hi = exact_bounds(ids, queries, keys, inputs.block_size, inputs.past_blocks, device)
    rows = batch // lo.shape[0]
    pairs = 2 * (dim + value_dim) * heads * rows * int((hi - lo).sum())
    if inputs.query_features is None:
        return pairs
    far = rows * int((lo > first).sum())
    return pairs + 2 * far * (heads + key_heads) * inputs.query_features.shape[3] * (value_dim + 1)


@dataclass(frozen=True)
class Setting:
    """The sizes of a call of whole blocks.

    Attributes:
        rows: tokens times query heads, B T Hq.
        dim, value_dim: the head dimensions of keys and of values, D and Dv.
        features: how many features there are, m.
        block_size: tokens of a block, C.
        past_blocks: whole blocks before its own that a query sees exactly, P.
        group: how many query heads share a key head.
        size: bytes of a number of query, key and value.
    """

    rows: int
    dim: int = 64
    value_dim: int = 64
    features: int = 64
    block_size: int = 128
    past_blocks: int = 1
    group: int = 1
    size: int = 2


def kernel_work(setting: Setting) -> Mapping[str, Work]:
    """Return the work of every kernel of a call without documents and initial state, by name."""
    wide, logs = setting.size * setting.value_dim, 4 * setting.features
    narrow = setting.size * setting.dim
    share = 1 / setting.group
    sums = share * 4 * setting.features * (setting.value_dim + 2) / setting.block_size
    back_sums = share * 4 * setting.features * (setting.value_dim + 3) / setting.block_size
    # A query sees on average half of its own block exactly. The exact part has two products forward, seven backward.
    seen = setting.past_blocks * setting.block_size + (setting.block_size + 1) / 2
    products = 2 * seen * (setting.dim + setting.value_dim)
    through = 2 * setting.features * setting.value_dim
    work = per_row(setting.rows)
    scan = work(0, 2 * sums)
    key_sums = work(share * through, share * (logs + wide) + sums)
    return {
        "exact": work(products, narrow + wide + share * (narrow + wide) + 4),
        "sums": key_sums,
        "scan": scan,
        # The exact output is read and written once more, and its logsumexp is copied.
        "merge": work(through, logs + sums + 2 * wide + 16),
        "exact_backward": work(
            2 * seen * (4 * setting.dim + 3 * setting.value_dim),
            # Once for queries, once for keys.
            3 * narrow + 3 * wide + 24 + share * (3 * narrow + 3 * wide),
        ),
        "sums_again": key_sums,
        "scan_again": scan,
        "grad_query": work(through, 2 * logs + sums + 2 * wide + 8),
        "grad_sums": work(through, logs + wide + 8 + back_sums),
        "grad_scan": work(0, 2 * back_sums),
        "grad_key": work(2 * share * through, share * (2 * logs + 3 * wide) + back_sums),
    }


def blocked_work(setting: Setting) -> Mapping[str, Work]:
    """Return the work of the far part as the torch operations of `far` do it, each of which reads and writes memory.

    It counts, for each token, vectors as long as its features and as its values: copies into blocks, differences,
    exponentials, products of matrices, and copies back.
    """
    logs, wide, kept = 4 * setting.features, 4 * (setting.value_dim + 1), setting.size * setting.value_dim
    share = 1 / setting.group
    sums = share * 4 * setting.features * (setting.value_dim + 2) / setting.block_size
    through = 2 * setting.features * (setting.value_dim + 1)
    work = per_row(setting.rows)
    # Key sums copy features, then take maximum, difference, exponential and product; they copy and pad values. Then
    # the sums of each block are added to a total (read, read, written) and copied.
    key_sums = work(share * through, share * (9 * logs + kept + 5 * wide) + 6 * sums)
    return {
        # Logarithms are copied, then come the added scale, maximum, difference, exponential and product. The output is
        # copied, scaled, added to and copied back.
        "forward": key_sums + work(through, 10 * logs + sums + 10 * wide),
        "backward": key_sums
        + work(through, 13 * logs + sums + 6 * wide)
        + work(through, 7 * logs + wide + 6 * sums)
        + work(2 * share * through, share * (11 * logs + 8 * wide) + sums),
    }
