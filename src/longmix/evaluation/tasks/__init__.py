"""The tasks of `evaluate.py`, one file each: what `task=NAME` names is the class in the file of that name."""
