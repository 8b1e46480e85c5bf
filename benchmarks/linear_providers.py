"""Whom `benchmarks.linear` compares: our scalar-gated linear attention, and the implementations of others.

All begin with the same query, key and value, and gates before their activation, [B, T, H, ...] with gates in float32.
Activations of gates run inside the timed calls. What wants heads before tokens gets it so before the clock runs.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from benchmarks import attention_providers
from benchmarks import linear_work as work
from benchmarks.comparison import Provider, Workload, both_passes
from benchmarks.recurrences import StateShape, package_missing
from longmix_kernels.linear import linear_attention
from longmix_kernels.linear.cost import default_chunk

FORGET_BIAS = 3.0
"""Mean of the forget gates before the sigmoid: a token is remembered for some twenty more."""

ATTENTION_DIM = 128
NATIVE_CHUNKS, XL_CHUNKS, GLA_CHUNK = (64, 128), (128, 256), 64


class LinearShape(StateShape):
    """What is computed, and the inputs of all providers."""

    @functools.cached_property
    def tensors(self) -> list[torch.Tensor]:
        """Query, key, value, input gate, forget gate and the gradient of the output; the same for every provider."""
        normal = self.drawn()
        query, key = (normal(self.key_dim, dtype=self.dtype) for _ in range(2))
        value, grad = (normal(self.value_dim, dtype=self.dtype) for _ in range(2))
        return [query, key, value, normal(), FORGET_BIAS + normal(), grad]

    @functools.cached_property
    def head_first(self) -> list[torch.Tensor]:
        """The tensors as [B, H, T, ...], contiguous."""
        return [x.transpose(1, 2).contiguous() for x in self.tensors]

    @functools.cached_property
    def attention(self) -> attention_providers.Shape:
        """Softmax attention of the same width as the output, in heads of up to `ATTENTION_DIM`."""
        columns = self.heads * self.value_dim
        dim = math.gcd(columns, ATTENTION_DIM)
        return attention_providers.Shape(self.batch, self.length, columns // dim, dim, self.dtype, self.device)

    def workload(
        self,
        function: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        grad: torch.Tensor,
        chunk: int | None,
        *,
        gates: int,
        normalize: bool = False,
    ) -> Workload:
        """What is to be timed.

        Args:
            function: takes `inputs`.
            grad: gradient of its result.
            chunk: tokens of a chunk; None for those that the implementation chooses.
            gates, normalize: as `work.moved_bytes` has them.
        """
        sizes = self.key_dim, self.value_dim
        sequences, counted = self.batch * self.heads, chunk or default_chunk(*sizes, self.length)
        return Workload(
            both_passes(function, inputs, grad),
            work.recurrence_flops(sequences * self.length, *sizes),
            columns={"chunk_size": chunk},
            bytes=work.moved_bytes(
                sequences, self.length, *sizes, counted, gates=gates, normalize=normalize, size=self.dtype.itemsize
            ),
        )


def _gated(normalize: bool, chunk: int | None, shape: LinearShape) -> Workload:
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, forget: torch.Tensor
    ) -> torch.Tensor:
        log_decay, log_input = F.logsigmoid(forget), gate if normalize else F.logsigmoid(gate)
        return linear_attention(
            query, key, value, log_decay=log_decay, log_input=log_input, normalize=normalize, chunk_size=chunk
        )[0]

    *inputs, grad = shape.tensors
    return shape.workload(attend, inputs, grad, chunk, gates=2, normalize=normalize)


def _decay(chunk: int | None, shape: LinearShape) -> Workload:
    log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(shape.heads, device=shape.device).float())))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return linear_attention(query, key, value, log_decay=log_decay, chunk_size=chunk)[0]

    query, key, value, *_, grad = shape.tensors
    return shape.workload(attend, [query, key, value], grad, chunk, gates=0)


def _mlstm(kernel: str, normalize: bool, chunk: int, shape: LinearShape) -> Workload:
    if shape.device.type == "cuda":
        # Otherwise a few lengths would exhaust the number of versions that torch compiles of its gates.
        torch.compiler.reset()
    function = importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel(f"chunkwise--{kernel}")
    options = {} if normalize else {"normalize": False}
    attend = functools.partial(function, chunk_size=chunk, autocast_kernel_dtype=shape.dtype, **options)
    *inputs, grad = shape.head_first
    return shape.workload(attend, inputs, grad, chunk, gates=2, normalize=normalize)


def _simple_gla(shape: LinearShape) -> Workload:
    function = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, forget: torch.Tensor) -> torch.Tensor:
        return function(query, key, value, F.logsigmoid(forget))[0]

    query, key, value, _, forget, grad = shape.tensors
    return shape.workload(attend, [query, key, value, forget], grad, GLA_CHUNK, gates=1)


def _native_missing(device: torch.device) -> str:
    return "is for the CPU" if device.type != "cpu" else package_missing("mlstm_kernels.torch")


def _xl_missing(device: torch.device) -> str:
    if device.type != "cuda":
        return "needs CUDA"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9):
        return f"needs Triton below 3.9, which still had make_block_ptr; here is {triton.__version__}"
    return package_missing("mlstm_kernels.torch")


def _gla_missing(device: torch.device) -> str:
    return "needs CUDA" if device.type != "cuda" else package_missing("fla.ops.simple_gla")


def _partial_chunk(chunk: int, shape: LinearShape, direction: str) -> str:
    return f"skipped: T must be a multiple of the chunk size {chunk}" if shape.length % chunk else ""


OURS = ("exp", "sig", "decay")
NATIVE, XL_EXP, XL_SIG, GLA = "mlstm-native", "mlstm-xl-exp", "mlstm-xl-sig", "simple-gla"
SDPA = ("sdpa-flash", "sdpa-cudnn")
FAMILIES = (*OURS, NATIVE, XL_EXP, XL_SIG, GLA, *SDPA)
BEST_OF = (NATIVE, XL_EXP, XL_SIG)
"""Families whose chunk sizes are summed up by the fastest."""

LEGEND = f"""\
ours:  exp            mLSTM with exponential input gates and a normaliser
       sig            mLSTM with sigmoid input gates and no normaliser
       decay          a constant decay per head and no gates, as in retention
       *-C            the same with chunks of C tokens, instead of what the implementation chooses
