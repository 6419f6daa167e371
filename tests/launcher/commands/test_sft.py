"""`yuan sft` from rows to answers: a model of 30,000 numbers learns to add, and answers in the form that it was trained in."""

import json
import shutil

import pytest

from tests.data_tools.samples import small_gpt2, write_jsonl
from tests.launcher.engine.runs import losses, records, yuan

RECIPE = """\
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 2, max_position_embeddings: 64, make_vocab_size_divisible_by: 64,
        attention_dropout: 0.0, hidden_dropout: 0.0}}
training: {{seq_length: 64, micro_batch_size: 2, global_batch_size: 2, eval_interval: 20, eval_iters: 100, {length}}}
optimizer: {{lr: 2.0e-2, lr_decay_style: cosine, weight_decay: 0.0}}
tokenizer: {{vocab_file: {vocab_file}, merge_file: {merge_file}, chat_template: {template}}}
data: {{{data}}}
checkpoint: {{{checkpoint}}}
logging: {{log_interval: 1, tensorboard: false}}
launch: {{device: cpu, cpu_threads: 1}}
"""
ROWS = [{"instruction": f"{a}+{b}", "output": str(a + b)} for a in range(5) for b in range(5)]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A base model, and its fine-tuning on 25 sums; what the fine-tuning printed."""
    folder = tmp_path_factory.mktemp("sft")
    files = small_gpt2(folder)
    write_jsonl(folder / "train.jsonl", ROWS)
    (folder / "valid.json").write_text(json.dumps(ROWS[::5]))
    write_jsonl(folder / "text.jsonl", [{"text": row["instruction"] + "=" + row["output"]} for row in ROWS] * 8)
    base = RECIPE.format(**files, length="train_iters: 1", template="null", data="data_path: base_text_document, split: '100,0,0'", checkpoint="")
    tuned = RECIPE.format(
        **files, length="epochs: 40, early_stop_patience: 9", template="plain", data="train: train.jsonl, valid: valid.json",
        checkpoint="load: runs/base, save_interval: 25, keep_best: true",
    )  # fmt: skip
    (folder / "base.yaml").write_text(base.replace("eval_iters: 100", "eval_iters: 0"))
    (folder / "tuned.yaml").write_text(tuned)
    tokenizer = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", path)]
    yuan(folder, "preprocess", "--input", "text.jsonl", "--output-prefix", "base", "--append-eod", *tokenizer)
    yuan(folder, "pretrain", "recipe=base.yaml")
    return folder, yuan(folder, "sft", "recipe=tuned.yaml").stderr


def test_what_it_says(story):
    folder, printed = story
    assert "prepared   train.jsonl: 25 rows" in printed and "prepared   valid.json: 5 rows" in printed
    train = next(line for line in printed.splitlines() if line.startswith("train "))
    assert train.startswith("train      25 rows in 3 samples of 64, ") and "supervised tokens" in train
    assert "epoch      2 steps of 2 samples, the last with 1 sample and 1 without loss that fill it up\n" in printed
    assert "40 epochs, 80 steps" in printed
    assert "early stop" not in printed and "the best so far" in printed


def test_an_epoch_of_one_step_within_the_warm_up_trains_nothing(story):
    words = ["training.epochs=1", "training.global_batch_size=4", "optimizer.lr_warmup_fraction=0.1", "run.name=once", "--dry-run"]
    printed = yuan(story[0], "sft", "recipe=tuned.yaml", *words).stderr
    assert "warning: the only step is the first of a warm-up, at a learning rate of 0: it changes no weight" in printed


def test_a_warm_up_that_outlasts_the_epochs_is_refused_once_they_are_counted(story):
    """megatron-core asserts it, within every rank."""
    words = ["training.epochs=2", "optimizer.lr_warmup_fraction=null", "run.name=long", "--dry-run"]
    refused = yuan(story[0], "sft", "recipe=tuned.yaml", *words, "optimizer.lr_warmup_iters=4", check=False)
    assert refused.returncode == 2 and "error: a warm-up of 4 steps must be shorter than the decay of 4 steps" in refused.stderr
    assert "fix:   optimizer.lr_warmup_iters=0, and" in refused.stderr
    yuan(story[0], "sft", "recipe=tuned.yaml", *words, "optimizer.lr_warmup_iters=3")


def test_its_validation_loss_falls_and_the_best_is_kept(story):
    folder, _ = story
    found = {one["iteration"]: one["lm_loss_validation"] for one in records(folder / "runs/tuned/validation.jsonl")}
    assert list(found) == [20, 40, 60, 80] and found[80] < found[20]
    best = (folder / "runs/tuned/checkpoints/best_checkpointed_iteration.txt").read_text()
    assert int(best) == min(found, key=found.get)


def test_a_stopped_run_goes_on_in_the_middle_of_an_epoch(story):
    """Step 25 is the first of an epoch's two: the orders of the rows and the learning rate go on, bit for bit."""
    folder, _ = story
    run = folder / "runs" / "again"
    shutil.copytree(folder / "runs" / "tuned", run)
    for later in sorted((run / "checkpoints").glob("iter_*")):
        if later.name > "iter_0000025":
            shutil.rmtree(later)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("25")
    (run / "metrics.jsonl").unlink()
    yuan(folder, "sft", "recipe=tuned.yaml", "run.name=again", "run.dir=runs/again")
    straight, again = losses(folder, "tuned"), losses(folder, "again")
    assert list(again) == list(range(26, 81)) and all(again[step] == straight[step] for step in again)


def test_other_rows_are_noticed(story):
    folder, _ = story
    rows = (folder / "train.jsonl").read_text()
    write_jsonl(folder / "train.jsonl", ROWS[::-1])
    try:
        done = yuan(folder, "sft", "recipe=tuned.yaml", check=False)
    finally:
        (folder / "train.jsonl").write_text(rows)
    assert done.returncode == 2 and "derived.rows_sha256" in done.stderr and "--accept-changes" in done.stderr


def test_it_answers_in_the_form_that_it_was_trained_in(story):
    folder, _ = story
    asked = [*ROWS[:4], {"messages": [{"role": "user", "content": "4+4"}]}, {"messages": [{"role": "assistant", "content": "8"}]}]
    write_jsonl(folder / "asked.jsonl", asked)
    yuan(folder, "generate", "--input", "asked.jsonl", "--output", "answers.jsonl", "--load", "runs/tuned", "--max-new-tokens", 8)
    answers = records(folder / "answers.jsonl")
    assert [answer["finish_reason"] for answer in answers] == ["stop"] * 5 + ["error"]
    assert all(answer["output"].isdigit() for answer in answers[:5]) and answers[5]["error"] == "the last message is no question"


def test_prepared_rows_are_shown_with_their_mask(story):
    folder, printed = story
    prefix = next(line for line in printed.splitlines() if line.startswith("train ")).rsplit("(")[1].rstrip(")")
    shown = yuan(folder, "data", "inspect", prefix, "--mask", "--document", 24).stdout
    assert "in the template plain" in shown and "document 24: 6 tokens, 2 of them trained" in shown
    assert [line.split()[1:] for line in shown.splitlines() if line.startswith("*")][0][1] == "'8'"
