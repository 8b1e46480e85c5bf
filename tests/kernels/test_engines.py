"""What holds for all engines alike: how they are called, what they refuse, and how their kernels are launched."""

import ast
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from engine_contract import assert_every_entry, assert_override_ends, run_python

import longmix_kernels
from longmix_kernels import attention, delta_rule, linear_attention, scatter_attention
from longmix_kernels.attention import launch as attention_launch
from longmix_kernels.attention.inputs import Inputs as AttentionInputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.delta import launch as delta_launch
from longmix_kernels.delta.inputs import Inputs as DeltaInputs
from longmix_kernels.linear import launch as linear_launch
from longmix_kernels.linear.inputs import Inputs as LinearInputs
from longmix_kernels.scatter import launch as scatter_launch
from longmix_kernels.scatter.inputs import Inputs as ScatterInputs

QUERY, LOGS, GATE = torch.zeros(1, 20, 2, 16), torch.zeros(1, 20, 2, 6), torch.zeros(1, 20, 2)
NONE = (None,)


@dataclass(frozen=True)
class Engine:
    """An engine: its function, what a call needs besides, the largest head dimension of its kernels, and a launch."""

    function: Callable
    options: dict[str, Any]
    max_dim: int
    launch: ModuleType
    inputs: Any
    kernels: tuple[str, str]
    config: Any


ENGINES = {
    "attention": Engine(
        attention,
        {},
        256,
        attention_launch,
        AttentionInputs(QUERY, QUERY, QUERY, Pattern(), 1.0),
        ("forward", "grad_query"),
        attention_launch.LaunchConfig(16, 16, 1, 1),
    ),
    "linear": Engine(
        linear_attention,
        {"log_decay": torch.zeros(2)},
        512,
        linear_launch,
        LinearInputs(QUERY, QUERY, QUERY, GATE, *NONE * 8, False, 1.0, None),
        ("output", "grad_query"),
        linear_launch.LaunchConfig(16, 16, 16, 1, 1),
    ),
    "delta": Engine(
        delta_rule,
        {"log_decay": torch.zeros(1, 20, 2)},
        256,
        delta_launch,
        DeltaInputs(QUERY, QUERY, QUERY, QUERY, *NONE * 5, 1.0, None, -0.5),
        ("prepare", "grad_key"),
        delta_launch.LaunchConfig(16, 16, 2, 1),
    ),
    "scatter": Engine(
        scatter_attention,
        {"block_size": 4, "past_blocks": 0},
        256,
        scatter_launch,
        ScatterInputs(QUERY, QUERY, QUERY, LOGS, LOGS, *NONE * 4, 4, 0, 1.0),
        ("merge", "grad_query"),
        scatter_launch.LaunchConfig(16, 16, 16, 4, 2),
    ),
}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
on_cpu = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")


def call(engine: Engine, query: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """The output; decays have the dtype that goes with the query's."""
    exact = torch.promote_types(query.dtype, torch.float32)
    others = {name: x.to(exact) if isinstance(x, torch.Tensor) else x for name, x in engine.options.items()}
    result = engine.function(query, query, value, **others, **options)
    return result if isinstance(result, torch.Tensor) else result[0]


COMMON = {
    "inputs": ("Inputs",),
    "checks": ("TRITON_MAX_DIM", "check_inputs"),
    "op": ("BACKENDS", "_empty", "_IMPLEMENTATIONS"),
    "reference": ("reference_forward",),
    "blocked": ("blocked_forward", "blocked_backward"),
    "triton_forward": ("triton_forward",),
    "triton_backward": ("triton_backward",),
    "launch": ("KERNELS", "WIDTHS", "LaunchConfig", "TABLE", "table_entry", "Call"),
    "cost": ("FORWARD", "BACKWARD", "call_flops", "Setting", "kernel_work"),
    "report": ("NOTE", "Build", "table_builds", "add_options", "builds", "costs"),
}
"""By module, the names that every engine defines, in this order; what an engine has besides may lie between."""

ARGUMENTS = {
    "reference_forward": ["inputs"],
    "blocked_forward": ["inputs"],
    "triton_forward": ["inputs"],
    "blocked_backward": ["inputs", "grad_output"],
    "triton_backward": ["inputs", "grad_output"],
    "_empty": ["inputs"],
    "call_flops": ["inputs"],
    "table_entry": ["kernel", "architecture", "size"],
    "kernel_work": ["setting"],
    "table_builds": ["architectures"],
    "add_options": ["parser"],
    "builds": ["parser", "options"],
    "costs": ["options"],
}
"""By function, the arguments with which every engine's begins."""


def definitions(engine: str, module: str) -> dict[str, list[str]]:
    """The names that a module of an engine defines or takes over, in order, and the arguments of functions."""
    text = (Path(longmix_kernels.__file__).parent / engine / f"{module}.py").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [argument.arg for argument in node.args.args]
        elif isinstance(node, ast.ClassDef):
            found[node.name] = []
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name: [] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: [] for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_have_the_same_functions_in_the_same_order(engine):
    assert {path.parent.name for path in Path(longmix_kernels.__file__).parent.glob("*/op.py")} == set(ENGINES)
    for module, wanted in COMMON.items():
        found = definitions(engine, module)
        assert [name for name in found if name in wanted] == list(wanted), module
        for name in wanted:
            first = ARGUMENTS.get(name, [])
            assert found[name][: len(first)] == first, name
    public = ENGINES[engine].function.__name__
    names = list(definitions(engine, "op"))
    assert names.index("BACKENDS") < names.index(public) < names.index("_empty")
    blocked = definitions(engine, "blocked")["blocked_backward"]
    triton = definitions(engine, "triton_backward")["triton_backward"]
    shared = min(4, len(blocked), len(triton))  # what a backend saves for its backward comes last
    assert blocked[:shared] == triton[:shared]


def test_the_package_exports_every_engine():
    assert {engine.function for engine in ENGINES.values()} == {
        getattr(longmix_kernels, name) for name in longmix_kernels.__all__
    }


@every_engine
def test_arguments_have_one_order(engine):
    names = list(inspect.signature(engine.function).parameters)
    shared = ("initial_state", "carried_state", "document_ids", "scale", "backend")
    assert names[:3] == ["query", "key", "value"] and names[-1] == "backend"
    assert [name for name in names if name in shared] == [name for name in shared if name in names]


@every_engine
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_the_scale_is_one_over_the_root_of_the_head_dimension(engine, backend):
    torch.manual_seed(0)
    query, value = torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2, 8)
    default, given = (call(engine, query, value, backend=backend, **scale) for scale in ({}, {"scale": 0.25}))
    assert torch.equal(default, given) and not torch.equal(
        default, call(engine, query, value, backend=backend, scale=1.0)
    )


