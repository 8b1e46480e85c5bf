"""Calls of the four engines with drawn inputs, as cases name them: one for every way in which mixers call an engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.command import DTYPES
from longmix.mixers.rwkv7 import DECAY_LIMIT
from longmix_kernels import attention, delta_rule, linear_attention, scatter_attention
from longmix_kernels.attention import order_by_label

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EngineCall:
    """A call that can be made with tensors of any dtype.

    Attributes:
        tensors: those that get a gradient, by name.
        run: of the tensors and a backend, the results that count.
    """

    tensors: Tensors
    run: Callable[[Tensors, str], tuple[torch.Tensor, ...]]

    def results(self, backend: str, tensors: Tensors | None = None) -> Tensors:
        """Outputs and, for gradients drawn with one seed, the gradients of all tensors."""
        leaves = {n: x.detach().requires_grad_() for n, x in (tensors or self.tensors).items()}
        outputs = self.run(leaves, backend)
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        # Rounded to bfloat16, so that calls in every dtype get the same numbers.
        grads = [torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype) for x in outputs]
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        named = {f"output {number}": x.detach() for number, x in enumerate(outputs)}
        return named | {f"gradient of {name}": x for name, x in zip(leaves, found, strict=True)}

    def exact(self) -> Tensors:
        """The tensors in float64."""
        return {name: x.detach().double() for name, x in self.tensors.items()}


class Draw:
    """Numbers [batch, length, heads, ...] from one generator, rounded to a dtype unless they are exact.

    Args:
        sizes: of the call: batch, length, heads.
        dtype: of what is rounded.
        device: of the tensors.
    """

    def __init__(self, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self._generator = torch.Generator(device).manual_seed(0)

    def exact(self, *columns: int, heads: int | None = None) -> torch.Tensor:
        """Normal numbers in float32."""
        batch, length, own = self.sizes
        size = batch, length, heads or own, *columns
        return torch.randn(size, generator=self._generator, device=self.device)

    def rounded(self, *columns: int, heads: int | None = None) -> torch.Tensor:
        """Normal numbers in the dtype of the call."""
        return self.exact(*columns, heads=heads).to(self.dtype)

    def documents(self, count: int) -> torch.Tensor | None:
        """Ids of so many documents of unequal lengths, int32 [batch, length]; None for one."""
        batch, length, _ = self.sizes
        if count < 2:
            return None
        ends = torch.linspace(0, 1, count + 1, device=self.device)[1:-1] ** 1.5 * length
        row = torch.bucketize(torch.arange(length, device=self.device).float(), ends)
        return row.int().expand(batch, length).contiguous()


def make(
    engine: str,
    *,
    batch: int,
    length: int,
    heads: int,
    dim: int,
    dtype: str,
    device: str,
    value_dim: int | None = None,
    **settings: Any,
) -> EngineCall:
    """The call of an engine that a case names; the engines' own settings are those of the functions below."""
    draw = Draw((batch, length, heads), DTYPES[dtype], torch.device(device))
    return _ENGINES[engine](draw, dim, value_dim or dim, **settings)


def _attention(
    draw: Draw,
    dim: int,
    value_dim: int,
    *,
    key_heads: int | None = None,
    documents: int = 1,
    window: int | None = None,
    labels: int = 0,
) -> EngineCall:
    """Causal attention, in documents, in a window, or among equal labels whose rows are gathered in the kernels."""
    tensors = {
        "query": draw.rounded(dim),
        "key": draw.rounded(dim, heads=key_heads),
        "value": draw.rounded(value_dim, heads=key_heads),
    }
    ids = draw.documents(documents)
    options: dict[str, Any] = {"window": window, "document_ids": ids}
    if labels:
        drawn = (draw.exact().abs() * 1e4).long() % labels
        options = order_by_label(drawn, num_labels=labels, document_ids=ids)._asdict()

    def run(x: Tensors, backend: str) -> tuple[torch.Tensor, ...]:
        return (attention(x["query"], x["key"], x["value"], backend=backend, **options),)

    return EngineCall(tensors, run)


