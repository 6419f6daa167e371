"""Checkpoints as files: where they lie, what is in them. Needs no GPU, no process group, and knows nothing of `launcher`."""
