"""`LongmixForCausalLM`: a language model of longmix, whatever its mixers, behind the interface of transformers.

Notable: the cache is the model's own state, one per layer, whose size is whatever the mixers remember; padding becomes
a document of its own, which the text does not see; a folder that lacks a weight is refused, where transformers would
draw it anew and warn.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from longmix.aliases import renewed
from longmix.config import ModelConfig, Plain, StoredConfig, plain
from longmix.errors import CheckpointError, ConfigError
from longmix.interop.huggingface.seal import check_seal
from longmix.mixers.parts.states import forked, with_rows
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.model.tuned_states_file import memory_features, tune_states, tuned_states
from longmix.trust import check_model_nodes

MODEL_TYPE = "longmix"

CACHE_NAMES = ("cache", "past_key_values")
"""transformers' names for a model's cache: the first from 5.24 on, the second until 5.23."""

CACHE_FIELD = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})
"""The name that the installed version gives it in outputs, where its `generate` looks for it."""


class LongmixConfig(PreTrainedConfig):
    """The `config.json` of type `longmix`.

    Args:
        model, mixer: those of the training configuration, as `config.yaml` has them.
        vocab_size: rows of the embedding.
        max_position_embeddings: tokens of a training window; nothing ends there.
        tuned_features: size of a tuned memory beside tuned states, 0 for states alone; None if none were tuned.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = list(CACHE_NAMES)  # noqa: RUF012

    def __init__(
        self,
        model: Plain | None = None,
        mixer: Plain | None = None,
        vocab_size: int = 0,
        max_position_embeddings: int = 0,
        tuned_features: int | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.mixer = model or {}, mixer or {}
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.tuned_features = tuned_features
        settings["tie_word_embeddings"] = bool(self.model.get("tie_head", False))
        super().__init__(**settings)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.model["d_model"]

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return self.model["num_layers"]

    @classmethod
    def of(cls, model: LanguageModel, config: StoredConfig) -> "LongmixConfig":
        """The description of a model and of the configuration it was trained with.

        Raises:
            ConfigError: it has a part that is not of longmix.
        """
        built_from = plain(trusted({"model": config.model.entries, "mixer": config.mixer.entries}))
        tuned = tuned_states(model.state_dict())
        features = memory_features(tuned) if tuned else None
        vocab_size = model.embedding.num_embeddings
        return cls(
            **built_from,
            vocab_size=vocab_size,
            max_position_embeddings=config.seq_len,
            tuned_features=features,
        )


def trusted(stored: Mapping[str, Any]) -> ModelConfig:
    """The part of a stored configuration that a model is built from, which may name classes of longmix alone.

    Others could call any function.

    Raises:
        ConfigError: it names one.
    """
    renewed_part = renewed({key: stored.get(key) for key in ("model", "mixer")})
    try:
        check_model_nodes(renewed_part)
    except ConfigError as error:
        raise ConfigError(
            f"{str(error).partition(';')[0]}; these folders hold models of longmix's own parts."
        ) from None
    return ModelConfig.of(renewed_part)


class StateCache(Cache):
    """The states of a model's mixers after the tokens so far, in the place of keys and values.

    Args:
        state: of `LanguageModel.decoding_state`, or `init_state` where gradients are kept; one entry per layer.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: list[Any]) -> None:
        super().__init__(layers=[])
        self.state = state
        self.length = 0

    @property
    def is_linear(self) -> list[bool]:
        """No layer is of transformers' linear kind: the length is known, so `generate` leaves out what was read."""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that beam search goes on with."""
        self.state = with_rows(self.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.state = forked(self.state, repeats)

    def crop(self, *_: Any) -> None:
        """Refused, since a state cannot forget its latest tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError("a longmix model cannot take tokens back: its state holds no trace of single tokens.")


class LongmixForCausalLM(PreTrainedModel, GenerationMixin):
    """A longmix model as transformers' `AutoModelForCausalLM` and `generate` take it.

    It has no `inputs_embeds`, no attention maps and no assisted decoding, which would have to take tokens back. Mixers
    that learn between optimizer steps (running means, centroids) do so in longmix's own training alone.

    Raises:
        ConfigError: the configuration names a class outside longmix, or cannot be built.
    """

    config_class = LongmixConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: LongmixConfig) -> None:
        super().__init__(config)
        self.model = build_model(trusted({"model": config.model, "mixer": config.mixer}), config.vocab_size)
        if config.tuned_features is not None:
            tune_states(self.model, config.tuned_features)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load an exported folder, after its files have been verified; arguments as of transformers.

        Raises:
            CheckpointError: the folder lacks weights, or has others.
        """
        name = args[0] if args else options.get("pretrained_model_name_or_path")
        if name is not None and Path(name).is_dir():
            check_seal(Path(name))
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = loaded
        for key, text in (("missing_keys", "lacks"), ("unexpected_keys", "has, beyond the model's weights,")):
            if info[key]:
                raise CheckpointError(f"{model.name_or_path} {text} {', '.join(sorted(info[key])[:5])}.")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, since every part of longmix initialises itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False, since `forward` makes the cache."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.head = cast(nn.Linear, new_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: StateCache | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Scores of the next tokens, and the loss if there are labels.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S], S being T and the tokens in the cache; 0 for padding before or after a row's text.
            cache, past_key_values: of an earlier output, to go on from; give it by one of the two names.
            labels: int64 [B, T], not shifted; -100 where nothing is to be predicted. While training, the mixers'
                auxiliary losses are added.
            use_cache: whether to return a cache.
            logits_to_keep: how many of the last positions have their scores computed, or which; 0 for all.
            return_dict: False for a tuple.

        Raises:
            ValueError: a mask of another length, or with padding in the middle of a row; or two caches.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing; give one of them.")
        batch, length = input_ids.shape
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            # caches of keys and values are for inference
            begin = self.model.init_state if torch.is_grad_enabled() else self.model.decoding_state
            cache = StateCache(begin(batch))
        past = 0 if cache is None else cache.length
        output = self.model(
            input_ids,
            state=None if cache is None else cache.state,
            document_ids=None if attention_mask is None else document_ids(attention_mask, past, length),
        )
        if cache is not None:
            cache.state, cache.length = output.state, past + length
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(output.hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
            loss = loss + sum(output.losses.values()) if self.training else loss
        held: dict[str, Any] = {CACHE_FIELD: cache}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **held)
        return result.to_tuple() if return_dict is False else result


def document_ids(mask: Tensor, past: int, length: int) -> Tensor | None:
    """Ids of the last `length` tokens of rows in which padding is a document of its own: int32 [B, T], or None.

    Args:
        mask: [B, past + length], 0 for padding.
        past: tokens that were read before.
        length: tokens to read.

    Raises:
        ValueError: another size, or padding in the middle of a row.
    """
    if mask.ndim != 2 or mask.shape[1] != past + length:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; it must be [batch, {past + length}], tokens in the cache "
            "included."
        )
    seen = mask != 0
    if seen.all():
        return None
    begins = seen.int().diff(dim=1, prepend=seen.new_zeros(len(seen), 1).int())
    if (begins > 0).sum(1).max() > 1:
        raise ValueError("attention_mask has padding in the middle of a row; pad before the text (on the left).")
    ids = (seen[:, 1:] != seen[:, :-1]).int().cumsum(1, dtype=torch.int32)
    return torch.nn.functional.pad(ids, (1, 0))[:, past:]


def register() -> None:
    """Make the type `longmix` known to transformers."""
    AutoConfig.register(MODEL_TYPE, LongmixConfig, exist_ok=True)
    AutoModelForCausalLM.register(LongmixConfig, LongmixForCausalLM, exist_ok=True)
