"""Analyses of mixers and models that do not look inside them."""
