"""No length and no batch size starts a compile: Triton sees one kernel for all of them."""

from collections.abc import Callable

import pytest
import torch
from engine_contract import compiles

from longmix_kernels import attention, delta_rule, linear_attention, scatter_attention
from longmix_kernels.attention.ordering import order_by_label
from longmix_kernels.simulated import simulated_gpu

DIM = 64
SHAPES = [(1, 1000), (2, 1001), (3, 1016), (1, 1007), (2, 1008), (3, 1002), (1, 2000), (1, 1032)]
"""Batch sizes and lengths: odd, even, and multiples of 4, 8 and 16."""

Call = Callable[..., torch.Tensor]


def sorted_rows(query: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    order = order_by_label(torch.zeros(query.shape[:3], dtype=torch.long), num_labels=4)
    rows = {"query_rows": order.query_rows, "key_rows": order.key_rows}
    return attention(query, query, query, lo=order.lo, hi=order.hi, **rows)


def far(query: torch.Tensor, logs: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
    result = scatter_attention(query, query, query, logs, logs, block_size=128, past_blocks=1, **options)
    return result[0] if isinstance(result, tuple) else result


# By name: the call, and how often a forward and a backward launch one kernel with other tensors left out.
CALLS: dict[str, tuple[Call, dict[str, int]]] = {
    "causal": (lambda query, **_: attention(query, query, query), {}),
    "window": (lambda query, **_: attention(query, query, query, window=100), {}),
    "documents": (lambda query, ids, **_: attention(query, query, query, document_ids=ids), {}),
    "sorted": (sorted_rows, {}),
    "mlstm-exp": (
        lambda query, gate, ids, **_: linear_attention(
            query, query, query, log_decay=gate, log_input=gate, normalize=True, document_ids=ids
        )[0],
        {"states_kernel": 2},
    ),
    "mlstm-sig": (
        lambda query, gate, **_: linear_attention(query, query, query, log_decay=gate)[0],
        {"states_kernel": 2},
    ),
    "rwkv7": (
        lambda query, logs, ids, **_: delta_rule(
            query,
            query,
            query,
            log_decay=logs,
            low_rank_read=query,
            low_rank_write=query,
            min_log_decay=-0.6,
            document_ids=ids,
        )[0],
        {"prepare_kernel": 2, "scan_kernel": 2},
    ),
    "gated-deltanet": (
        lambda query, gate, **_: delta_rule(
            query, query, query, log_decay=gate, low_rank_read=query, low_rank_write=query
        )[0],
        {"prepare_kernel": 2, "scan_kernel": 2},
    ),
    "gla": (
        lambda query, logs, **_: delta_rule(query, query, query, log_decay=logs)[0],
        {"prepare_kernel": 2, "scan_kernel": 2},
    ),
    "scatter": (lambda query, logs, **_: far(query, logs), {"sums_kernel": 2, "grad_query_kernel": 2}),
    "scatter-documents": (
        lambda query, logs, ids, **_: far(query, logs, document_ids=ids),
        {"sums_kernel": 2, "grad_query_kernel": 2},
    ),
}


def tensors(batch: int, length: int, heads: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(batch, length, dtype=torch.int32)
    ids[:, length // 2 :] = 1
    query = torch.zeros(batch, length, heads, DIM, dtype=torch.bfloat16, requires_grad=True)
    logs, gate = torch.zeros(batch, length, heads, DIM), torch.zeros(batch, length, heads)
    return {"query": query, "logs": logs.requires_grad_(), "gate": gate.requires_grad_(), "ids": ids}


@compiles
@pytest.mark.parametrize("heads", [3, 4, 6])
@pytest.mark.parametrize("name", CALLS)
def test_one_kernel_serves_all_lengths_and_batch_sizes(name, heads):
    call, more = CALLS[name]
    with simulated_gpu(90) as gpu:
        for batch, length in SHAPES:
            call(**tensors(batch, length, heads)).sum().backward()
    assert {kernel: len(found) for kernel, found in gpu.variants.items()} == {
        kernel: more.get(kernel, 1) for kernel in gpu.variants
    }


@compiles
def test_tensors_that_begin_anywhere_are_no_other_kernels():
    def placed(offset: int) -> torch.Tensor:
        return torch.zeros(2 * 100 * 2 * DIM + offset, dtype=torch.bfloat16)[offset:].view(2, 100, 2, DIM)

    with simulated_gpu(90) as gpu:
        for offset in (0, 1, 8):
            query = placed(offset).requires_grad_()
            attention(query, query, query).backward(placed(offset))
    assert {len(found) for found in gpu.variants.values()} == {1}
