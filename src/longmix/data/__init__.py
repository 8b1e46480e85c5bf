"""From text to training windows: corpora, tokenizers, token files, windows and the Lightning datamodule.

Data flows one way: corpus -> tokenizer -> token file -> windows -> batches. Only `datamodule` imports Lightning, so
that everything else can be used from a script or a test without it.
"""
