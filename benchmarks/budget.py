"""What a layer of every mixer costs that no clock has to measure: `python -m benchmarks.budget`.

The code that trains is run on fake tensors of the size of `model=125m`, as on a GPU: in bf16-mixed, eager, with the
engines that a CUDA device gets. A layer's figures are the difference of a model of three layers and one of two, so that
what is computed once for all layers does not count. Figures are of plain rows and of rows that pack documents. Engines
launch for a simulated H200, which runs nothing.

    operators      operators of torch besides views, each a launch or more where nothing is compiled
    engine_calls   calls of our kernels' operators
    launches       launches of our Triton kernels
    saved_bytes    kept from the forward to the backward pass, for each token; weights and their copies aside
    synchronisations   operators that wait for the device; those of all layers and of the model around them. "generated"
                       rows have those of reading a prompt, and of the token after it
    specialisation_keys    kernels that Triton compiles for two layers, plain and packed rows, and all of `SHAPES`

`--update` writes what it finds to `results/budget.json`; a test lets no figure rise above it.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import results
from benchmarks.command import RESULTS, Parser
from longmix.composing import composed
from longmix.config import ModelConfig
from longmix.data.loaders import document_starts
from longmix.files import replace_json
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.planning.fakes import gpu_functions
from longmix_kernels.simulated import FakeCalls, SimulatedGPU, simulated_gpu

CONFIGS = results.ROOT / "configs"
BUDGET = RESULTS / "budget.json"
LENGTH = 4096
LAYERS = 2, 3
PROMPT = 1000
KINDS = {"plain": False, "packed": True}
"""Kinds of rows, and whether they pack documents."""

SHAPES = (1, 1000), (2, 1001), (3, 1008), (2, 1032)
"""Batch sizes and lengths, odd ones and multiples of 8 and 16, for which a kernel should be one and the same."""

ARCHITECTURE, PROCESSORS = 90, 132
"""Of the H200."""

Figures = dict[str, float]
"""Of one mixer and one kind of rows, by name; "all" are all kinds together."""

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal", "is_nonzero"}
"""Operators whose result, or its shape, the host has to read."""

VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "unsqueeze",
    "squeeze",
    "expand",
    "permute",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unbind",
    "detach",
    "alias",
    "as_strided",
    "_reshape_alias",
    "chunk",
    "unflatten",
    "diagonal",
    "narrow",
    "lift_fresh",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "promote_types",
}
"""Operators that launch nothing."""


class Count(TorchDispatchMode):
    """Counts operators by name: torch's, our engines', and those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.engine_calls: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count and call."""
        library, _, name = function._schema.name.partition("::")
        if library == "longmix":
            self.engine_calls[name] += 1
        elif library != "prim" and name.rstrip("_") not in VIEWS:
            self.operators[name] += 1
        self.waiting[name] += name in WAITING
        return function(*args, **(kwargs or {}))

    def figures(self) -> Figures:
        """Totals."""
        return {
            "operators": self.operators.total(),
            "engine_calls": self.engine_calls.total(),
            "synchronisations": self.waiting.total(),
        }


def mixers() -> list[str]:
    """The files of `configs/mixer`."""
    return sorted(path.stem for path in (CONFIGS / "mixer").glob("*.yaml"))


def measured(mixer: str) -> dict[str, Figures]:
    """The figures of a layer of `mixer`, for "plain", "packed" and "all" rows."""
    found = {kind: _of_a_layer(mixer, packed) for kind, packed in KINDS.items()}
    return {**found, "generated": generation(mixer), "all": {"specialisation_keys": specialisation_keys(mixer, SHAPES)}}


def specialisation_keys(mixer: str, shapes: Sequence[tuple[int, int]]) -> int:
    """How many kernels Triton compiles for training steps of these batch sizes and lengths."""
    with _model(mixer, LAYERS[0]) as (model, gpu):
        for batch, length in shapes:
            with unset_fake_temporarily():
                _prepare(model, length)
            for packed in KINDS.values():
                _forward(model, batch, length, packed).backward()
    return gpu.num_variants()


def generation(mixer: str, *words: str) -> Figures:
    """How often the device is waited for while a prompt is read, and for a token after it, with two layers.

    Args:
        mixer: its name.
        words: further words of the configuration.
    """
    found = {}
    with _model(mixer, LAYERS[0], *words) as (model, _), torch.no_grad():
        with unset_fake_temporarily():
            _prepare(model, PROMPT)
        state = model.eval().decoding_state(1)
        for name, length in {"prompt": PROMPT, "token": 1}.items():
            with Count() as count, contextlib.suppress(DataDependentOutputException):  # counted, and then raised
                state = model(torch.empty(1, length, dtype=torch.int64), state=state).state
            found[f"{name}_synchronisations"] = count.figures()["synchronisations"]
    return found


def _of_a_layer(mixer: str, packed: bool) -> Figures:
    few, many = (_of_a_model(mixer, layers, packed) for layers in LAYERS)
    layers = LAYERS[1] - LAYERS[0]
    return {name: many[name] if name == "synchronisations" else (many[name] - few[name]) / layers for name in many}


@contextmanager
def _model(mixer: str, layers: int, *words: str) -> Iterator[tuple[LanguageModel, SimulatedGPU]]:
    """A model of fake weights, and the GPU that it launches for while the context lasts."""
    with torch.device("meta"):
        model = build_model(_config(f"mixer={mixer}", f"model.num_layers={layers}", *words), 512)
    _prepare(model, LENGTH)
    with simulated_gpu(ARCHITECTURE, processors=PROCESSORS) as gpu, ExitStack() as fakes:
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), gpu_functions(), FakeCalls()):
            fakes.enter_context(mode)
        model._apply(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu"))
        yield model.train(), gpu


@functools.lru_cache(2)  # a mixer is built with either number of layers several times
def _config(*words: str) -> ModelConfig:
    return ModelConfig.of(composed("train", ["model=125m", *words]).content)


def _prepare(model: LanguageModel, length: int) -> None:
    for part in model.mixers():
        part.prepare(length)


def _forward(model: LanguageModel, batch: int, length: int, packed: bool) -> Tensor:
    """The loss of fake rows."""
    tokens = torch.empty(batch, length, dtype=torch.int64)
    documents = {}
    if packed:
        starts = torch.from_numpy(document_starts(np.zeros((batch, length), np.int32)))
        documents = {
            "document_ids": torch.empty(batch, length, dtype=torch.int32),
            "document_starts": torch.empty_like(starts),
        }
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        output = model(tokens, tokens, **documents)
    return output.token_losses.mean() + sum(output.losses.values())


def _of_a_model(mixer: str, layers: int, packed: bool) -> Figures:
    """The figures of a whole model, of one row."""
    with _model(mixer, layers) as (model, gpu):
        found = _of_a_step(model, packed)
    return {**found, "launches": gpu.num_launches()}


def _of_a_step(model: LanguageModel, packed: bool) -> Figures:
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with Count() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = _forward(model, 1, LENGTH, packed)
    matrices = {weight.shape for weight in model.parameters() if weight.dim() > 1}
    matrices |= {shape[::-1] for shape in matrices}
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    sizes = [x.untyped_storage().nbytes() for key, x in kept.items() if key not in own and x.shape not in matrices]
    with Count() as backward:
        loss.backward()
    first, second = forward.figures(), backward.figures()
    return {
        "forward_operators": first["operators"],
        "operators": first["operators"] + second["operators"],
        "forward_engine_calls": first["engine_calls"],
        "engine_calls": first["engine_calls"] + second["engine_calls"],
        "synchronisations": first["synchronisations"] + second["synchronisations"],
        "saved_bytes": sum(sizes) / LENGTH,
    }


def over(found: dict[str, Figures], budget: dict[str, Figures]) -> list[str]:
    """What of a mixer's figures exceeds its budget, as sentences."""
    return [
        f"{kind} rows: {name} {value:g} is above {budget[kind][name]:g}"
        for kind, figures in found.items()
        for name, value in figures.items()
        if value > budget.get(kind, {}).get(name, math.inf)
    ]


