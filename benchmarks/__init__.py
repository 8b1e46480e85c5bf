"""Benchmarks of the engines against other people's implementations, run from the repository's root."""
