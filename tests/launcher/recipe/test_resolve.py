"""Derived values, by Megatron's rules."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.recipe import load
from launcher.recipe.ramp import ramp

BASE = """
model: {num_layers: 2, hidden_size: 96, num_attention_heads: 4}
training: {seq_length: 16, micro_batch_size: 2}
launch: {nproc_per_node: 8, device: cpu}
parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}
"""


@pytest.fixture
def derive(write_recipe):
    """derive(*words) → the resolved recipe of BASE."""
    write_recipe("base", BASE)
    return lambda *words: load(["recipe=base", *words]).recipe


def test_model_and_processes(derive):
    r = derive()
    assert (r.model.ffn_hidden_size, r.model.num_query_groups, r.model.kv_channels, r.model.max_position_embeddings) == (
        384,
        4,
        24,
        16,
    )
    assert (r.derived.world_size, r.derived.data_parallel_size, r.training.global_batch_size, r.derived.num_microbatches) == (
        8,
        2,
        4,
        1,
    )
    assert derive("model.swiglu=true").model.ffn_hidden_size == 256  # int(2/3 x 384 / 64) x 64
    assert derive("training.global_batch_size=24").derived.num_microbatches == 6
    assert derive("training.global_batch_size=25").derived.num_microbatches is None
    assert derive("parallel.tensor_model_parallel_size=3").derived.data_parallel_size is None


def test_lengths_in_iterations_samples_and_tokens(derive):
    def lengths(*words):
        r = derive("training.global_batch_size=8", *words)
        return r.derived.train_iters, r.derived.train_samples, r.optimizer.lr_decay_iters, r.optimizer.lr_decay_samples

    assert lengths("training.train_iters=5") == (5, 40, 5, None)
    assert lengths("training.train_samples=43") == (5, 40, None, 43)
    assert lengths("training.train_tokens=700") == (5, 40, None, 43)
    assert lengths("training.train_iters=5", "optimizer.lr_decay_tokens=300") == (5, 40, 2, None)
    assert lengths("training.train_samples=43", "optimizer.lr_decay_tokens=300") == (5, 40, None, 18)


def test_warm_up_in_tokens_becomes_what_the_training_counts(derive):
    by_iters = derive("training.train_iters=5", "optimizer.lr_warmup_tokens=128").optimizer
    by_samples = derive("training.train_samples=50", "optimizer.lr_warmup_tokens=128").optimizer
    assert (by_iters.lr_warmup_iters, by_iters.lr_warmup_samples) == (2, 0)
    assert (by_samples.lr_warmup_iters, by_samples.lr_warmup_samples) == (0, 8)


def test_vocabulary_from_the_tokenizers_files(derive, tmp_path):
    vocab = {letter: i for i, letter in enumerate("abcdefghi")} | {"<|endoftext|>": 9}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    r = derive(f"tokenizer.vocab_file={tmp_path}/vocab.json", f"tokenizer.merge_file={tmp_path}/merges.txt")
    assert (r.derived.vocab_size, r.tokenizer.vocab_size, r.derived.padded_vocab_size) == (10, 10, 256)
    null = derive("tokenizer.type=NullTokenizer", "tokenizer.vocab_size=255", "parallel.tensor_model_parallel_size=1")
    assert (null.derived.vocab_size, null.tokenizer.vocab_size, null.derived.padded_vocab_size) == (256, 255, 256)
    assert derive("tokenizer.vocab_file=missing").derived.vocab_size is None


def test_split_belongs_to_data_path(derive):
    assert derive("data.data_path=a").data.split == "969, 30, 1"
    assert derive("data.train_data_path=a").data.split is None


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(1, 300), st.integers(1, 400))
def test_a_ramps_steps_are_those_of_megatrons_calculator(start, increment, increments, length, samples):
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    batch = start + increment * increments
    theirs = RampupBatchsizeNumMicroBatchesCalculator(batch, 1, 1, False, 1, start, increment, length)
    consumed, sizes = 0, []
    while True:
        theirs.update(consumed, consistency_check=True)
        size = theirs.get_current_global_batch_size()
        if consumed + size > samples:
            break
        consumed += size
        sizes.append(size)
    ours = [size for size, steps in ramp([start, increment, length], batch, samples) for _ in range(steps)]
    rest = (samples - sum(ours)) // batch
    assert ours + [batch] * rest == sizes
