"""The interpreter tests in a process of their own, and an engine that does without triton."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longmix_kernels.scatter import scatter_attention

HERE = Path(__file__).parent


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_interpreter_matches_reference():
    """Rung 3: a whole test file in a process that has TRITON_INTERPRET=1 from the start."""
    file = "test_scatter_triton_interpreted.py"
    done = run_python("-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) == 6 and "skipped" not in done.stdout


def test_importing_the_engine_does_not_import_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from longmix_kernels.scatter import scatter_attention\n"
        "x = torch.ones(1, 4, 1, 8)\n"
        "scatter_attention(x, x, x, x, x, block_size=1, past_blocks=0)\n"
        "try: scatter_attention(x, x, x, block_size=1, past_blocks=0, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "backend='triton' got tensors on cpu" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
def test_bfloat16_on_a_gpu(documents):
    """Error at most twice that of the blocked form in bfloat16, both against float64; and two runs are equal."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, 1000, 4, *shape, generator=generator, device="cuda")

    tensors = [normal(64).bfloat16() for _ in range(3)] + [normal(32) for _ in range(2)]
    ids = torch.arange(1000, device="cuda").int().expand(2, -1) // 700 if documents else None
    grad = normal(64).bfloat16()
    found = []
    for backend, dtype in (("reference", torch.float64), ("blocked", None), ("triton", None), ("triton", None)):
        inputs = [x.to(dtype or x.dtype).requires_grad_() for x in tensors]
        result = scatter_attention(*inputs, block_size=128, past_blocks=1, document_ids=ids, backend=backend)
        grads = torch.autograd.grad(result.output, inputs, grad.to(result.output.dtype))
        found.append([result.output, result.logsumexp, *grads])
    for exact, blocked, triton, again in zip(*found, strict=True):
        allowed, error = ((x.double() - exact).square().mean().sqrt() for x in (blocked, triton))
        assert error <= 2 * allowed + 1e-6 * exact.square().mean().sqrt()
        assert torch.equal(triton, again)
