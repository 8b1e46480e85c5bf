"""Caches: what a layer of softmax attention remembers of the tokens before, while text is generated."""
