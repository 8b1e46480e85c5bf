"""What a run will need, before it is started: memory, traffic between devices, and time."""
