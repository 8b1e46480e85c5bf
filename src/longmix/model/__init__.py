"""The language model around the mixers."""
