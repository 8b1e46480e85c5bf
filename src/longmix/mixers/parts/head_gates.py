"""Gates on the heads of attention before the output projection.

    head      o_h <- sigmoid(w_h . x) o_h                  (Qiu et al. 2025, arXiv 2505.06708)
    element   o_h <- sigmoid(W_h x) * o_h                  (the same)
    routed    o_h <- g_h(x) o_h, zero for all but some     mixture of heads, MoH (Jin et al. 2024, arXiv 2410.11842)

MoH, with Hs shared heads and R = H - Hs routed ones, of which a token keeps the K likeliest:

    g of a shared head  =  alpha_0 Hs softmax_h(W_s x)
    g of a routed head  =  alpha_1 K softmax_h(W_g x) over the K that are kept, else 0
    alpha = 2 softmax(W_0 x) where there are shared heads, else 1
    balance loss = mean over the rows of R^2 mean_h(mean_t softmax_h(W_g x_t) * mean_t kept_h)

The router of models that were trained without one (MoH-LLaMA3) has no weights. A routed head's score is the length of
its query before the rotation, over the standard deviation of these lengths over the token's routed heads:

    g of a shared head  =  1
    g of a routed head  =  1 if softmax_h(score) is among the K largest, else 0

A token's gates depend on itself alone. All heads are computed, so that training costs what it did. The published means
are of all tokens of a process's batch; of a row, the loss is the same however processes and micro-batches divide rows.
"""

import torch
from torch import Tensor, nn

from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.base import REAL, at_most
from longmix.mixers.parts.exact import exact_linear
from longmix.mixers.parts.metrics import Entropy, LargestShare, Metric
from longmix.recipe import Recipe, set_recipe

_STD = 0.02
"""Of a router's weights at first. With zeros every token would keep the same heads."""

_LEAST_SPREAD = 1e-6
"""Of the lengths of a token's queries, so that equal ones give equal chances."""

OUTPUT_GATES = ("none", "head", "element")
"""The words of `mixer.output_gate`."""


def output_gate_of(kind: str, d_model: int, heads: int) -> nn.Linear | None:
    """The projection of a gate's logits; None for `none`.

    Raises:
        ConfigError: the word is unknown.
    """
    if kind not in OUTPUT_GATES:
        raise ConfigError(f"mixer.output_gate={kind} is unknown; use {', '.join(OUTPUT_GATES)}.")
    if kind == "none":
        return None
    layer = nn.Linear(d_model, d_model if kind == "element" else heads, bias=False)
    nn.init.normal_(layer.weight, std=d_model**-0.5)
    if kind == "head":
        set_recipe(layer.weight, Recipe("scalar"))
    return layer


def gated(mixed: Tensor, layer: nn.Linear, x: Tensor) -> Tensor:
    """Output heads [B, T, H, head_dim] times the sigmoid gate of the tokens x [B, T, D]."""
    return mixed * layer(x).sigmoid().unflatten(-1, (mixed.shape[2], -1)).to(mixed.dtype)


def check_refused(reasons: dict[str, str], name: str, **settings: str | bool) -> None:
    """Refuse settings that a mixer cannot have, for reasons of its own.

    Args:
        reasons: by setting, what ends a sentence.
        name: the class of the mixer.
        settings: with their values; those that ask for nothing count as not there.

    Raises:
        ConfigError: naming the setting.
    """
    for setting, value in settings.items():
        word = str(value).lower()
        if setting in reasons and word not in ("none", "false", "rotary", "learned"):
            raise ConfigError(f"mixer.{setting}={word} cannot be had in {name}: {reasons[setting]}; leave it out.")


def check_sinks(wanted: bool, takes: bool, name: str) -> None:
    """Refuse `mixer.sink_logits=true` of a mixer, the class `name`, that has no logsumexp of all its scores.

    Raises:
        ConfigError: naming the setting.
    """
    if wanted and not takes:
        raise ConfigError(
            f"mixer.sink_logits=true needs the logsumexp of all scores; {name} has none, so leave it out."
        )


def sink_logit_of(heads: int) -> nn.Parameter:
    """A logit of each head that takes part in its softmax, 0 at first: as much as a key of score 0."""
    logits = nn.Parameter(torch.zeros(heads))
    set_recipe(logits, Recipe("scalar", weight_decay=False))
    return logits


ROUTERS = ("learned", "query_norm")
"""The words of `mixer.heads_router`."""


def head_router(
    d_model: int,
    heads: int,
    shared: int,
    kept: int | None,
    balance: float,
    layers: int,
    kind: str = "learned",
    normed: bool = False,
) -> "HeadRouter | None":
    """The mixture of heads that the settings ask for; None if `kept` is.

    Args:
        d_model, heads, shared, kept: see `HeadRouter`.
        balance: weight of the balance loss, as a mean over the layers.
        layers: of the model.
        kind: a word of `ROUTERS`.
        normed: whether queries have a norm, which makes their lengths alike.

    Raises:
        ConfigError: naming the setting.
    """
    at_most(REAL, heads_balance=balance)
    if balance < 0:
        raise ConfigError(f"mixer.heads_balance={balance} must not be negative.")
    if kind not in ROUTERS:
        raise ConfigError(f"mixer.heads_router={kind} is unknown; use {', '.join(ROUTERS)}.")
    if kept is not None:
        if kind == "query_norm" and normed:
            raise ConfigError(
                "mixer.heads_router=query_norm compares the lengths of queries, which mixer.qk_norm=true makes alike; "
                "give mixer.qk_norm=false."
            )
        router = QueryNormRouter if kind == "query_norm" else HeadRouter
        return router(d_model, heads, shared, kept, balance / layers)
    if kind != "learned":
        raise ConfigError(f"mixer.heads_router={kind} needs mixer.heads_kept, how many heads a token keeps.")
    if shared:
        raise ConfigError(f"mixer.heads_shared={shared} needs mixer.heads_kept, how many of the others a token keeps.")
    return None


