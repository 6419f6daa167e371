"""What a family of models has that megatron-core's GPTModel has not: a file for each such family."""
