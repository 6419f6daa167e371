"""Old command lines into recipes, and recipes into Megatron-LM's command line."""
