"""longmix trains language models at 8k-64k context and lets one word choose what mixes the sequence."""

__version__ = "0.1.0"
