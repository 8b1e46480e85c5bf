"""What only a GPU shows: races, odd sizes, large offsets, waits of the host, and compiled graphs."""

import shutil
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu.case import CheckFailed, NotPossible
from benchmarks.gpu.correctness import ALLOWED, check_repeats, errors_of, relative_error
from benchmarks.gpu.engine_calls import EngineCall, make
from benchmarks.gpu.models import Trained, trained
from longmix_kernels import attention

LARGE_BYTES = 70e9
"""Of device memory, which the case with large offsets takes."""

SANITIZER = "compute-sanitizer"


def race(*, repetitions: int, engine: str, dtype: str, device: str, **settings: Any) -> dict[str, Any]:
    """Long scans, many times: equal bit for bit, and right.

    A race between warps shows as sums that differ from run to run, or as sums that are wrong every time.
    """
    call = make(engine, dtype=dtype, device=device, **settings)
    ours = call.results("triton")
    check_repeats(call, ours, repetitions)
    errors = errors_of(ours, call.results("blocked", call.exact()), ALLOWED[dtype])
    return {"errors": errors, "repetitions": repetitions}


def unaligned(*, engine: str, dtype: str, device: str, **settings: Any) -> dict[str, Any]:
    """Sizes and addresses that nothing divides give what the definition says."""
    call = make(engine, dtype=dtype, device=device, **settings)
    shifted = {}
    for name, x in call.tensors.items():
        room = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
        shifted[name] = room[1:].view(x.shape).copy_(x)
    wanted = call.results("reference", call.exact())
    return {"errors": errors_of(call.results("triton", shifted), wanted, ALLOWED[dtype])}


def large_offsets(*, length: int, heads: int, dim: int, tail: int) -> dict[str, Any]:
    """Tensors of more than 2^31 numbers: the last document equals the same tokens on their own."""
    if torch.cuda.mem_get_info()[0] < LARGE_BYTES:
        raise NotPossible(f"needs {LARGE_BYTES / 1e9:.0f} GB of free device memory")
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query, key, value = (torch.randn(1, length, heads, dim, **options) for _ in range(3))
    if query.numel() <= 2**31:
        raise CheckFailed(f"{query.numel()} numbers are not beyond 2^31")
    ids = (torch.arange(length, device="cuda") >= length - tail).int().view(1, -1)
    with torch.no_grad():
        last = attention(query, key, value, window=256, document_ids=ids)[:, -tail:]
        alone = attention(*(x[:, -tail:].clone() for x in (query, key, value)), window=256)
    error = relative_error(last, alone)
    if not error <= ALLOWED["bf16"]:
        raise CheckFailed(f"the last document differs from the same tokens alone by {error:.2e}")
    return {"numbers": query.numel(), "error": error}


def compiled_engine(*, engine: str, dtype: str, device: str, **settings: Any) -> dict[str, Any]:
    """An engine's call is one graph under `torch.compile`, and gives the same bits."""
    call = make(engine, dtype=dtype, device=device, **settings)
    graph = EngineCall(call.tensors, torch.compile(call.run, fullgraph=True))
    # What torch compiles around the engine may round otherwise; the engine's own kernels may not.
    return {"errors": errors_of(graph.results("triton"), call.results("triton"), ALLOWED[dtype])}


def no_waits(*, mixer: str, length: int, device: str) -> dict[str, Any]:
    """A training step of two layers never has the host wait for the device, on documents and without."""
    counted = {}
    for documents in (1, 4):
        run = _small(mixer, length, device, documents)
        run.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.step()
        except RuntimeError as error:
            if "synchroniz" in str(error):
                raise CheckFailed(f"waits for the device with {documents} documents: {error}") from error
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counted[f"{documents} documents"] = True
    return counted


def compiled_mixer(*, mixer: str, length: int, device: str) -> dict[str, Any]:
    """Two compiled bf16 steps of two layers lose what two eager ones lose, without a break in a graph."""
    eager, compiled = (_small(mixer, length, device, 2) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile()
    losses = [[float(run.step()) for _ in range(2)] for run in (eager, compiled)]
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    if breaks:
        raise CheckFailed(f"{sum(breaks.values())} breaks in graphs: {next(iter(breaks))[:200]}")
    difference = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    if not difference <= 1e-2:
        raise CheckFailed(f"losses {losses[0]} eager and {losses[1]} compiled differ by {difference:.1e}")
    return {"eager": losses[0], "compiled": losses[1]}


def memory_checker(*, engine: str, **settings: Any) -> dict[str, Any]:
    """A small call of an engine under NVIDIA's checker of memory accesses."""
    if shutil.which(SANITIZER) is None:
        raise NotPossible(f"{SANITIZER} is not installed")
    code = (
        "from benchmarks.gpu.engine_calls import make\n"
        f"make({engine!r}, **{settings!r}).results('triton')\n"
        "import torch; torch.cuda.synchronize()"
    )
    command = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    if "Device not supported" in done.stdout or "Unable to" in done.stdout:
        raise NotPossible(f"{SANITIZER} does not work here: {lines[-1] if lines else ''}")
    if done.returncode:
        print(done.stdout, done.stderr)
        raise CheckFailed(f"exit code {done.returncode}: {' '.join(lines[:4])[:300]}")
    return {"summary": lines[-1] if lines else ""}


def _small(mixer: str, length: int, device: str, documents: int) -> Trained:
    words = [f"mixer={mixer}", "model=tiny", "model.num_layers=2", "model.d_model=256", "model.num_heads=4"]
    sizes = {"batch": 2, "length": length, "vocab_size": 512, "documents": documents}
    return trained(words, **sizes, device=device, dtype="bf16" if device == "cuda" else "fp32")
