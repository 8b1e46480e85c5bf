"""torch's `FlopCounterMode` counts what the mixers say of themselves, forward and backward."""

import pytest
import torch
from mixer_table import CONFIGURED, SHAPE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from longmix.mixers import combiner_log
from longmix.mixers.wersa import Wersa
from longmix_kernels.attention import attention
from longmix_kernels.delta import delta_rule
from longmix_kernels.linear import linear_attention

LENGTH = 256
BY_CONTENT = ("hyper", "routing", "sparse_flash", "sparse_flash_drop", "scatterbrain_content")
"""Tokens choose what they see, and `flops` takes these choices to be even."""


def counted(mixer, x, document_ids=None, backward=False) -> int:
    with FlopCounterMode(display=False) as counter:
        y = mixer(x, document_ids=document_ids).y
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_pass_counts_what_the_mixer_says(name, monkeypatch):
    """To 0.1 % forward and 2 % with the backward, or 10 % where content decides.

    A mixer counts its short convolution too, which torch does not: it is no product of matrices. Backward, torch leaves
    out gradients that nobody wants, as those of random features.
    """
    monkeypatch.setattr(combiner_log, "device_kind", lambda device: "cuda")  # a CPU's sums are no products of matrices
    torch.manual_seed(1)
    mixer = CONFIGURED[name]()
    x = torch.randn(2, LENGTH, SHAPE.d_model)
    convolution = getattr(mixer, "convolution", None)
    wanted = 2 * (mixer.flops(LENGTH) - (0 if convolution is None else convolution.flops(LENGTH)))
    # Choosing blocks has no gradient.
    choosing = getattr(mixer, "choosing_flops", lambda length: 0)(LENGTH)
    # Nor have the random projections of all features.
    fixed = 4 * LENGTH * mixer.random.numel() if isinstance(mixer, Wersa) else 0
    again = 2 * getattr(mixer, "recomputed_flops", lambda length: 0)(LENGTH)
    by_content = name.removeprefix("configs-") in BY_CONTENT
    with torch.no_grad():
        assert counted(mixer, x) == pytest.approx(wanted, rel=0.1 if by_content else 0.001)
    both = counted(mixer, x.requires_grad_(), backward=True)
    assert both == pytest.approx(3 * wanted + again - 4 * choosing - 2 * fixed, rel=0.1 if by_content else 0.02)


@pytest.mark.parametrize("name", ["configs-block_sparse", "configs-scatterbrain", "configs-sliding_window"])
def test_packed_documents_count_as_each_alone(name):
    torch.manual_seed(1)
    mixer = CONFIGURED[name]()
    lengths = (40, 1, 130, 85)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).int()[None]
    with torch.no_grad():
        found = counted(mixer, torch.randn(1, LENGTH, SHAPE.d_model), ids)
    assert found == pytest.approx(sum(map(mixer.flops, lengths)), rel=0.001)


def test_shapes_alone_are_enough():
    """A planner's tensors have no values: rows then count as causal."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, v = (torch.empty(2, 64, 4, 16) for _ in range(3))
        lo = torch.empty(1, 1, 64, dtype=torch.int32)
        attention(q, k, v, lo=lo, hi=torch.empty_like(lo))
        linear_attention(q, k, v, log_decay=torch.empty(4))
        delta_rule(q, k, v, log_decay=torch.empty(2, 64, 4), low_rank_read=q, low_rank_write=q)
    rows = 2 * 4 * 64
    assert counter.get_total_flops() == rows * (4 * 16 * 65 // 2 + 4 * 16 * 16 + 8 * 16 * 16)
