"""The `yuan` command: recipes, checks, launching, and the Megatron engine under them."""
