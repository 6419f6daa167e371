"""Text to tokens to Megatron's .bin/.idx. Knows nothing of `launcher`, and imports no torch."""
