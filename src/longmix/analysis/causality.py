"""Tests whether later tokens change earlier outputs, in several ways that need no look inside.

A leak of *content* has a gradient: an earlier output moves with a later input. A leak of *selection* has none: which
tokens are attended to, which bucket is full or which rank a score has depends on later ones, as in the published
Routing Transformer (Roy et al. 2021, arXiv 2003.05997) and HyperAttention (Han et al. 2023, arXiv 2310.05869).
Gradients miss the second kind, so inputs are changed for real; and since a model can learn to use either, one is
trained on tokens that nothing can predict (`entropy_test`).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from longmix.config import Choice, ModelConfig, Pattern
from longmix.errors import ConfigError
from longmix.mixers.parts.base import Mixer
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model

Function = Callable[[Tensor, Tensor | None], Tensor]
"""From inputs [B, T, D] and document ids [B, T] or None to outputs [B, T, ...], one for each token."""

TOLERANCE = 1e-9
"""Change of an output that float64 rounding explains, relative to the root mean square of all outputs."""

HUGE = 1e4
"""How much larger the keys of later tokens are made to be."""

MEASURED = 8_192
"""Tokens on which a trained model's loss is measured: its standard error is about a hundredth of its deviation."""


@dataclass(frozen=True)
class Finding:
    """The finding of one probe.

    Attributes:
        probe: its name.
        change: largest change of an output that must not change, relative to the root mean square of outputs; not a
            number where outputs are.
        where: which output that is.
        kind: "none"; or how it leaks, "content" with a gradient and "selection" without; or "placement", where a
            document alone is not what it is in a row, which need not be a leak.
    """

    probe: str
    change: float
    where: str
    kind: str

    @property
    def leaks(self) -> bool:
        """Whether an input changed an output that it must not reach."""
        return self.kind in ("content", "selection")


@dataclass(frozen=True)
class EntropyFinding:
    """The result of training on unpredictable tokens.

    Attributes:
        loss: nats per token on fresh tokens, after training.
        entropy: the least that a causal model can have in the mean.
        error: standard error of the loss.
    """

    loss: float
    entropy: float
    error: float

    @property
    def passed(self) -> bool:
        """Whether the loss is not below the entropy by more than three standard errors."""
        return self.loss >= self.entropy - 3 * self.error


def mixer_function(mixer: Mixer) -> Function:
    """A mixer as a function of its inputs."""

    def run(x: Tensor, document_ids: Tensor | None) -> Tensor:
        return mixer(x, document_ids=document_ids).y

    return run


def model_function(model: LanguageModel) -> Function:
    """A model as a function of its token embeddings, so that these can be anything."""

    def run(x: Tensor, document_ids: Tensor | None) -> Tensor:
        handle = model.embedding.register_forward_hook(lambda module, inputs, output: x)
        try:
            tokens = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
            return model(tokens, document_ids=document_ids).hidden
        finally:
            handle.remove()

    return run


