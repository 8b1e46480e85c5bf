"""The states of mixers that choose blocks: keys and values, and what they choose by."""

from dataclasses import dataclass

from torch import Tensor

from longmix.mixers.parts.attention_state import AttentionState
from longmix.mixers.parts.states import mixer_state


@dataclass
class SeenState:
    """Keys and values seen so far.

    Attributes:
        seen: the keys and values.
    """

    seen: AttentionState

    @property
    def last_id(self) -> Tensor | None:
        """int [B], the document of the last token; None before the first."""
        return self.seen.last_id

    @property
    def next_position(self) -> Tensor:
        """int64 [B], see `AttentionState`."""
        return self.seen.next_position

    @property
    def one_document(self) -> bool:
        """Whether no ids were passed so far."""
        return self.seen.one_document

    @property
    def carried(self) -> Tensor | None:
        """See `AttentionState`."""
        return self.seen.carried


@mixer_state()
@dataclass
class BlockState(SeenState):
    """The state of MoBA, with the means of the complete blocks of the document that goes on.

    Attributes:
        seen: the keys and values.
        means: [B, S // block, Hkv, K] for S keys, in float32 or wider; zeros where a row has fewer blocks.
    """

    means: Tensor


@mixer_state()
@dataclass
class NSAState(SeenState):
    """The state of NSA, with the compressed blocks of the document that goes on.

    Attributes:
        seen: keys and values [B, S, 3 * Hkv, head_dim], part by part.
        key, value: [B, S // compress_stride, Hkv, head_dim]; zeros where a row has fewer blocks.
    """

    key: Tensor
    value: Tensor
