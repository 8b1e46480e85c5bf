"""From tokens to text while they come: whole characters only, and nothing past a stop."""

from collections.abc import Sequence

from longmix.data.tokenizers import Tokenizer

UNFINISHED = "�"
"""What bytes that are no character yet decode to."""

LONGEST_CHARACTER = 4
"""Bytes; as many tokens without a whole character are none."""


class Row:
    """The generated text of one row.

    Args:
        tokenizer: turns tokens to text.
        stop: texts that end the row, of which nothing is kept.

    Attributes:
        text: so far, without what might become a stop.
        count: tokens taken.
        ended: whether a stop or the end of the document was met.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.text, self.count, self.ended = "", 0, False
        self._pending: list[int] = []
        self._held = ""
        self._longest = max((len(text) for text in self.stop), default=0)

    def take(self, token: int) -> str:
        """Add a token and return the text that is certain now and was not before."""
        self.count += 1
        if token == self.tokenizer.separator_id:
            return self._end(self._held + self._decoded(final=True))
        self._pending.append(token)
        self._held += self._decoded(final=len(self._pending) >= LONGEST_CHARACTER)
        found = [place for place in map(self._held.find, self.stop) if place >= 0]
        if found:
            return self._end(self._held[: min(found)])
        certain = len(self._held) - max(self._longest - 1, 0)
        return self._keep(max(certain, 0))

    def finish(self) -> str:
        """Return what was held back; call when no token follows."""
        if self.ended:
            return ""
        self._held += self._decoded(final=True)
        return self._keep(len(self._held))

    def _decoded(self, final: bool) -> str:
        text = self.tokenizer.decode(self._pending)
        if text.endswith(UNFINISHED) and not final:
            return ""
        self._pending = []
        return text

    def _end(self, text: str) -> str:
        self.ended = True
        self.text += text
        self._held = ""
        return text

    def _keep(self, count: int) -> str:
        new, self._held = self._held[:count], self._held[count:]
        self.text += new
        return new
