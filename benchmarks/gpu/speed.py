"""Our engines beside those of others that are installed, at the shapes that the project's bars are about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import attention, delta, linear, results, timing
from benchmarks.attention_providers import NAMES, SDPA, Shape
from benchmarks.attention_providers import providers as attention_providers
from benchmarks.command import DTYPES
from benchmarks.comparison import PASSES, Comparison, Provider, Sized
from benchmarks.delta_providers import FAMILIES as DELTA_FAMILIES
from benchmarks.delta_providers import DeltaShape
from benchmarks.delta_providers import providers as delta_providers
from benchmarks.gpu.case import NotPossible
from benchmarks.linear_providers import FAMILIES as LINEAR_FAMILIES
from benchmarks.linear_providers import LinearShape
from benchmarks.linear_providers import providers as linear_providers

COPY_BYTES, PRODUCT_SIZE = 4 << 30, 8192


@dataclass(frozen=True)
class Benchmark:
    """One of the project's comparisons.

    Attributes:
        families: of providers, in the table's order.
        providers: by family.
        shape: of tokens in all, length, dtype, device and what else tells shapes apart.
        complete: adds what follows from the records' times.
        bars: what has to be reached on a GPU.
    """

    families: Sequence[str]
    providers: Callable[[], Mapping[str, Sequence[Provider]]]
    shape: Callable[..., Sized]
    complete: Callable[[Sequence[results.Record], Mapping[str, str]], Sequence[results.Record]]
    bars: Callable[[], Sequence[results.Bar | results.FlatBar]]


def _attention_shape(length: int, dim: int, **place: Any) -> Shape:
    batch, heads = max(1, attention.CUDA_TOKENS // length), attention.CUDA_COLUMNS // dim
    return Shape(batch, length, heads, dim, **place)


def _linear_shape(length: int, **place: Any) -> LinearShape:
    sizes: Any = linear.SIZES["cuda"]
    return LinearShape(max(1, linear.CUDA_TOKENS // length), length, **sizes, **place)


def _delta_shape(length: int, **place: Any) -> DeltaShape:
    sizes: Any = delta.SIZES["cuda"]
    return DeltaShape(max(1, delta.CUDA_TOKENS // length), length, **sizes, **place)


def _attention_complete(records: Sequence[results.Record], families: Mapping[str, str]) -> Sequence[results.Record]:
    found = [dict(record) for record in records]
    results.add_speedup(found, "over_sdpa", SDPA)
    results.add_speedup(found, "over_dense", ("dense",))
    return found


BENCHMARKS = {
    "attention": Benchmark(
        NAMES,
        lambda: {name: [provider] for name, provider in attention_providers(flex=True).items()},
        _attention_shape,
        _attention_complete,
        lambda: attention.bars("cuda", (64, 128)),
    ),
    "linear": Benchmark(
        LINEAR_FAMILIES,
        lambda: linear_providers(()),
        _linear_shape,
        lambda records, families: linear.complete(records, families, linear.SIZES["cuda"]["key_dim"]),
        lambda: linear.bars("cuda"),
    ),
    "delta": Benchmark(
        DELTA_FAMILIES,
        delta_providers,
        _delta_shape,
        lambda records, families: delta.complete(records, families, delta.SIZES["cuda"]["key_dim"]),
        lambda: delta.bars("cuda"),
    ),
}


def compare(
    *,
    benchmark: str,
    families: Sequence[str],
    direction: str,
    seconds: float,
    limit: float,
    device: str = "cuda",
    **sizes: Any,
) -> dict[str, Any]:
    """Times of one pass at one shape, in turns.

    Args:
        benchmark: a key of `BENCHMARKS`.
        families: of providers; those that cannot run here are left out, with the reason.
        direction: the pass.
        seconds: how long to time each call, in sum.
        limit: most seconds that one call may take.
        device: where.
        sizes: what the benchmark's shape is made of, besides dtype and device.
    """
    place, own = torch.device(device), BENCHMARKS[benchmark]
    every = own.providers()
    missing = {name: why for name in families if (why := every[name][0].missing(place))}
    here = {name: every[name] for name in families if name not in missing}
    if not here:
        raise NotPossible("; ".join(f"{name} {why}" for name, why in missing.items()))
    dtype = "bf16" if device == "cuda" else "fp32"
    environment = results.environment(place, dtype)
    peaks = results.peak_flops(environment), results.peak_bytes(environment)
    listed = [provider for providers in here.values() for provider in providers]
    run = Comparison(listed, timing.clock_for(place), seconds, limit, *peaks)
    made = own.shape(dtype=DTYPES[dtype], device=place, **sizes)
    for done in run.compare(made, (direction,), lambda name: None):
        print(done, flush=True)
    names = {provider.name: family for family, providers in here.items() for provider in providers}
    return {"records": run.records, "families": names, "missing": missing, "clock_mhz": _clock()}


def warm(*, benchmark: str, family: str, **shape: Any) -> dict[str, Any]:
    """Have a peer compile, and search for its configurations, so that its time at this shape counts at once."""
    device, own = torch.device("cuda"), BENCHMARKS[benchmark]
    providers = own.providers()[family]
    if why := providers[0].missing(device):
        raise NotPossible(f"{family} {why}")
    made = own.shape(dtype=torch.bfloat16, device=device, **shape)
    notes = {}
    for provider in providers:
        try:
            for direction in PASSES:
                provider.build(made).calls[direction]()
        except Exception as error:
            notes[provider.name] = timing.reason(error)
    torch.cuda.synchronize()
    return {"notes": notes}


def ceilings() -> dict[str, Any]:
    """What this device does at most: bytes per second of a copy, FLOP/s of a bf16 product of random numbers."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    measured = timing.measure(calls, timing.clock_for(torch.device("cuda")), seconds=0.2, limit=5.0)
    copy, product = measured["copy"].median, measured["product"].median
    properties = torch.cuda.get_device_properties(0)
    return {
        "copy_bytes_per_second": copy and 2 * COPY_BYTES / copy,
        "bf16_flops": product and 2 * PRODUCT_SIZE**3 / product,
        "multiprocessors": properties.multi_processor_count,
        "shared_memory": getattr(properties, "shared_memory_per_block_optin", None),
        "memory_bytes": properties.total_memory,
    }


def _clock() -> int | None:
    """MHz of the multiprocessors just now; None where nobody says."""
    try:
        return torch.cuda.clock_rate()
    except Exception:  # without the package that asks the driver
        return None
