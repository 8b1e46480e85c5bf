"""The cases every implementation of scalar-gated linear attention is held to, and how an error is measured."""

from dataclasses import dataclass, field, replace

import torch

from longmix_kernels.linear import LinearState

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
STATE = ("memory", "normalizer", "log_scale")
CARRIED = tuple(f"carried_{name}" for name in STATE)
INPUTS = ("query", "key", "value", "log_decay", "log_input", *STATE, *CARRIED)

REGIMES = {
    "init": (4.5, 0.75, -10.0, 0.5),
    "usual": (3.0, 1.0, 0.0, 1.0),
    "strong-input": (1.0, 2.0, 10.0, 4.0),
    "forgetful": (-2.0, 3.0, 0.0, 3.0),
}
"""Mean and standard deviation of the pre-activations of forget and input gate: the four gate regimes."""


@dataclass(frozen=True)
class Case:
    """One call."""

    name: str
    length: int = 100
    normalize: bool = True
    regime: str = "usual"
    gated: bool = True
    """Whether there is an input gate; without `normalize` it is a sigmoid."""
    with_state: bool = True
    with_carried: bool = False
    batch: int = 2
    heads: int = 2
    dim: int = 16
    value_dim: int = 24
    documents: tuple[int, ...] = field(default=())
    chunk_size: int | None = None

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor | None]:
        """The tensors named `INPUTS`, with gradients wanted; None for those that are missing."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
            return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)

        tokens, state = (self.batch, self.length, self.heads), (self.batch, self.heads)
        forget_mean, forget_std, input_mean, input_std = REGIMES[self.regime]
        gate = normal(*tokens, mean=input_mean, std=input_std)
        made: dict[str, torch.Tensor | None] = {
            "query": normal(*tokens, self.dim),
            "key": normal(*tokens, self.dim),
            "value": normal(*tokens, self.value_dim),
            "log_decay": torch.nn.functional.logsigmoid(normal(*tokens, mean=forget_mean, std=forget_std)),
            "log_input": gate if self.normalize else torch.nn.functional.logsigmoid(gate),
            "memory": normal(*state, self.dim, self.value_dim),
            "normalizer": normal(*state, self.dim),
            "log_scale": normal(*state),
            "carried_memory": normal(*state, self.dim, self.value_dim),
            "carried_normalizer": normal(*state, self.dim),
            "carried_log_scale": normal(*state) + 2.0,
        }
        absent = set() if self.gated else {"log_input"}
        absent |= set() if self.with_state else set(STATE)
        absent |= set() if self.with_carried else set(CARRIED)
        absent |= set() if self.normalize else {*STATE[1:], *CARRIED[1:]}
        exact = torch.promote_types(dtype, torch.float32)
        return {
            name: None if name in absent else x.to(dtype if i < 3 else exact).requires_grad_()
            for i, (name, x) in enumerate(made.items())
            if x is not None
        }

    def document_ids(self) -> torch.Tensor | None:
        """Ids of documents with these lengths, the last one filling up; batch row b starts b tokens in."""
        if not self.documents:
            return None
        ids = torch.repeat_interleave(torch.arange(len(self.documents)), torch.tensor(self.documents))
        ids = torch.cat([ids, torch.full((self.length + self.batch,), len(self.documents))])
        return torch.stack([ids[b : b + self.length] for b in range(self.batch)]).int()

    def options(self) -> dict[str, object]:
        """The keyword arguments of `linear_attention` that are no differentiable tensors."""
        return {
            "normalize": self.normalize,
            "document_ids": self.document_ids(),
            "chunk_size": self.chunk_size,
        }


def call(function, case: Case, inputs: dict[str, torch.Tensor | None], **options) -> list[torch.Tensor]:
    """Call `linear_attention` and return the output, the memory and, if normalised, the normaliser and log scale."""
    initial, carried = (LinearState(*(inputs.get(name) for name in names)) for names in (STATE, CARRIED))
    output, final = function(
        *(inputs[name] for name in INPUTS[:3]),
        log_decay=inputs["log_decay"],
        log_input=inputs["log_input"],
        initial_state=None if initial.memory is None else initial,
        carried_state=None if carried.memory is None else carried,
        **{**case.options(), **options},
    )
    return [output, *(x for x in final if x is not None)]


def gradients(results: list[torch.Tensor], inputs: dict[str, torch.Tensor | None], seed: int = 1) -> dict:
    """Gradients by input name, for random gradients of the output and of the returned state's *meaning*.

    Two implementations may divide a state differently between log scale and the rest, so what is differentiated is
    exp(log_scale) times the rest, divided by a constant.
    """
    output, *final = results
    generator = torch.Generator().manual_seed(seed)
    total = (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)).sum()
    for x in meaning(final):
        total = total + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
    wanted = {name: x for name, x in inputs.items() if x is not None}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


def meaning(final: list[torch.Tensor]) -> list[torch.Tensor]:
    """Memory and normaliser without their scale, measured against the largest scale so that nothing overflows."""
    if len(final) == 1:
        return final
    memory, normalizer, log_scale = final
    factor = (log_scale - log_scale.detach().amax().clamp(min=0.0)).exp()
    return [memory * factor[..., None, None], normalizer * factor[..., None]]


def assert_close(result: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Hold the RMS and the largest absolute error, each relative to the same measure of `expected`, to a tolerance."""
    result, expected = result.detach().double(), expected.detach().double()
    assert result.shape == expected.shape, f"{name}: {list(result.shape)} is not {list(expected.shape)}"
    assert result.isfinite().all(), f"{name} is not finite"
    error = result - expected
    for measure, of in (
        ("RMS", lambda x: x.square().mean().sqrt().item()),
        ("max-abs", lambda x: x.abs().max().item()),
    ):
        size = of(expected)
        assert of(error) <= tolerance * max(size, tolerance), (
            f"{name}: relative {measure} error {of(error) / max(size, 1e-300):.2e} > {tolerance:.0e}"
        )