def _linear(draw: Draw, dim: int, value_dim: int, *, kind: str, documents: int = 1) -> EngineCall:
    """Gates as those of mLSTM-exp, mLSTM-sig, or a constant decay for each head."""
    tensors = {"query": draw.rounded(dim), "key": draw.rounded(dim), "value": draw.rounded(value_dim)}
    if kind != "decay":
        tensors |= {"forget": 3 + draw.exact(), "input": draw.exact()}
    ids, heads = draw.documents(documents), draw.sizes[2]

    def run(x: Tensors, backend: str) -> tuple[torch.Tensor, ...]:
        gates: dict[str, Any] = {"normalize": kind == "exp"}
        if kind == "decay":
            exact = torch.promote_types(x["query"].dtype, torch.float32)
            rate = torch.arange(heads, device=x["query"].device, dtype=exact)
            gates["log_decay"] = torch.log1p(-(2.0 ** (-5 - rate % 8)))
        else:
            gates["log_decay"] = F.logsigmoid(x["forget"])
            gates["log_input"] = x["input"] if kind == "exp" else F.logsigmoid(x["input"])
        output, _ = linear_attention(x["query"], x["key"], x["value"], document_ids=ids, backend=backend, **gates)
        return (output,)

    return EngineCall(tensors, run)


def _delta(draw: Draw, dim: int, value_dim: int, *, kind: str, documents: int = 1) -> EngineCall:
    """Decays and removals as those of rwkv7, kda, gated_deltanet, deltanet and gla."""
    unit = F.normalize(draw.exact(dim), dim=-1).to(draw.dtype)
    tensors = {
        "query": draw.rounded(dim),
        "key": draw.rounded(dim),
        "value": draw.rounded(value_dim),
        "decay": draw.exact(*(() if kind == "gated_deltanet" else (dim,))),
        "rate": draw.exact(),
    }
    if kind == "deltanet":
        del tensors["decay"]
    if kind == "gla":
        del tensors["rate"]
    ids = draw.documents(documents)

    def run(x: Tensors, backend: str) -> tuple[torch.Tensor, ...]:
        query, exact = x["query"], torch.promote_types(x["query"].dtype, torch.float32)
        removal = unit.to(query.dtype)
        bound = {"rwkv7": -DECAY_LIMIT, "deltanet": 0.0}.get(kind)
        if kind == "rwkv7":
            decay = -DECAY_LIMIT * x["decay"].sigmoid()
        elif kind == "deltanet":
            decay = torch.zeros(query.shape[:3], dtype=exact, device=query.device)
        else:
            decay = -F.softplus(x["decay"])
        terms: dict[str, Any] = {}
        if kind != "gla":
            write = (x["rate"].sigmoid().unsqueeze(-1) * removal.to(exact)).to(query.dtype)
            terms = {"low_rank_read": -removal, "low_rank_write": write}
        output, state = delta_rule(
            query,
            x["key"],
            x["value"],
            log_decay=decay,
            document_ids=ids,
            min_log_decay=bound,
            backend=backend,
            **terms,
        )
        return output, state

    return EngineCall(tensors, run)


def _scatter(
    draw: Draw,
    dim: int,
    value_dim: int,
    *,
    features: int = 64,
    block_size: int = 128,
    past_blocks: int = 1,
    key_heads: int | None = None,
    documents: int = 1,
) -> EngineCall:
    """Exact blocks, and features of what lies before."""
    tensors = {
        "query": draw.rounded(dim),
        "key": draw.rounded(dim, heads=key_heads),
        "value": draw.rounded(value_dim, heads=key_heads),
        "query_features": draw.exact(features),
        "key_features": draw.exact(features, heads=key_heads),
    }
    ids = draw.documents(documents)

    def run(x: Tensors, backend: str) -> tuple[torch.Tensor, ...]:
        result = scatter_attention(
            *x.values(), block_size=block_size, past_blocks=past_blocks, document_ids=ids, backend=backend
        )
        return result.output, result.logsumexp

    return EngineCall(tensors, run)


_ENGINES: Mapping[str, Callable[..., EngineCall]] = {
    "attention": _attention,
    "linear": _linear,
    "delta": _delta,
    "scatter": _scatter,
}