def table(found: dict[str, dict[str, Figures]]) -> str:
    """Markdown, plain and packed rows side by side."""
    columns = ("forward_operators", "operators", "engine_calls", "launches", "saved_bytes", "synchronisations")
    names = [name.replace("_", " ") for name in ("mixer", *columns, "when generating", "specialisation_keys")]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for mixer, figures in found.items():
        plain, packed = figures["plain"], figures["packed"]
        cells = [f"{plain[name]:,.0f} / {packed[name]:,.0f}" for name in columns]
        cells.append(" / ".join(f"{count:,.0f}" for count in figures["generated"].values()))
        lines.append("| " + " | ".join([mixer, *cells, str(figures["all"]["specialisation_keys"])]) + " |")
    return "\n".join(lines) + "\n"


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="python -m benchmarks.budget", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("mixers", nargs="*", metavar="MIXER", help="default: all of configs/mixer")
    parser.add_argument("--update", action="store_true", help=f"write what is found to {BUDGET.name}")
    parser.add_argument("--out", type=Path, default=BUDGET, help="the table as JSON")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set; unset it, since Triton's interpreter compiles nothing")
    if unknown := set(options.mixers) - set(mixers()):
        parser.error(f"unknown mixer {', '.join(sorted(unknown))}; there are {', '.join(mixers())}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write on request; 1 if something rose."""
    options = parsed(arguments)
    budget = json.loads(options.out.read_text()) if options.out.exists() else {}
    found = {name: measured(name) for name in options.mixers or mixers()}
    print(table(found))
    risen = [f"{name}: {text}" for name in found if name in budget for text in over(found[name], budget[name])]
    for line in risen:
        print(line)
    if options.update:
        replace_json(options.out, dict(sorted((budget | found).items())))
        return 0
    return int(bool(risen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
