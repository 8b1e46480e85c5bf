"""Every case of the command, by stage, the most important first: what a cut-off loses is what matters least."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.comparison import FORWARD, TRAINING
from benchmarks.gpu.case import Case
from benchmarks.gpu.speed import BENCHMARKS

HERE = __package__
STAGES = ("machine", "correctness", "hazards", "warm", "speed", "training", "tune")
SHARES = {
    "machine": 0.05,
    "correctness": 0.23,
    "hazards": 0.36,
    "warm": 0.42,
    "speed": 0.66,
    "training": 0.97,
    "tune": 1.0,
}
"""By which share of the budget each stage ends; what one leaves, the next ones have."""

PARALLEL = ("correctness", "hazards", "warm")
"""Stages whose cases share the device; others have it alone."""

MIXERS = (
    "flash",
    "mlstm_tfla",
    "rwkv7",
    "gated_deltanet",
    "sparse_flash",
    "scatterbrain",
    "kda",
    "routing",
    "sliding_window",
    "deltanet",
    "gated_deltanet2",
    "gated_deltaproduct",
    "comba",
    "gla",
    "simple_gla",
    "mamba2",
    "hgrn2",
    "qlstm",
    "wersa",
    "ponet",
    "lightning",
    "retention",
    "hyper",
    "block_sparse",
    "moba",
    "fox",
    "parallax",
    "nsa",
    "scatterbrain_content",
    "sparsek",
    "combiner",
    "combiner_log",
    "tensor",
    "sparse_flash_drop",
)
"""In the order in which they are tried."""

LENGTH = 16384
Settings = dict[str, Any]


def every_case(device: str) -> list[Case]:
    """All cases for a device; on a CPU those whose kernels Triton's interpreter can run, at tiny sizes."""
    if device == "cpu":
        return [*_on_a_cpu()]
    return [*_machine(), *_correctness(), *_hazards(), *_warm(), *_speed(), *_training()]


def _machine() -> Iterator[Case]:
    yield Case("machine", "machine/ceilings", f"{HERE}.speed.ceilings", {}, seconds=8, most=30)


def _call(engine: str, dim: int, value_dim: int, dtype: str = "bf16", **settings: Any) -> Settings:
    sizes = {"batch": 2, "length": 520, "heads": 4, "dim": dim, "value_dim": value_dim}
    return {"engine": engine, "dtype": dtype, "device": "cuda", **sizes, **settings}


CALLS: Sequence[tuple[str, Settings]] = (
    ("attention/causal-64", _call("attention", 64, 64)),
    ("attention/causal-128", _call("attention", 128, 128)),
    ("attention/documents-64", _call("attention", 64, 64, documents=4)),
    ("attention/documents-128", _call("attention", 128, 128, documents=4)),
    ("attention/labels-64", _call("attention", 64, 64, labels=4, documents=3)),
    ("attention/labels-128", _call("attention", 128, 128, labels=4)),
    ("delta/rwkv7-64", _call("delta", 64, 64, kind="rwkv7", documents=3)),
    ("linear/sig-96-192", _call("linear", 96, 192, kind="sig", documents=3)),
    ("linear/exp-96-192", _call("linear", 96, 192, kind="exp", documents=3)),
    ("linear/exp-128-256", _call("linear", 128, 256, kind="exp")),
    ("delta/gated-96-192", _call("delta", 96, 192, kind="gated_deltanet", documents=3)),
    ("delta/kda-128", _call("delta", 128, 128, kind="kda", documents=3)),
    ("delta/deltanet-128", _call("delta", 128, 128, kind="deltanet")),
    ("delta/gla-128", _call("delta", 128, 128, kind="gla")),
    ("scatter/documents-64", _call("scatter", 64, 64, documents=3)),
    ("scatter/grouped-64", _call("scatter", 64, 64, key_heads=2)),
    ("attention/window-grouped-128", _call("attention", 128, 128, window=100, key_heads=2)),
    ("attention/labels-80", _call("attention", 80, 80, labels=3)),
    ("linear/sig-128-256", _call("linear", 128, 256, kind="sig")),
    ("linear/decay-64", _call("linear", 64, 64, kind="decay")),
    ("delta/kda-64", _call("delta", 64, 64, kind="kda")),
    ("delta/gated-128", _call("delta", 128, 128, kind="gated_deltanet")),
    ("attention/causal-256", _call("attention", 256, 256)),
    ("attention/causal-192", _call("attention", 192, 192)),
    ("linear/exp-256-512", _call("linear", 256, 512, kind="exp")),
    ("scatter/documents-128", _call("scatter", 128, 128, documents=2)),
)
"""Calls of the engines as mixers make them, by name."""


ODD: Sequence[tuple[str, int, Settings]] = (
    ("attention", 72, {"documents": 2}),
    ("linear", 48, {"kind": "exp", "documents": 2}),
    ("delta", 80, {"kind": "kda", "documents": 2}),
    ("scatter", 48, {"features": 40}),
)
"""Head dimensions that no power of two is, by engine."""


def _correctness() -> Iterator[Case]:
    for name, settings in CALLS:
        yield Case("correctness", f"correctness/{name}", f"{HERE}.correctness.check", settings, seconds=12, most=60)


