"""Time and memory on this machine, against what the machine can do."""
