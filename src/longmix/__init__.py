"""longmix trains language models at 8k-64k context and lets one word choose what mixes the sequence.

    run = longmix.train(["mixer=flash", "seq_len=512"], folder="runs/first")
    model = longmix.load("runs/first")
    model.generate("Fellow citizens", max_tokens=64)
    model.evaluate(task="loss")

What is named here is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longmix import mixers as mixers
    from longmix.api import Loaded as Loaded
    from longmix.api import Run as Run
    from longmix.api import load as load
    from longmix.api import train as train
    from longmix.errors import LongmixError as LongmixError

__version__ = "0.1.0"
__all__ = ["Loaded", "LongmixError", "Run", "__version__", "load", "mixers", "train"]

_PLACES = {
    "Loaded": "longmix.api",
    "LongmixError": "longmix.errors",
    "Run": "longmix.api",
    "load": "longmix.api",
    "train": "longmix.api",
}


def __getattr__(name: str) -> Any:
    if name == "mixers":
        return importlib.import_module("longmix.mixers")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
