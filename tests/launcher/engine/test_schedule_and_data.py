"""Lengths in steps, samples or tokens; schedules; batch sizes that grow; blends and sets of their own; masks."""

import math

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter
from tests.launcher.engine.runs import layout, losses, records, yuan

# The tiny model's 8 steps of 8 samples of 32 tokens, counted otherwise. A recipe's own lengths are put aside by these.
IN_SAMPLES = ["training.train_samples=64", "optimizer.lr_decay_samples=64", "optimizer.lr_warmup_samples=16"]
IN_TOKENS = ["training.train_tokens=2048", "optimizer.lr_decay_tokens=2048", "optimizer.lr_warmup_tokens=512"]


def rates(folder, run: str) -> list[float]:
    return [record["learning_rate"] for record in records(folder / "runs" / run / "metrics.jsonl")]


@pytest.mark.parametrize("words", [IN_SAMPLES, IN_TOKENS], ids=["samples", "tokens"])
def test_a_training_counted_in_samples_or_tokens_is_the_same_one(small, straight, request, words):
    curve = losses(small, straight("one_straight", *layout()))
    yuan(small, "pretrain", "recipe=small", "run.name=" + request.node.callspec.id, *words)
    assert losses(small, request.node.callspec.id) == curve


@pytest.mark.parametrize(("name", "words", "rate"), [
    ("constant", ["optimizer.lr_decay_style=constant"], lambda step: 1.0),
    ("linear", ["optimizer.lr_decay_style=linear", "optimizer.min_lr=1e-3"], lambda step: 0.1 + 0.9 * (1 - (step - 2) / 6)),
    ("cosine", ["optimizer.min_lr=1e-3"], lambda step: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))),
    ("wsd", ["optimizer.lr_decay_style=WSD", "optimizer.lr_wsd_decay_style=linear", "optimizer.lr_wsd_decay_iters=4"],
     lambda step: min(1.0, 1 - (step - 4) / 4)),
])  # fmt: skip
def test_learning_rates_warm_up_and_decay(small, name, words, rate):
    """The value logged for a step is the one it leaves for the next, as Megatron-LM logs it."""
    yuan(small, "pretrain", "recipe=small", f"run.name={name}", "training.eval_iters=0", *words)
    assert rates(small, name) == pytest.approx([0.01 * (step / 2 if step < 2 else rate(step)) for step in range(1, 9)])


def test_the_batch_grows(small):
    words = [*IN_SAMPLES, "training.rampup_batch_size=[4,4,16]", "training.eval_iters=0"]
    yuan(small, "pretrain", "recipe=small", "run.name=ramp", *words)
    seen = [(record["global_batch_size"], record["consumed_samples"]) for record in records(small / "runs" / "ramp" / "metrics.jsonl")]
    assert seen[:5] == [(4, 4), (4, 8), (4, 12), (4, 16), (8, 24)] and seen[-1] == (8, 64)


@pytest.fixture(scope="module")
def two_sets(small):
    """Beside `ids`, in which an id grows by 1 to 3, a set of the one id 7."""
    writer = IndexedWriter(small / "sevens", np.uint16)
    for _ in range(60):
        writer.add_document([7] * 100)
    writer.finish()
    return small


def test_a_blend_mixes_by_weight(two_sets, straight):
    pure = losses(two_sets, straight("one_straight", *layout()))
    for share in (0.2, 0.8):
        yuan(two_sets, "pretrain", "recipe=small", f"run.name=blend{share}", f"data.data_path=[{1 - share:.1f},ids,{share},sevens]")
    little, much = losses(two_sets, "blend0.2"), losses(two_sets, "blend0.8")
    assert much[8] < little[8] - 0.5 and little[8] < pure[8] - 0.1  # 7 after 7 is soon learnt


def test_each_set_may_have_files_of_its_own(two_sets):
    words = ["data.data_path=null", "data.split=null", "data.train_data_path=ids", "data.valid_data_path=sevens", "data.test_data_path=sevens"]
    yuan(two_sets, "pretrain", "recipe=small", "run.name=own", *words)
    assert {record["set"] for record in records(two_sets / "runs" / "own" / "validation.jsonl")} == {"validation", "final validation", "test"}


def test_documents_are_kept_apart_the_same_on_every_stage(small, straight):
    words = ["data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true",
             "model.attention_dropout=0", "model.hidden_dropout=0", "tokenizer.vocab_size=50"]  # fmt: skip
    writer = IndexedWriter(small / "short", np.uint16)
    for number in range(400):
        writer.add_document([(number + step) % 50 for step in range(11)] + [50])  # 50 is NullTokenizer's end of document
    writer.finish()
    apart = losses(small, straight("apart", *layout(), "data.data_path=short", *words))
    across = losses(small, straight("across", *layout(), "data.data_path=short", *words[3:]))
    assert apart[1] != across[1]
    padding = "model.make_vocab_size_divisible_by=32"  # x TP 2: the 64 ids of TP 1
    yuan(small, "pretrain", "recipe=small", "run.name=apart_tp2", "data.data_path=short", *words, *layout(tp=2), padding)
    assert losses(small, "apart_tp2") == pytest.approx(apart, abs=1e-4)


def test_data_made_anew_under_the_same_name_is_read_anew(small):
    writer = IndexedWriter(small / "changing", np.uint16)
    for _ in range(60):
        writer.add_document(np.arange(100) % 255)
    writer.finish()
    words = ["data.data_path=changing", "training.train_iters=2", "optimizer.lr_decay_iters=8"]
    yuan(small, "pretrain", "recipe=small", "run.name=before", *words)
    writer = IndexedWriter(small / "changing", np.uint16)
    for _ in range(45):
        writer.add_document([7] * 50)  # fewer and shorter: the old sample index would point beyond its end
    writer.finish()
    yuan(small, "pretrain", "recipe=small", "run.name=after", *words)
    assert losses(small, "after")[2] < losses(small, "before")[2]
