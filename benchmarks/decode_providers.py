"""What `benchmarks.decode` compares: a model of longmix and the same weights in transformers, each with its caches.

A provider reads prompts and then takes tokens one by one, always the most likely.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from longmix.config import ModelConfig
from longmix.generation.session import PREFILL_TOKENS, Session
from longmix.interop.huggingface import llama
from longmix.model.backbone import LanguageModel

OURS, UNEQUAL, COMPILED = "longmix", "longmix, unequal rows", "longmix, compiled"
DYNAMIC, STATIC = "transformers, dynamic", "transformers, static"
THEIRS = DYNAMIC, STATIC


class Ours:
    """Rows of a longmix model, as `generate.py` goes on with them.

    Args:
        model: in evaluation mode.
        copies: how many times each prompt is continued; it is read once.
        compiled: whether steps are, by the first that are made.
    """

    def __init__(self, model: LanguageModel, copies: int = 1, compiled: bool = False) -> None:
        self.model, self.copies, self.compiled = model, copies, compiled

    def prefill(self, prompts: Sequence[torch.Tensor], room: int) -> torch.Tensor:
        """Read prompts, int64 [T] each; the next tokens, int64 [B]. Room is made for so many more."""
        self.session = Session(self.model, len(prompts))
        self.session.reserve(max(map(len, prompts)) + room)
        self.session.prefill(prompts)
        if self.copies > 1:
            self.session = self.session.fork(self.copies)
            self.session.reserve(room)
        if self.compiled:
            self.session.compile()
        return self._chosen()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read a token of each row, int64 [B]; the next ones."""
        self.session.step(tokens)
        return self._chosen()

    def _chosen(self) -> torch.Tensor:
        assert self.session.logits is not None
        return self.session.logits.argmax(-1)


class Theirs:
    """Rows of a transformers model with one of its caches; prompts are of one length.

    A static cache is filled in pieces, since its mask for all of a long prompt does not fit into the memory.

    Args:
        model: in evaluation mode.
        static: whether room for all tokens is made at once.
        copies: as in `Ours`; rows are repeated, as `num_return_sequences` does.
    """

    def __init__(self, model: Any, static: bool, copies: int = 1) -> None:
        self.model, self.static, self.copies = model, static, copies
        # later versions warn at the older name
        takes = inspect.signature(model.forward).parameters
        self._word = "cache" if "cache" in takes else "past_key_values"

    def prefill(self, prompts: Sequence[torch.Tensor], room: int) -> torch.Tensor:
        """See `Ours.prefill`."""
        from transformers import DynamicCache, StaticCache

        tokens = torch.stack(list(prompts)).repeat_interleave(self.copies, 0)
        batch, length = tokens.shape
        if self.static:
            self.cache: Any = StaticCache(config=self.model.config, max_cache_len=length + room)
        else:
            self.cache = DynamicCache(config=self.model.config)
        step = max(1, PREFILL_TOKENS // batch) if self.static else length
        for piece in tokens.split(step, 1):
            chosen = self._read(piece)
        return chosen

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Ours.step`."""
        return self._read(tokens[:, None])

    @torch.no_grad()
    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.model(tokens, use_cache=True, logits_to_keep=1, **{self._word: self.cache})
        return found.logits[:, -1].argmax(-1)


Provider = Ours | Theirs


def exported(model: LanguageModel, config: ModelConfig) -> Any:
    """The model in the type of Llama's family that holds it, with the same weights, in evaluation mode.

    Raises:
        ConfigError: no type of the family holds it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": model.embedding.num_embeddings, "max_position_embeddings": 1 << 20}
    described = AutoConfig.for_model(**llama.described(model, config), **sizes)
    theirs = AutoModelForCausalLM.from_config(described, dtype=model.head.weight.dtype)
    theirs.load_state_dict(llama.their_weights(model.state_dict(), described.model_type))
    return theirs.eval()