def second_document(case: Case, start: int, strong: bool, seed: int = 5) -> dict[str, torch.Tensor | None]:
    """Inputs of which the second document, from `start` on, is always the same, and its input gates weak.

    Of the first only the decays are the same, so that sums of them round alike: all else comes from another seed. If
    `strong`, its input gates are far above those of the second, as far as a form can take that.
    """
    inputs, others = case.inputs(torch.float32), case.inputs(torch.float32, seed)
    for name in ("query", "key", "value", "log_input"):
        x, other = inputs[name].detach().clone(), others[name].detach()
        x[:, :start] = other[:, :start]
        if name == "log_input":
            x[:, start:] -= 5.0
            x[:, :start] += (100.0 if case.normalize else 5.0) * strong
        inputs[name] = x.requires_grad_()
    return inputs


def of_second_document(results: list[torch.Tensor], inputs: dict, start: int) -> dict[str, torch.Tensor]:
    """Its output, what the final state means, and gradients for random gradients of both, held to be 0 before it."""
    output, memory, *others = results
    wanted = {"output": output[:, start:], "memory": memory}
    if others:
        factor = others[1].detach().exp()
        wanted |= {"memory": memory * factor[..., None, None], "normalizer": others[0] * factor[..., None]}
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in wanted.values()]
    given = {name: x for name, x in inputs.items() if x is not None}
    found = dict(wanted)
    gradients = torch.autograd.grad(list(wanted.values()), list(given.values()), grads)
    for name, x in zip(given, gradients, strict=True):
        if name not in INPUTS[5:]:
            assert not x[:, :start].any(), name
            x = x[:, start:]
        found[f"gradient of {name}"] = x
    return found


def assert_second_document_forgets(function, case: Case, start: int, **options) -> None:
    """Hold what comes of it to be bitwise the same after any first document, and close to what it is on its own."""
    case = replace(case, documents=(start,), batch=1)
    found = []
    for strong in (True, False):
        inputs = second_document(case, start, strong)
        found.append(of_second_document(call(function, case, inputs, **options), inputs, start))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name

    alone = replace(case, documents=(), length=case.length - start)
    inputs = {
        name: x if x is None else (x if name in INPUTS[5:] else x[:, start:]).detach().double().requires_grad_()
        for name, x in inputs.items()
    }
    exact = of_second_document(call(function, alone, inputs, backend="reference"), inputs, 0)
    for name, x in exact.items():
        assert_close(found[0][name], x, TOLERANCE[torch.float32], name)


CASES = [
    *(Case(f"exp-T{n}", length=n) for n in (1, 15, 16, 17, 63, 100, 257, 1000)),
    *(Case(f"sig-T{n}", length=n, normalize=False) for n in (1, 15, 16, 17, 63, 100, 257, 1000)),
    *(Case(f"exp-{regime}", regime=regime) for regime in REGIMES),
    *(Case(f"sig-{regime}", regime=regime, normalize=False) for regime in REGIMES),
    *(Case(f"exp-{a}-{b}", dim=a, value_dim=b) for a, b in ((48, 80), (80, 48), (96, 16), (1, 3))),
    Case("sig-96-192", normalize=False, dim=96, value_dim=192, heads=1),
    Case("decay-only", normalize=False, gated=False),
    Case("exp-no-state", with_state=False),
    Case("sig-no-state", with_state=False, normalize=False),
    Case("exp-no-input-gate", gated=False, with_state=False),
    Case("exp-documents", documents=(13, 40, 3)),
    Case("sig-documents", documents=(13, 40, 3), normalize=False),
    Case("exp-documents-no-state", documents=(1, 1, 1, 30, 2), with_state=False, regime="strong-input"),
    Case("exp-documents-of-one-token", documents=(1,) * 60),
    *(
        Case(f"{'exp' if normalize else 'sig'}-carried-{'state' if state else 'no-state'}{name}", **kind, **case)
        for name, case in (
            ("", {"documents": (13, 40, 3), "chunk_size": 16}),
            ("-T600", {"documents": (300, 1, 160), "length": 600}),
        )
        for normalize, state in ((True, True), (False, False), (True, False))
        for kind in ({"with_carried": True, "with_state": state, "normalize": normalize},)
    ),
    Case("sig-documents-T1000", documents=(300, 1, 160, 239), length=1000, batch=1, normalize=False),
    *(Case(f"exp-chunk-{n}", chunk_size=n, length=300, documents=(129, 70)) for n in (16, 64, 128, 256, 512)),
    *(Case(f"sig-chunk-{n}", chunk_size=n, length=300, normalize=False) for n in (16, 64, 128, 256, 512)),
    *(Case(f"exp-T600-chunk-{n}", chunk_size=n, length=600, batch=1) for n in (256, 512)),
    Case("sig-T600-chunk-256-documents", chunk_size=256, length=600, batch=1, normalize=False, documents=(300, 212)),
]
