"""Formats of checkpoints: each can be opened as a `Source`, and written as a `Target`."""