class HeadRouter(nn.Module):
    """The gates of a mixture of heads.

    Args:
        d_model: channels of a token.
        heads: how many there are, H; the shared ones are the first.
        shared: Hs, from 0 on.
        kept: K, from 1 to H - Hs.
        balance: weight of the balance loss.

    Raises:
        ConfigError: naming the setting.
    """

    def __init__(self, d_model: int, heads: int, shared: int, kept: int, balance: float) -> None:
        super().__init__()
        if not 0 <= shared < heads:
            raise ConfigError(f"mixer.heads_shared={shared} must be from 0 to below the {heads} heads.")
        if not 1 <= kept <= heads - shared:
            raise ConfigError(
                f"mixer.heads_kept={kept} must be from 1 to {heads - shared}, the heads that are not shared; null is "
                "no mixture of heads."
            )
        self.heads, self.shared_heads, self.kept, self.balance = heads, shared, kept, balance
        self._begin(d_model)

    def _begin(self, d_model: int) -> None:
        """Make the weights."""
        heads, shared = self.heads, self.shared_heads
        self.routed = nn.Linear(d_model, heads - shared, bias=False)
        self.shared = nn.Linear(d_model, shared, bias=False) if shared > 1 else None
        self.groups = nn.Linear(d_model, 2, bias=False) if shared else None
        for layer in (self.routed, self.shared, self.groups):
            if layer is not None:
                nn.init.normal_(layer.weight, std=_STD)
                set_recipe(layer.weight, Recipe("scalar"))

    def reads(self, x: Tensor, query: Tensor) -> Tensor:
        """What `forward` takes of tokens x [B, T, D] and their queries [B, T, H, head_dim] before the rotation."""
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Metric]]:
        """Gates [B, T, H] of the tokens x [B, T, D], means [B, 2, R] for `losses_of`, and metrics while training."""
        chances = exact_linear(self.routed, x).softmax(-1)
        mask, metrics = self._kept_heads(chances)
        kept = chances * mask
        gates = self.kept * kept / kept.sum(-1, keepdim=True)
        if self.groups is not None:
            alpha = 2 * exact_linear(self.groups, x).softmax(-1)
            shared = torch.ones_like(gates[..., :1])
            if self.shared is not None:
                shared = self.shared_heads * exact_linear(self.shared, x).softmax(-1)
            gates = torch.cat((alpha[..., :1] * shared, alpha[..., 1:] * gates), -1)
        return gates, torch.stack((chances.mean(1), mask.mean(1)), 1), metrics

    def _kept_heads(self, chances: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        """1 for the likeliest routed heads and 0 for the others, [B, T, R], and metrics while training."""
        best = chances.topk(self.kept, -1).indices
        mask = torch.zeros_like(chances).scatter(-1, best, 1.0)
        if not self.training:
            return mask, {}
        numbers = best.flatten(1).unsqueeze(-1)
        count = chances.shape[-1]
        metrics: dict[str, Metric] = {"largest_head": LargestShare.of(numbers, count)}
        if count > 1:
            metrics["head_entropy"] = Entropy.of(numbers, count)
        return mask, metrics

    def applied(self, mixed: Tensor, x: Tensor, state: object) -> tuple[Tensor, dict[str, Tensor], dict[str, Metric]]:
        """Return heads times their gates, and auxiliary losses and metrics while training.

        Args:
            mixed: [B, T, H, V], the heads.
            x: what `forward` takes, of the tokens.
            state: see `Mixer.forward`.
        """
        gates, means, metrics = self(x)
        losses: dict[str, Tensor] = {}
        if self.training and self.balance:
            losses = self.losses_of(state.mean(means) if isinstance(state, Slices) else means)
        return mixed * gates.unsqueeze(-1).to(mixed.dtype), losses, metrics

    def losses_of(self, means: Tensor) -> dict[str, Tensor]:
        """The balance loss, from the means [B, 2, R] over each whole row."""
        return {"head_balance": self.balance * means.shape[2] ** 2 * means.prod(1).mean()}

    def flops(self, length: int) -> int:
        """Of the router, for `length` tokens."""
        return 2 * length * sum(parameter.numel() for parameter in self.parameters())


class QueryNormRouter(HeadRouter):
    """The gates of a mixture of heads by the lengths of the queries, without weights; the arguments are the same.

    Training has the gradient of the chances in the place of that of the gates, which are 0 or 1 (straight-through), for
    the heads that are kept. The published program only infers.
    """

    def _begin(self, d_model: int) -> None:
        if self.heads - self.shared_heads < 2:
            raise ConfigError(
                f"mixer.heads_router=query_norm compares heads that are not shared, and mixer.heads_shared="
                f"{self.shared_heads} of {self.heads} leaves one; share fewer."
            )

    def reads(self, x: Tensor, query: Tensor) -> Tensor:
        """The queries."""
        return query

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor, dict[str, Metric]]:
        """As the base does, of queries [B, T, H, head_dim] before their rotation."""
        routed = query[:, :, self.shared_heads :]
        length = torch.linalg.vector_norm(routed, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
        chances = (length / length.std(-1, keepdim=True).clamp_min(_LEAST_SPREAD)).softmax(-1)
        mask, metrics = self._kept_heads(chances)
        through = chances * mask
        gates = mask + (through - through.detach())  # exactly 0 or 1
        gates = torch.cat((torch.ones_like(length[..., :1]).expand(*length.shape[:2], self.shared_heads), gates), -1)
        return gates, torch.stack((chances.mean(1), mask.mean(1)), 1), metrics
