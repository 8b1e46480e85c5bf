"""The public function of attention with a probe."""

import torch

from longmix_kernels.attention import checks
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.op import BACKENDS, bounds_of, check_company, check_values
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.probe_cost import call_flops
from longmix_kernels.attention.probe_inputs import ProbeInputs
from longmix_kernels.attention.probe_reference import reference_forward
from longmix_kernels.launch import with_room
from longmix_kernels.operators import deferred, definition, differentiable
from longmix_kernels.runtime import backend_of_call


def probe_attention(
    query: torch.Tensor,
    probe: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    query_rows: torch.Tensor | None = None,
    key_rows: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute softmax attention whose weights a probe of each row tilts along the keys (Parallax, arXiv 2605.29157).

    With p the weights of softmax attention, r_i the probe, t_ij = r_i . k_j and e_i = sum_j p_ij t_ij, row i returns
    sum_j p_ij (1 + e_i - t_ij) v_j. A probe of 0 leaves softmax attention. The weights of a row always sum to 1; they
    may be negative. All is float32, or float64 for float64 inputs, and differentiable once in all four tensors.
    With fewer queries than keys, the queries are the last rows. A row that sees no key has output 0.

    Args:
        query: [B, Tq, Hq, D], float16, bfloat16, float32 or float64.
        probe: [B, Tq, Hq, D], same dtype; `scale` is no factor on its products.
        key: [B, Tk, Hkv, D], same dtype; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        value: [B, Tk, Hkv, Dv], same dtype.
        causal, window, lo, hi, query_rows, key_rows, alibi_slopes, document_ids: as in `attention`. `query_rows` is
            about probes too.
        scale: the factor on query . key, D ** -0.5 by default.
        backend: "reference" (the definition, memory Tq * Tk), "blocked" (tiles, memory linear in Tq + Tk) or "triton"
            (the same on a CUDA device; no float64, head dimensions up to 128). None picks "triton" where it covers the
            call on a CUDA device, and "blocked" elsewhere.

    Returns:
        The output [B, Tq, Hq, Dv] in the dtype of `query`.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or excludes another; as in `attention`.
    """
    checks.check_inputs(query, key, value)
    checks.check_probe(query, probe)
    checks.check_rows(query, key, lo=lo, hi=hi, query_rows=query_rows, key_rows=key_rows)
    if alibi_slopes is not None:
        checks.check_slopes(query, alibi_slopes, causal)
    given = {"window": window, "document_ids": document_ids, "causal=False": None if causal else 0}
    check_company(given, {"lo": lo, "hi": hi, "query_rows": query_rows, "key_rows": key_rows})
    backend = backend_of_call(backend, BACKENDS, checks.PROBE_MAX_DIM, query=query, value=value)
    if document_ids is not None:
        checks.check_document_ids(key, document_ids)
    lo, hi = bounds_of(query, key, causal, window, document_ids, lo, hi, backend == "triton")
    pattern = Pattern(lo, hi, query_rows, key_rows, alibi_slopes, None, causal, window)
    inputs = Inputs(query, key, value, pattern, query.shape[-1] ** -0.5 if scale is None else scale)
    if backend == "reference" and not torch.compiler.is_compiling():
        check_values(inputs)
    return _IMPLEMENTATIONS[backend](ProbeInputs(probe, inputs))[0]


def _empty(call: ProbeInputs) -> tuple[torch.Tensor, ...]:
    probe, exact = call.probe, torch.promote_types(call.probe.dtype, torch.float32)
    outputs = (probe.new_empty(*probe.shape[:3], call.inputs.value.shape[3]) for _ in range(2))
    return *outputs, *(probe.new_empty(probe.shape[:3], dtype=exact) for _ in range(2))


_MODULES = {"blocked": ("probe_blocked", "probe_blocked"), "triton": ("triton_probe_forward", "triton_probe_backward")}

_IMPLEMENTATIONS = {"reference": definition(reference_forward)}
_IMPLEMENTATIONS |= {
    name: differentiable(
        f"longmix::probe_attention_{name}",
        ProbeInputs,
        forward=with_room(deferred(f"longmix_kernels.attention.{modules[0]}.{name}_forward")),
        backward=with_room(deferred(f"longmix_kernels.attention.{modules[1]}.{name}_backward")),
        empty=_empty,
        results=4,
        incoming=1,
        saved=(0, 1, 2, 3),
        outgoing=4,
        flops=call_flops,
        check=lambda call: check_values(call.inputs),
    )
    for name, modules in _MODULES.items()
}
