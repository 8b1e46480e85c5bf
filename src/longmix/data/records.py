"""The documents in the records of a table: one of its fields."""

from collections.abc import Iterable, Iterator
from typing import Any

from longmix.errors import DataError


def texts_of(records: Iterable[dict[str, Any]], field: str, place: str, first: int = 0) -> Iterator[str]:
    """The text field of each record; a null one gives an empty document, which the token file counts.

    Args:
        records: one after the other.
        field: which must be there in the first of them.
        place: where they come from, for messages.
        first: number of the first record there.

    Raises:
        DataError: the field is missing or holds something else.
    """
    for number, record in enumerate(records, first):
        if number == first and field not in record:
            raise DataError(
                f"data.corpus.field: the records of {place} have no field {field!r}; they have {', '.join(record)}"
            )
        text = record.get(field)
        if text is not None and not isinstance(text, str):
            raise DataError(f"field {field!r} of record {number} of {place} holds {type(text).__name__}, not text")
        yield text or ""