@pytest.mark.slow
def test_engines_run_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "import longmix_kernels as kernels\n"
        "x, decay = torch.ones(1, 4, 1, 8), torch.zeros(1, 4, 1)\n"
        "for run in (\n"
        "    lambda **backend: kernels.attention(x, x, x, **backend),\n"
        "    lambda **backend: kernels.linear_attention(x, x, x, log_decay=decay, **backend),\n"
        "    lambda **backend: kernels.delta_rule(x, x, x, log_decay=decay, **backend),\n"
        "    lambda **backend: kernels.scatter_attention(x, x, x, x, x, block_size=1, past_blocks=0, **backend),\n"
        "):\n"
        "    run()\n"
        "    try: run(backend='triton')\n"
        "    except ValueError as error: print(error)\n"
    )
    done = run_python(Path(__file__).parent, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("backend='triton' got tensors on cpu") == len(ENGINES)


@on_cpu
@every_engine
def test_cpu_tensors_need_the_interpreter(engine):
    with pytest.raises(ValueError, match=r"got tensors on cpu; allowed are a CUDA device, or .* TRITON_INTERPRET=1"):
        call(engine, QUERY, QUERY, backend="triton")


@every_engine
@pytest.mark.parametrize(
    ("dtype", "wide", "message"),
    [
        (torch.float64, None, r"query of dtype torch.float64; allowed are torch.float16, torch.b"),
        (torch.float32, "query", r"query with head dimension {0}; allowed are 1 to {1}"),
        (torch.float32, "value", r"value with head dimension {0}; allowed are 1 to {1}"),
    ],
    ids=["float64", "query", "value"],
)
def test_what_kernels_do_not_cover_is_refused(engine, dtype, wide, message):
    dims = [engine.max_dim + 1 if name == wide else 16 for name in ("query", "value")]
    query, value = (torch.zeros(1, 20, 2, dim, dtype=dtype) for dim in dims)
    with pytest.raises(ValueError, match=r"backend='triton' got " + message.format(max(dims), engine.max_dim)):
        call(engine, query, value, backend="triton")


@every_engine
def test_every_architecture_has_every_entry(engine):
    assert_every_entry(engine.launch)


@every_engine
def test_an_override_ends_with_its_context(engine):
    assert_override_ends(engine.launch.Call(engine.inputs), *engine.kernels, engine.config)


@every_engine
def test_inputs_pass_through_an_operator_and_back(engine):
    """The schema names what `flat` gives, in that order."""
    inputs = engine.inputs
    flat = inputs.flat()
    names = [argument.split()[-1].removesuffix("=None") for argument in inputs.schema().split(", ")]
    assert len(names) == len(flat) and names[:3] == ["query", "key", "value"]
    again = type(inputs).of(flat).flat()
    assert all(a is b or a == b for a, b in zip(flat, again, strict=True))
