"""Tasks that are made, not read."""
