"""From a pretrained model to one with other mixers."""
