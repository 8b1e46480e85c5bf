"""Rung 3: with the Triton kernels for the exact part, in the interpreter, against the definition in float32.

Runs only where TRITON_INTERPRET=1 is set before triton is imported; `test_scatter_triton.py` starts such a process.
"""

import os

import pytest
import torch
from scatter_cases import Case, assert_close, everything

from longmix_kernels.scatter import scatter_attention

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process of its own")

CASES = [
    Case("plain", length=40, batch=1),
    Case("no-features", length=40, batch=1, features=0, block_size=5),
    Case("documents", length=50, documents=(30, 3), heads=2, key_heads=1),
    Case("state", length=40, queries=20, batch=1, with_state=True, past_blocks=0),
    Case("last-query", length=13, queries=1, with_state=True, batch=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case):
    inputs = case.inputs(torch.float32)
    got = everything(case, inputs, backend="triton")
    double = {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}
    for name, expected in everything(case, double, backend="reference").items():
        assert_close(got[name], expected, 1e-5, name)


def test_what_the_kernels_do_not_cover_is_refused():
    double, wide = torch.zeros(1, 4, 1, 8, dtype=torch.float64), torch.zeros(1, 4, 1, 257)
    sizes = {"block_size": 2, "past_blocks": 0, "backend": "triton"}
    with pytest.raises(ValueError, match=r"backend='triton' got query of dtype torch.float64; allowed are"):
        scatter_attention(double, double, double, **sizes)
    with pytest.raises(ValueError, match=r"backend='triton' got query with head dimension 257; allowed are 1 to 256"):
        scatter_attention(wide, wide, wide, **sizes)
