"""Tokens to text as they arrive: whole characters only, and nothing behind a stop."""

import codecs
from collections.abc import Sequence

from longmix.data.tokens.tokenizers import Tokenizer

LONGEST_BEGINNING = 3
"""The most bytes of an incomplete UTF-8 character."""


class Row:
    """The generated text of one row. Its pieces together equal the text of all tokens decoded at once.

    A row ends at a stop, at an id that ends a text, or where another document begins.

    Args:
        tokenizer: turns tokens to text.
        stop: texts that end the row, of which nothing is kept.
        before: ids that the row goes on from; their last character may lack bytes that are still to come.
        generated: whether `before` was generated, so that an end among its ids is the row's.

    Attributes:
        text: so far, without what might become a stop.
        count: tokens taken.
        ended: whether the row has met its end.
        stopped: whether that was a stop.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], before: Sequence[int] = (), generated: bool = False
    ) -> None:
        self.tokenizer, self.stop = tokenizer, list(stop)
        self._ends = {tokenizer.separator_id, *tokenizer.end_ids}
        # the separator at the beginning of a text does not end it
        self.ended = generated and len(before) > 1 and before[-1] in self._ends
        self.text, self.count, self.stopped = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(_last_bytes(tokenizer, before))
        self._held = ""
        self._longest = max((len(text) for text in self.stop), default=0)

    def take(self, token: int) -> str:
        """Add a token and return the text that has become certain."""
        self.count += 1
        if token in self._ends:
            return self._finished()
        self._held += self._decoder.decode(content_of(self.tokenizer, token))
        if self._meets_stop():
            return self._keep(len(self._held))
        return self._keep(max(len(self._held) - max(self._longest - 1, 0), 0))

    def finish(self) -> str:
        """Return the text that was held back; call it after the last token."""
        if self.ended:
            return ""
        return self._finished(ended=False)

    def _finished(self, ended: bool = True) -> str:
        self._held += self._decoder.decode(b"", final=True)
        self.ended = self._meets_stop() or ended
        return self._keep(len(self._held))

    def _meets_stop(self) -> bool:
        """Whether the text held back contains a stop; if so, the row ends before it."""
        found = [index for index in map(self._held.find, self.stop) if index >= 0]
        if found:
            self.ended = self.stopped = True
            self._held = self._held[: min(found)]
        return self.ended

    def _keep(self, count: int) -> str:
        new, self._held = self._held[:count], self._held[count:]
        self.text += new
        return new


def content_of(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that an id of a model stands for; none for ids that the tokenizer lacks, as a padded vocabulary has."""
    return tokenizer.token_content(token) if token < tokenizer.vocab_size else b""


def _last_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """The end of the bytes that ids stand for: where the beginning of a character can lie."""
    last = b""
    for token in reversed(ids):
        last = content_of(tokenizer, int(token)) + last
        if len(last) >= LONGEST_BEGINNING:
            break
    return last[-LONGEST_BEGINNING:]
