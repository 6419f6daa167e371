"""Answers from a trained model: megatron-core's modules with a key/value cache, over TP and PP.

`records` reads prompts and writes answers (no torch), `cache` runs the model, `sampling` chooses tokens,
`decode` answers a batch, `answer` answers a file.
"""
