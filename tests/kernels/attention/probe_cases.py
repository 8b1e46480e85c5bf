"""What tests of attention with a probe share: a probe for each case, and the results of the definition in float64."""

import torch
from attention_cases import CASES, Case

from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.probe_inputs import ProbeInputs
from longmix_kernels.attention.probe_reference import reference_forward

RESULTS = ("output", "grad_probe", "grad_query", "grad_key", "grad_value")
PROBE_CASES = [case for case in CASES if not case.name.startswith("blocks")]


def probe_inputs(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], Pattern, float]:
    """Probe, query, key and value (with gradients wanted), the pattern, and the scale."""
    (query, key, value), pattern, scale = case.inputs(dtype)
    generator = torch.Generator().manual_seed(5)
    # t is of the size of 1, as the scores are.
    probe = case.dim**-0.5 * torch.randn(query.shape, generator=generator, dtype=torch.float64)
    return [probe.to(dtype).requires_grad_(), query, key, value], pattern, scale


def called(tensors: list[torch.Tensor], pattern: Pattern, scale: float) -> ProbeInputs:
    return ProbeInputs(tensors[0], Inputs(*tensors[1:], pattern, scale))


def incoming(output: torch.Tensor) -> torch.Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def expected_results(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """The definition in float64, on the inputs as the dtype holds them."""
    tensors, pattern, scale = probe_inputs(case, dtype)
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    output = reference_forward(called(tensors, pattern, scale))[0]
    return [output, *torch.autograd.grad(output, tensors, incoming(output))]
