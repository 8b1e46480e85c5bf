"""The language model around the mixers: embedding, pre-norm blocks, head.

Notable: a norm before each branch and before the head; an untied head by default; no positions here, since only some
mixers want them; the loss is computed in slices (`model.head`). The model knows nothing of devices, precision,
compilation or parallelism.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longmix.caches.cache import Cache, CacheKind
from longmix.caches.exact import Exact
from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.attention_dropout import check_dropout
from longmix.mixers.parts.base import Mixer, MixerOutput, ModelShape
from longmix.mixers.parts.calls import applied, call_of
from longmix.mixers.parts.documents import told_apart
from longmix.mixers.parts.layout import Layout, LayoutNeeds, layout_after, layouts, needs_of
from longmix.mixers.parts.metrics import Metric
from longmix.model.blocks import Block, BlockStyle, Standard
from longmix.model.head import SoftTargets, capped, scored, token_losses
from longmix.model.offload import Offload, lane_of
from longmix.model.saved import SavedActivations, save_in_int8
from longmix.model.sharing import NOTHING_SHARED, Sharing, check_sharing, share_projections
from longmix.pytrees import pytree

MOST_LAYERS = 10_000
"""The most layers. Nobody trains as many; a configuration from elsewhere could ask for more than can be built."""

Checkpointing = Literal["none", "block", "selective"]
"""The words of `activation_checkpointing`."""

MixerFactory = Callable[[ModelShape, int], Mixer]
"""Builds the mixer of one layer from the model's shape and the layer's index."""


@pytree
@dataclass
class ModelOutput:
    """What the model returns.

    Attributes:
        hidden: [B, T, D], normalised; `LanguageModel.logits` turns it into scores.
        token_losses: float32 [B, T] in nats when targets were given, else empty.
        state: one entry per layer when a state was passed in.
        hits: bool [B, T], the targets that are the most likely token, where `LanguageModel.measures_hits` asks for it.
        log_normalisers: float32 [B, T], of the targets' distributions, 0 where there is no target, where
            `LanguageModel.measures_normalisers` asks for them in training.
        divergences: float32 [B, T], from a teacher's distributions where a model in training was given any; see
            `head.divergences`.
        losses: auxiliary losses summed over the layers, by name.
        metrics: the mixers' metrics as `layer_<index>/<name>`.
    """

    hidden: Tensor
    token_losses: Tensor
    state: list[Any] | None = None
    hits: Tensor | None = None
    log_normalisers: Tensor | None = None
    divergences: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)


def run_block(block: Block, checkpointing: Checkpointing, *inputs: Any) -> MixerOutput:
    """A block's output for these inputs of `Block.forward`, with activation checkpointing where gradients are on."""
    if checkpointing == "block" and torch.is_grad_enabled():
        result: MixerOutput = checkpoint(block, *inputs, use_reentrant=False)
        return result
    output: MixerOutput = call_of(block)(*inputs, checkpointing == "selective")
    return output


