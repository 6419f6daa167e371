"""The training and generation engine: megatron-core, and the little around it that is ours."""