@torch.no_grad()
def audit(function: Function, x: Tensor, seed: int = 0) -> list[Finding]:
    """Probe a function for leaks.

    Args:
        function: in evaluation mode, on float64 weights.
        x: float64 [B, T, D] with T of at least 8, the inputs to begin from.
        seed: of everything that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like) * x.std()

    length = x.shape[1]
    cuts = sorted({length // 4, length // 2, 3 * length // 4, length - 1})
    whole = function(x, None)
    probes: dict[str, list[tuple[float, str]]] = {"last token": [], "later tokens": [], "huge keys": [], "prefix": []}
    for _ in range(4):
        changed = torch.cat([x[:, :-1], drawn(x[:, -1:])], 1)
        probes["last token"].append(_largest_change(function(changed, None), whole, length - 1))
    for cut in cuts:
        later = drawn(x[:, cut:])
        probes["later tokens"].append(_largest_change(function(torch.cat([x[:, :cut], later], 1), None), whole, cut))
        probes["huge keys"].append(
            _largest_change(function(torch.cat([x[:, :cut], HUGE * later], 1), None), whole, cut)
        )
        probes["prefix"].append(_largest_change(function(x[:, :cut], None), whole, cut))
    kind = "content" if _has_gradient(function, x, cuts, None) else "selection"
    found = [_finding(probe, changes, kind) for probe, changes in probes.items()]
    return [*found, *_document_findings(function, x, drawn)]


def _document_findings(function: Function, x: Tensor, drawn: Callable[[Tensor], Tensor]) -> list[Finding]:
    """Three documents in a row: each against itself alone, and against other contents of the first."""
    batch, length, _ = x.shape
    ends = [0, length // 3, length // 3 + 1, length]
    sizes = torch.tensor(ends).diff()
    ids = torch.repeat_interleave(torch.arange(3), sizes).expand(batch, -1).int().to(x.device)
    packed = function(x, ids)
    alone, changes = [], []
    for start, stop in pairwise(ends):
        piece = function(x[:, start:stop], None)
        alone.append(_largest_change(piece, packed[:, start:stop], stop - start, packed, start))
        changed = x.clone()
        changed[:, start:stop] = HUGE * drawn(changed[:, start:stop])
        after = function(changed, ids)
        others = torch.cat([after[:, :start], after[:, stop:]], 1)
        wanted = torch.cat([packed[:, :start], packed[:, stop:]], 1)
        changes.append(_largest_change(others, wanted, length - (stop - start), packed))
    kind = "content" if _has_gradient(function, x, [ends[1]], ids) else "selection"
    return [_finding("other documents", changes, kind), _finding("document alone", alone, "placement")]


def _largest_change(
    after: Tensor, before: Tensor, count: int, scale_of: Tensor | None = None, offset: int = 0
) -> tuple[float, str]:
    """The largest difference among the first `count` tokens, relative, and where it is."""
    scale = (before if scale_of is None else scale_of).square().mean().sqrt().clamp_min(torch.finfo(before.dtype).tiny)
    difference = (after[:, :count] - before[:, :count]).abs().flatten(2).amax(-1) / scale
    difference = torch.where(difference.isnan(), torch.inf, difference)
    index = int(difference.argmax())
    row, token = divmod(index, count)
    return float(difference.flatten()[index]), f"row {row}, token {token + offset}"


def _finding(probe: str, changes: list[tuple[float, str]], kind: str) -> Finding:
    change, where = max(changes)
    return Finding(probe, change, where, "none" if change <= TOLERANCE else kind)


@torch.enable_grad()
def _has_gradient(function: Function, x: Tensor, cuts: list[int], document_ids: Tensor | None) -> bool:
    """Whether an output before a cut has a gradient in an input from it on; with documents, one after it in those
    before it."""
    for cut in cuts:
        inputs = x.clone().requires_grad_()
        output = function(inputs, document_ids)
        kept = output[:, :cut] if document_ids is None else output[:, cut:]
        weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(cut), dtype=kept.dtype).to(kept)
        (gradient,) = torch.autograd.grad((kept * weights).sum(), inputs)
        forbidden = gradient[:, cut:] if document_ids is None else gradient[:, :cut]
        if forbidden.abs().max() > TOLERANCE * gradient.abs().max():
            return True
    return False


def entropy_test(
    model: LanguageModel,
    *,
    seq_len: int,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    after_step: Callable[[], None] | None = None,
) -> EntropyFinding:
    """Train a model on independent, evenly distributed tokens, new ones in every step, and measure its loss.

    A causal model cannot get below the entropy, log of the vocabulary. One that leaks learns to: the sooner, the
    shorter rows are, since what a selection betrays of all later tokens is then about few of them. The rate falls to
    zero in the end, so that a causal model comes close to the entropy from above.

    Args:
        model: with fresh weights; it is changed.
        seq_len: tokens of a row.
        steps: optimizer steps of Adam.
        batch_size: rows of a step.
        learning_rate: Adam's in the first step.
        seed: of the tokens.
        after_step: called after every step, for a progress bar.
    """
    from longmix.mixers.parts.between_steps import finish_step

    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def losses(rows: int) -> Tensor:
        tokens = torch.randint(model.vocab_size, (rows, seq_len + 1), generator=generator).to(device)
        return model(tokens[:, :-1], tokens[:, 1:]).token_losses

    model.train()
    for _ in range(steps):
        losses(batch_size).mean().backward()
        optimizer.step()
        schedule.step()
        finish_step(model, True, lambda total: total)
        optimizer.zero_grad()
        if after_step is not None:
            after_step()
    model.eval()
    pieces = -(-MEASURED // (batch_size * seq_len))
    with torch.no_grad():
        measured = torch.cat([losses(batch_size).flatten() for _ in range(pieces)]).double()
    error = measured.std() / math.sqrt(len(measured))
    return EntropyFinding(measured.mean().item(), math.log(model.vocab_size), error.item())


def scale_model(config: ModelConfig, length: int, vocab_size: int) -> LanguageModel:
    """The same mixers in a few layers, with sizes so small that a short row has something outside them.

    A selection by ranks leaks what the later tokens have to say in it. The fewer these are, the more of that is about
    the next one, so that training notices it at once in rows of 8 tokens and hardly in rows of 64; and a window that
    holds the whole row selects nothing. Weights are fresh, on the current default device.

    Args:
        config: of which the model is built. Windows and blocks of its mixers become a quarter of a row where they are
            longer, blocks still less where several are seen exactly; of its layers two stay, or as many as its pattern
            of mixers has.
        length: tokens of a row.
        vocab_size: of the model.
    """
    mixer = config.mixer
    order = len(mixer.order) if isinstance(mixer, Pattern) else 1
    model = config.model.having(num_layers=min(config.model.number("num_layers"), max(2, order)))
    small = ModelConfig(mixer=mixer, model=model)
    for choice in mixer.choices:
        past = choice.settings.get("past_blocks")
        blocks = 1 + past if isinstance(past, int) else 1
        for name, least in sizes_of(choice).items():
            parts = max(4, 2 * blocks) if name == "block" else 4  # the blocks that are seen exactly are half a row
            small = _with_smaller(small, choice.key, name, max(1, length // parts), least)
    with warnings.catch_warnings(action="ignore"):  # what there is to say was said of the model itself
        return build_model(small, vocab_size)


def sizes_of(choice: Choice) -> dict[str, int]:
    """The sizes that a mixer's settings give, of those that its class names in `Mixer.sizes`, and the least of each."""
    sizes: dict[str, int] = getattr(choice.located(), "sizes", {})
    return {name: least for name, least in sizes.items() if isinstance(choice.settings.get(name), int)}


def _with_smaller(config: ModelConfig, key: str, name: str, most: int, least: int) -> ModelConfig:
    """The configuration with a size of one of its mixers at most `most`, or at the least that the mixer takes.

    It stays as it is where no smaller one goes.
    """
    before = next(choice for choice in config.mixer.choices if choice.key == key).number(name)
    for size in (most, least):
        smaller = replace(config, mixer=_having(config.mixer, key, name, min(before, size)))
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                build_model(smaller, 1)
        except ConfigError:
            continue
        return smaller
    return config


def _having(mixer: Choice | Pattern, key: str, name: str, value: int) -> Choice | Pattern:
    """A mixer, or a pattern, with one setting of the mixer at a key changed."""
    if isinstance(mixer, Choice):
        return mixer.having(**{name: value})
    members = {
        member: (choice.having(**{name: value}) if choice.key == key else choice).entries
        for member, choice in mixer.members.items()
    }
    return Pattern.of(mixer.key, {"pattern": list(mixer.order), **members})