def _hazards() -> Iterator[Case]:
    def case(name: str, action: str, settings: Settings, seconds: float, most: float, alone: bool = False) -> Case:
        return Case("hazards", f"hazards/{name}", f"{HERE}.hazards.{action}", settings, seconds, most, alone)

    long: Settings = {"length": LENGTH, "batch": 1, "heads": 2}
    races = (
        ("scatter-fp32", _call("scatter", 64, 64, "fp32", **long)),
        ("scatter", _call("scatter", 64, 64, **long)),
        ("delta-rwkv7", _call("delta", 64, 64, kind="rwkv7", **long)),
        ("delta-kda", _call("delta", 128, 128, kind="kda", **long)),
        ("linear-exp", _call("linear", 96, 192, kind="exp", **long)),
        ("attention-labels", _call("attention", 64, 64, labels=4, **long)),
    )
    for name, settings in races:
        times = 200 if "fp32" in name else 50
        yield case(f"race/{name}", "race", settings | {"repetitions": times}, 20, 60)
    for mixer in MIXERS:
        yield case(f"waits/{mixer}", "no_waits", {"mixer": mixer, "length": 2048, "device": "cuda"}, 10, 60)
    odd: Settings = {"batch": 1, "length": 333, "heads": 3}
    for dtype in ("bf16", "fp32", "fp16"):
        for engine, dim, more in ODD:
            settings = _call(engine, dim, dim, dtype, **odd, **more)
            yield case(f"unaligned/{engine}-{dtype}", "unaligned", settings, 12, 60)
    graphs = ("attention/documents-64", "linear/exp-96-192", "delta/rwkv7-64", "scatter/documents-64")
    for name in graphs:
        yield case(f"graph/{name}", "compiled_engine", dict(CALLS)[name], 20, 90)
    for mixer in MIXERS:
        yield case(f"compiled/{mixer}", "compiled_mixer", {"mixer": mixer, "length": 1024, "device": "cuda"}, 25, 120)
    for name in graphs:
        yield case(f"memory/{name}", "memory_checker", dict(CALLS)[name] | {"length": 200}, 40, 120)
    sizes = {"length": 131072 + 64, "heads": 128, "dim": 128, "tail": 512}
    yield case("large-offsets", "large_offsets", sizes, 10, 60, alone=True)


SPEED_SHAPES: Sequence[tuple[str, Settings]] = (
    ("attention", {"length": LENGTH, "dim": 128}),
    ("linear", {"length": 8192}),
    ("delta", {"length": 4096}),
    ("attention", {"length": LENGTH, "dim": 64}),
    ("linear", {"length": LENGTH}),
    ("delta", {"length": LENGTH}),
    ("attention", {"length": 65536, "dim": 128}),
    ("linear", {"length": 65536}),
    ("delta", {"length": 65536}),
    ("attention", {"length": 4096, "dim": 128}),
)
"""Those of the bars come first."""

SLOW_TO_COMPILE = ("flex",)
"""Peers that compile for each shape; they come after everything else."""


def _warm() -> Iterator[Case]:
    shapes = dict(reversed(SPEED_SHAPES))
    for benchmark, own in BENCHMARKS.items():
        for family in own.families:
            if family.startswith(("fla", "mlstm", "simple")):
                settings = {"benchmark": benchmark, "family": family, **shapes[benchmark]}
                yield Case("warm", f"warm/{family}", f"{HERE}.speed.warm", settings, seconds=25, most=90)


def _speed() -> Iterator[Case]:
    for slow in (False, True):
        for direction in (TRAINING, FORWARD):
            for benchmark, shape in SPEED_SHAPES:
                families = [f for f in BENCHMARKS[benchmark].families if (f in SLOW_TO_COMPILE) == slow]
                if not families:
                    continue
                place = "-".join(str(value) for value in shape.values())
                settings = {"benchmark": benchmark, "families": families, "direction": direction, **shape}
                settings |= {"seconds": 0.25, "limit": 2.0}
                name = f"speed/{benchmark}-{place}-{direction}{'-flex' if slow else ''}"
                yield Case(
                    "speed", name, f"{HERE}.speed.compare", settings, seconds=40 if slow else 12, most=90, alone=True
                )


def _training() -> Iterator[Case]:
    sizes: Settings = {"words": ["model=125m"], "batch": 2, "length": LENGTH, "device": "cuda"}
    first = MIXERS[:9]
    for mixers, compiled in ((first, False), (first[:2], True), (MIXERS[9:], False), (first[2:], True)):
        for mixer in mixers:
            name = f"training/{mixer}{'-compiled' if compiled else ''}"
            settings = sizes | {"mixer": mixer, "compiled": compiled, "count": 5}
            seconds, most = (40, 120) if compiled else (12, 60)
            yield Case("training", name, f"{HERE}.training.steps", settings, seconds, most, alone=True)
        if mixers is first and not compiled:
            words = ["mixer=flash", "model=125m", "seq_len=16384", "data=copying", "batch_size=2", "max_steps=10"]
            words += ["loop.validate_every=null", "data.validation_tokens=32768"]
            settings = {"words": words, "seconds": 100.0}
            yield Case("training", "training/train.py", f"{HERE}.training.command", settings, 45, 110, alone=True)


def _on_a_cpu() -> Iterator[Case]:
    sizes = {"batch": 1, "length": 40, "heads": 2, "dim": 16, "value_dim": 16, "dtype": "fp32", "device": "cpu"}
    for name, more in (
        ("attention/documents", {"engine": "attention", "documents": 2}),
        ("attention/labels", {"engine": "attention", "labels": 3}),
        ("linear/exp", {"engine": "linear", "kind": "exp", "documents": 2}),
        ("delta/rwkv7", {"engine": "delta", "kind": "rwkv7", "documents": 2}),
        ("scatter/documents", {"engine": "scatter", "features": 16, "block_size": 16, "documents": 2}),
    ):
        yield Case("correctness", f"correctness/{name}", f"{HERE}.correctness.check", sizes | more, seconds=8, most=120)