peers: {NATIVE}   mlstm-kernels' chunkwise--native_autograd (exp), with chunks of C tokens and the fastest of them
       {XL_EXP}   its chunkwise--triton_xl_chunk; treats the normaliser as a constant, and its gradients are wrong with
                      chunks above 128 tokens
       {XL_SIG}   its chunkwise--triton_xl_chunk_siging, normalize=False
       {GLA}     fla's chunk_simple_gla: like sig, without input gates
       sdpa-*         torch's causal softmax attention of the same width, in heads of up to {ATTENTION_DIM}"""


def providers(chunk_sizes: Sequence[int]) -> dict[str, list[Provider]]:
    """All providers by family; with `chunk_sizes` those whose chunk size can be chosen have one for each of them."""
    partial = functools.partial
    ours: dict[str, Callable[[int | None, LinearShape], Workload]] = {
        "exp": partial(_gated, True),
        "sig": partial(_gated, False),
        "decay": _decay,
    }
    mlstm = (
        (NATIVE, "native_autograd", True, NATIVE_CHUNKS, _native_missing),
        (XL_EXP, "triton_xl_chunk", True, XL_CHUNKS, _xl_missing),
        (XL_SIG, "triton_xl_chunk_siging", False, XL_CHUNKS, _xl_missing),
    )
    every: dict[str, list[Provider]] = {}
    for name, build in ours.items():
        sizes = [Provider(f"{name}-{chunk}", partial(build, chunk)) for chunk in chunk_sizes]
        every[name] = [Provider(name, partial(build, None)), *sizes]
    for name, kernel, normalize, usual, missing in mlstm:
        every[name] = [
            Provider(
                f"{name}-{chunk}", partial(_mlstm, kernel, normalize, chunk), missing, partial(_partial_chunk, chunk)
            )
            for chunk in chunk_sizes or usual
        ]
    every[GLA] = [Provider(GLA, _simple_gla, _gla_missing)]
    attention = attention_providers.providers(flex=False)
    for name in SDPA:
        every[name] = [Provider(name, partial(_softmax, attention[name]), attention[name].missing)]
    return every


def _softmax(provider: Provider, shape: LinearShape) -> Workload:
    return provider.build(shape.attention)
