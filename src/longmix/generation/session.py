"""A model in the middle of some rows of text: its state, and the scores of the next token.

One object serves all mixers and mixtures of them, of other packages too: a state per layer, of which nothing is known
here but that it is a pytree whose tensors begin with the batch. It can be saved and continued, and one row can be
forked into many.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind
from longmix.caches.exact import Exact
from longmix.caches.kinds import kind_of_saved, settings_of
from longmix.caches.star import Star
from longmix.checkpoints import load_tensors, reading, save_tensors
from longmix.checkpoints.verify import check_weight
from longmix.errors import ConfigError
from longmix.generation.prompts import check_star, read_prompts
from longmix.generation.saved import FORMAT, WITH_CLASSES, WITHOUT_CACHES, WITHOUT_DIGEST, restored_state, saved_state
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.states import caches, held_bytes, total_bytes
from longmix.mixers.parts.states import forked as forked_state
from longmix.model.backbone import LanguageModel, ModelOutput

PREFILL_TOKENS = 8192
"""Tokens of prompts, over all rows, that pass the model at once, which bounds the memory."""

GRAPHS = 16
"""Graphs that compiled steps may have: a cache that makes codes has some for each state of its newest block."""

RESERVED = 65536
"""The most tokens of a row that room is made for at once."""


class Session:
    """Rows of text that can be continued.

    Args:
        model: in evaluation mode.
        batch: how many rows.
        cache: what layers of attention keep of keys and values; None is `Exact`.
        star: how they read prompts, but not questions; None lets each token see all before it.

    Raises:
        ConfigError: no layer takes the cache, or reads prompts as `star` says.

    Attributes:
        state: the model's, after every token so far; a step changes it in place.
        logits: float32 [B, V], scores of each row's next token; None before the first.
        length: tokens so far, padding included.
        compiled: the model as `compile` leaves it for steps; None before.
    """

    compiled: Callable[..., ModelOutput] | None = None

    def __init__(
        self, model: LanguageModel, batch: int, cache: CacheKind | None = None, star: Star | None = None
    ) -> None:
        self.model, self.star = model, star
        self.cache = Exact() if cache is None else cache
        self.state: Any = model.decoding_state(batch, self.cache)
        if star is not None:
            check_star(self.cache, self.state)
        self.logits: Tensor | None = None
        self.length = 0
        self.batch = batch

    @torch.no_grad()
    def prefill(
        self, prompts: Sequence[Tensor], question: Tensor | None = None, lookahead: Tensor | None = None
    ) -> None:
        """Read prompts, int64 [T] each and not empty; a shorter one waits behind padding in a document of its own.

        Args:
            prompts: of all rows.
            question: int64 [n], which every row reads behind its prompt, after the caches have compressed that.
            lookahead: int64 [B, n], tokens that may follow the prompts, which choose with them what caches keep and are
                then forgotten; for kinds that can look ahead.

        Raises:
            ConfigError: the cache needs a question, or cannot read prompts of different lengths.
        """
        assert self.length == 0 and len(prompts) == self.batch
        read_prompts(self, prompts, question, lookahead, PREFILL_TOKENS)

    def reserve(self, count: int) -> None:
        """Make room in the caches for `count` more tokens of each row; without it they double their room when full.

        Beyond `RESERVED` tokens they double it anyway, since a text may end before.
        """
        for cache in caches(self.state):
            cache.reserve(min(count, RESERVED))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> None:
        """Read one more token of each row, int64 [B].

        Operators pass by autograd, which without gradients only takes time. `torch.inference_mode` does so too, but
        what it makes can no longer be written to outside of it, as a cache is.
        """
        if self.compiled is not None:
            self._take(self.compiled(tokens[:, None], state=self.state), 1)
            return
        with torch._C._AutoDispatchBelowAutograd():
            self.advance(tokens[:, None], None)

    def compile(self) -> None:
        """Compile the steps to come, of forks too: the first two take long, the others less time.

        Raises:
            ConfigError: a mixer would be compiled anew for each length, or a CPU has no compiler.
        """
        check_compiles(self.model)
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        self.compiled = torch.compile(self.model)

    def advance(self, tokens: Tensor, ids: Tensor | None) -> None:
        """Read more tokens of each row, int64 [B, T], with their documents, int32 [B, T]; None where these go on."""
        self._take(self.model(tokens, state=self.state, document_ids=ids), tokens.shape[1])

    def _take(self, output: ModelOutput, count: int) -> None:
        self.state = output.state
        self.logits = self.model.logits(output.hidden[:, -1])
        self.length += count

    def fork(self, count: int) -> "Session":
        """Every row `count` times, as rows of a new session that go on independently of these."""
        forked = Session.__new__(Session)
        forked.model, forked.cache, forked.star = self.model, self.cache, self.star
        forked.length, forked.batch = self.length, self.batch * count
        forked.state = forked_state(self.state, count)
        forked.compiled = self.compiled
        forked.logits = None if self.logits is None else self.logits.repeat_interleave(count, 0)
        return forked

    def standing_at(self, rows: Sequence[Sequence[int]]) -> "Session":
        """A session of the same rows that has read these tokens of each and nothing else.

        Rows advance together, so that one which ended early has read tokens that are not part of its text. What a mixer
        remembers cannot be taken back; the tokens are read again, from the first on.

        Args:
            rows: all tokens of each row.
        """
        session = Session(self.model, len(rows), self.cache)
        device = self.model.head.weight.device
        session.prefill([torch.tensor(row, device=device) for row in rows])
        return session

    def state_bytes(self) -> int:
        """Bytes of the state of all rows, without spare room in caches."""
        return total_bytes(self.state)

    def counted_bytes(self, length: int) -> int:
        """Bytes that one row holds after a prompt of `length` tokens, as mixers and caches count them."""
        return self._counted(
            length,
            lambda cache: cache.kind.bytes(cache.shape, length),
            lambda mixer: mixer.state_bytes(length),
        )

    def counted_read_bytes(self, length: int) -> int:
        """Bytes that one row reads for the token after a prompt of `length`, as mixers and caches count them.

        What is no cache counts what a step reads and writes, and holds no more than it can read.
        """
        return self._counted(
            length,
            lambda cache: cache.kind.step_bytes(cache.shape, length),
            lambda mixer: min(mixer.step_bytes(length), mixer.state_bytes(length + 1)),
        )

    def _counted(self, length: int, of_cache: Callable[[Cache], int], of_other: Callable[[Mixer], int]) -> int:
        """What the model holds after `length` tokens, with each layer's mixer counted in another way."""
        total = self.model.state_bytes(length)
        for mixer, state in zip(self.model.mixers(), self.state, strict=True):
            cache = state.mixer
            if isinstance(cache, Cache):
                carried = 0 if cache.carried is None else cache.carried.nbytes // cache.shape.batch
                own = of_cache(cache) + carried
            else:
                own = of_other(mixer)
            total += own - mixer.state_bytes(length)
        return total

    def read_bytes(self, bookkeeping: bool = True) -> int:
        """Bytes of the state that the last token of all rows read; of what is no cache, all."""
        total = total_bytes(self.state) if bookkeeping else held_bytes(self.state)[0]
        return total - sum(cache.held_bytes() - cache.read_bytes() for cache in caches(self.state))

    def spare_bytes(self) -> int:
        """Bytes of the room in caches for later tokens."""
        return sum(cache.spare_bytes() for cache in caches(self.state))

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write everything needed to go on, and `about`, which must be of tensors, numbers and texts.

        Raises:
            StorageError: the file cannot be written.
        """
        content = {
            "format": FORMAT,
            "state": saved_state(self.state),
            "cache": {"name": self.cache.name, "settings": settings_of(self.cache)},
            "logits": self.logits,
            "length": self.length,
            "batch": self.batch,
            "about": about,
        }
        save_tensors(path, content)

    @classmethod
    def load(
        cls, path: Path, model: LanguageModel, device: torch.device, cache: CacheKind | None = None
    ) -> tuple["Session", dict[str, Any]]:
        """The session that `save` wrote, and its `about`; loading runs no code of the file.

        Args:
            path: the file.
            model: the model it was saved with.
            device: where the tensors go.
            cache: the kind it was saved with, which need not be said if it is one of longmix.

        Raises:
            CheckpointError: there is no such file, or it is damaged, of another format or of another model.
            ConfigError: it was saved with another cache.
        """
        content = load_tensors(
            path,
            "saved generation",
            format_number=FORMAT,
            earlier=(WITHOUT_CACHES, WITH_CLASSES),
            without_digest=WITHOUT_DIGEST,
            device=device,
        )
        with reading(path, "saved generation of this model"):
            session = cls.__new__(cls)
            session.model, session.batch, session.length = model, content["batch"], content["length"]
            session.star = None
            session.logits, about = content["logits"], content["about"]
            session._check_sizes()
            session.cache = kind_of_saved(content.get("cache"), cache, str(path))
            session.state = restored_state(content, model, session.batch, session.cache)
            if any(each.length != session.length for each in caches(session.state)):
                raise ValueError("its caches hold another number of tokens than it says")
            if not isinstance(about, dict):
                raise ValueError("it does not say what it is of")
            session._check_goes_on(device)
        return session, about

    def _check_sizes(self) -> None:
        for name, number in (("batch", self.batch), ("length", self.length)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"its {name} is {number!r}")
        wanted = (self.batch, self.model.head.weight.shape[0])
        logits = self.logits
        check_weight("the scores", logits)
        if not (isinstance(logits, Tensor) and logits.is_floating_point() and tuple(logits.shape) == wanted):
            raise ValueError(f"its scores do not have the shape {list(wanted)}")

    def _check_goes_on(self, device: torch.device) -> None:
        """Read one more token on a copy, so that sizes which do not fit show at once, whatever the mixers."""
        self.fork(1).step(torch.zeros(self.batch, dtype=torch.int64, device=device))


def check_compiles(model: LanguageModel) -> None:
    """Check that steps of a model can be compiled, and once for all lengths.

    Raises:
        ConfigError: a mixer would be compiled anew for each length, or a CPU has no compiler.
    """
    for mixer in model.mixers():
        if mixer.recompiles:
            raise ConfigError(
                f"compile=true does not help {type(mixer).__name__}: its steps would be compiled anew for each length."
            )
    if model.head.weight.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ConfigError("compile=true needs a C++ compiler on a CPU, such as g++; install one.") from error