class LanguageModel(nn.Module):
    """A decoder-only language model whose layers mix the sequence as the factory says.

    Args:
        mixer_factory: builds each layer's mixer.
        vocab_size: token ids are 0 .. vocab_size - 1.
        d_model: width of the residual stream.
        num_layers: number of blocks.
        num_heads: heads that a mixer takes unless its own settings say otherwise.
        mlp_hidden: inner width of the SwiGLU; another channel mixer gets about as many weights.
        block: what surrounds the mixers; None is `Standard`.
        tie_head: let the head share the embedding matrix.
        logit_penalty: weight of an auxiliary loss, half the mean square of each position's largest logit, which keeps
            logits from drifting; RWKV trains with 1e-4 (its "L2Wrap").
        logit_softcap: logits stay within plus and minus this, by cap * tanh(logit / cap) (Gemma Team 2024, arXiv
            2408.00118, equation 1); xLSTM 7B has 30. None leaves them.
        embedding_dropout, residual_dropout: shares that training zeroes, of the embedding and of each branch before it
            is added (GPT-2's `embd_pdrop` and `resid_pdrop`).
        norm_eps: epsilon of the norms around the mixers.
        activation_checkpointing: "block" keeps each block's input for the backward pass and computes the rest again;
            "selective" also keeps what is dear to compute (`longmix.model.recomputing`).
        activation_offload: on a GPU, keep what the backward pass needs in the host's memory (`longmix.model.offload`).
        saved_activations: "int8" keeps the inputs of linear layers and norms, and the channels within the SwiGLU, in
            8 bits for the backward pass (`longmix.model.saved`); "exact" keeps them as they are.
        share: projections that all layers make of a few matrices (`longmix.model.sharing`).

    Raises:
        ConfigError: a size below 1, or heads that do not divide; the message names the key.
    """

    measures_hits = False
    """Whether outputs say which targets the model's first choice met, as synthetic tasks need it."""

    measures_normalisers = False
    """Whether outputs have the logarithms of the normalisers, as a loss on them needs it."""

    def __init__(
        self,
        mixer_factory: MixerFactory,
        vocab_size: int,
        *,
        d_model: int,
        num_layers: int,
        num_heads: int,
        mlp_hidden: int,
        block: BlockStyle | None = None,
        tie_head: bool = False,
        logit_penalty: float = 0.0,
        logit_softcap: float | None = None,
        embedding_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        norm_eps: float = 1e-6,
        activation_checkpointing: Checkpointing = "none",
        activation_offload: bool = False,
        saved_activations: SavedActivations = "exact",
        share: Sharing = NOTHING_SHARED,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "mlp_hidden": mlp_hidden}
        for key, size in sizes.items():
            if size < 1:
                raise ConfigError(f"model.{key}={size} must be at least 1.")
        if num_layers > MOST_LAYERS:
            raise ConfigError(f"model.num_layers={num_layers} must be at most {MOST_LAYERS:,}.")
        if norm_eps <= 0:
            raise ConfigError(f"model.norm_eps={norm_eps} must be above 0.")
        if logit_penalty < 0:
            raise ConfigError(f"model.logit_penalty={logit_penalty} must be at least 0.")
        if logit_softcap is not None and logit_softcap <= 0:
            raise ConfigError(f"model.logit_softcap={logit_softcap} must be above 0, or null to leave logits alone.")
        self.shape = ModelShape(d_model, num_layers, num_heads, norm_eps)
        self.vocab_size = vocab_size
        self.logit_penalty = logit_penalty
        self.logit_softcap = logit_softcap
        check_dropout("model.residual_dropout", residual_dropout)
        check_dropout("model.embedding_dropout", embedding_dropout)
        self.embedding_dropout = nn.Dropout(embedding_dropout) if embedding_dropout else None
        self.activation_checkpointing: Checkpointing = activation_checkpointing
        self.activation_offload = activation_offload
        style = Standard() if block is None else block
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.embedding_norm = style.embedding_norm(self.shape)
        self.blocks = nn.ModuleList(
            Block(self.shape, style, mixer_factory(self.shape, index), index, mlp_hidden, residual_dropout)
            for index in range(num_layers)
        )
        self.shared = share_projections(self.mixers(), share) if check_sharing(share) else None
        self.saved_activations: SavedActivations = saved_activations
        if saved_activations == "int8":
            save_in_int8(self.blocks)
        self.norm = style.norm(self.shape)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tie_head:
            self.head.weight = self.embedding.weight
        style.begin(self.embedding, self.head)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        state: Sequence[Any] | None = None,
        document_ids: Tensor | None = None,
        document_starts: Tensor | None = None,
        positions_before: Tensor | None = None,
        soft: SoftTargets | None = None,
    ) -> ModelOutput:
        """Run `tokens` int64 [B, T]; with `targets` int64 [B, T] the losses come along.

        Args:
            tokens: ids.
            targets: the token each position is to predict; `head.IGNORE_INDEX` for none.
            state: one entry per layer, from `init_state` or an earlier output, to continue after earlier tokens. A
                layer whose mixer has None in it begins anew.
            document_ids: int32 [B, T], non-decreasing along T; None means every row is one document.
            document_starts: int32 [B, N], where they start, as in `Batch`. With it `mixer=flash` has FlashAttention on
                a GPU; layers that go on from a state do not use it.
            positions_before: int32 [B, T], what is added to the positions of rotations, as in `Batch`; None for 0.
                Layers that go on from a state do not use it.
            soft: a teacher's distributions of the targets; without targets, or in evaluation, nothing uses them.
        """
        document_ids, made = self.prepared(tokens, state, document_ids, document_starts, positions_before)
        x = applied(self.embedding_norm, applied(self.embedding, tokens))
        if self.embedding_dropout is not None:
            x = self.embedding_dropout(x)
        nothing = x.new_empty(0)  # `hidden` comes last: until then it would hold what the first layer is given
        output = ModelOutput(hidden=nothing, token_losses=nothing, state=None if state is None else [])
        value_residual = None
        lane = lane_of(x.device) if self.activation_offload and torch.is_grad_enabled() else None
        offload = None if lane is None else Offload(lane, len(self.blocks))
        for index, block in enumerate(self.blocks):
            others = None if state is None else state[index], document_ids, value_residual, made[index]
            with nullcontext() if offload is None else offload.layer(index, block, others):
                result = run_block(cast(Block, block), self.activation_checkpointing, x, *others)
            x = result.y
            value_residual = result.value_residual if value_residual is None else value_residual
            if output.state is not None:
                output.state.append(result.state)
            for name, loss in result.losses.items():
                output.losses[name] = output.losses.get(name, 0.0) + loss
            output.metrics |= {f"layer_{index}/{name}": value for name, value in result.metrics.items()}
        output.hidden = applied(self.norm, x)
        if targets is not None and self.training:
            found = scored(
                output.hidden,
                self.head.weight,
                targets,
                self.logit_softcap,
                with_peaks=self.logit_penalty > 0,
                with_normalisers=self.measures_normalisers,
                soft=soft,
                with_hits=self.measures_hits,
                skip_ignored=self.measures_hits and self.logit_penalty == 0,  # most targets of synthetic tasks
            )
            output.token_losses, output.log_normalisers = found.losses, found.log_normalisers
            output.divergences, output.hits = found.divergences, found.hits
            if found.peaks is not None:
                output.losses["logit_penalty"] = self.logit_penalty / 2 * found.peaks.square().mean()
        elif targets is not None:
            with_hits, weight, softcap = self.measures_hits, self.head.weight, self.logit_softcap
            found = scored(output.hidden, weight, targets, softcap, with_hits=with_hits, skip_ignored=with_hits)
            output.token_losses, output.hits = found.losses, found.hits
        return output

    def prepared(
        self,
        tokens: Tensor,
        state: Sequence[Any] | None = None,
        document_ids: Tensor | None = None,
        document_starts: Tensor | None = None,
        positions_before: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Layout | None]]:
        """Make the mixers ready for a pass, whose arguments are those of `forward`.

        Returns:
            The document ids that the layers get, and each layer's layout; None where it makes that itself.
        """
        for index, mixer in enumerate(self.mixers()):
            if state is None or state[index].mixer is None:
                mixer.prepare(tokens.shape[1])
        if state is None:
            document_ids = told_apart(document_ids)
        return document_ids, self._layouts(tokens, state, document_ids, document_starts, positions_before)

    def _layouts(
        self,
        tokens: Tensor,
        state: Sequence[Any] | None,
        document_ids: Tensor | None,
        document_starts: Tensor | None,
        positions_before: Tensor | None,
    ) -> list[Layout | None]:
        """Each layer's layout; layers that need the same share one. None after a state of the layer's own."""
        before_layers = [None] * len(self.blocks) if state is None else [each.mixer for each in state]
        cache = next((each for each in before_layers if isinstance(each, Cache)), None)
        if cache is not None:
            return self._layouts_after(cache, before_layers, tokens, document_ids)
        slices: Slices | None = None
        needs: list[LayoutNeeds | None] = []
        for mixer, before in zip(self.mixers(), before_layers, strict=True):
            begins = isinstance(before, Slices) and before.carried is None
            slices = before if begins else slices
            needs.append(needs_of(mixer) if begins or before is None else None)
        wanted = {need for need in needs if need is not None}
        made = layouts(wanted, tokens, document_ids, document_starts, slices, positions_before)
        return [None if need is None else made[need] for need in needs]

    def _layouts_after(
        self, cache: Cache, states: Sequence[Any], tokens: Tensor, document_ids: Tensor | None
    ) -> list[Layout | None]:
        """The layouts of layers with caches, all of which have read the tokens that one of them has."""
        made: list[tuple[LayoutNeeds, Layout]] = []  # few: to compare is quicker than to hash
        found: list[Layout | None] = []
        for mixer, state in zip(self.mixers(), states, strict=True):
            need = needs_of(mixer) if isinstance(state, Cache) else None
            layout = None if need is None else next((each for known, each in made if known == need), None)
            if need is not None and layout is None:
                layout = layout_after(need, cache, document_ids, tokens.shape[1], tokens.device)
                made.append((need, layout))
            found.append(layout)
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, float32 or better: [..., D] -> [..., V]."""
        scores = applied(self.head, hidden)
        return capped(scores.to(torch.promote_types(scores.dtype, torch.float32)), self.logit_softcap)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of `targets` int64 [...] after `hidden` [..., D]; float32 [...]."""
        return token_losses(hidden, self.head.weight, targets, self.logit_softcap)

    def mixers(self) -> list[Mixer]:
        """The mixer of every layer, first to last."""
        return [cast(Block, block).mixer for block in self.blocks]

    def init_state(self, batch: int) -> list[Any]:
        """Every layer's state before the first token, for `batch` rows."""
        return [cast(Block, block).init_state(batch) for block in self.blocks]

    def decoding_state(self, batch: int, kind: CacheKind | None = None) -> list[Any]:
        """Every layer's state before the first token of `batch` rows of generated text, without gradients.

        Keys and values are appended in place, so that a state goes on once; `longmix.mixers.parts.states.forked` makes
        others of it.

        Args:
            batch: rows.
            kind: the cache of the layers that take it; others have `Exact` or a state of their own. None is `Exact`.

        Raises:
            ConfigError: no layer takes the kind.
        """
        exact = Exact()
        kind = exact if kind is None else kind
        exact_layers = {layer % len(self.blocks) for layer in kind.exact_layers}
        kinds = [exact if index in exact_layers else kind for index in range(len(self.blocks))]
        if kind.name != exact.name and not any(
            mixer.takes_cache(own) for mixer, own in zip(self.mixers(), kinds, strict=True) if own is kind
        ):
            names = ", ".join(sorted({type(mixer).__name__ for mixer in self.mixers()}))
            raise ConfigError(
                f"cache={kind.name} keeps keys and values of full attention, and no layer takes it: they are {names}; "
                "use cache=exact."
            )
        kinds = [own if mixer.takes_cache(own) else exact for mixer, own in zip(self.mixers(), kinds, strict=True)]
        return [cast(Block, block).decoding_state(batch, own) for block, own in zip(self.blocks, kinds, strict=True)]

    def state_between_documents(self, batch: int) -> list[Any]:
        """Every layer's state for `batch` rows that any document may follow, as training carries it at first."""
        return [cast(Block, block).state_between_documents(batch) for block in self.blocks]

    def slice_state(self, slices: Slices, before: Sequence[Any] | None = None) -> list[Any]:
        """Every layer's state before this process's slice of longer rows, which may go on from the states `before`."""
        states = [None] * len(self.blocks) if before is None else before
        return [cast(Block, block).slice_state(slices, state) for block, state in zip(self.blocks, states, strict=True)]

    def state_bytes(self, length: int) -> int:
        """Bytes of state one row holds after `length` tokens."""
        return sum(cast(Block, block).state_bytes(length) for block in self.blocks)

    def flops(self, length: int) -> int:
        """Forward floating-point operations over one row of `length` tokens: matrix products and the mixers' own.

        A training step costs three times as much; norms, activations and rotations are not counted.
        """
        layers = sum(block.flops(length) for block in self.blocks if isinstance(block, Block))
        return layers + 2 * length * self.head.weight.numel()

    def draws(self) -> bool:
        """Whether training draws random numbers, as dropout and activations in 8 bits do."""
        shares = [module.p for module in self.modules() if isinstance(module, nn.Dropout)]
        packs = self.saved_activations == "int8"
        return packs or any(shares) or any(getattr(mixer, "attention_dropout", 0) for mixer in self.mixers())

    def parameter_counts(self) -> dict[str, int]:
        """Exact counts: `total`, `embedding` (a tied head counts once, here) and the rest, `non_embedding`."""
        total = sum(parameter.numel() for parameter in self.parameters())
        embedding = self.embedding.weight.numel()
        return {"total": total, "embedding": embedding, "non_embedding": total - embedding}
