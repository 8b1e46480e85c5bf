"""The needs of a run before it is started: memory, traffic between devices, and time."""
