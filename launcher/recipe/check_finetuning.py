"""Checks of a fine-tuning: its length, its rows of questions and answers, and the weights that it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from checkpoints.folder import has_checkpoints
from launcher.recipe.check_schedule import LENGTHS
from launcher.recipe.check_schedule import length as training_length
from launcher.recipe.problem import Case, Problem

ROWS_READ = 20  # of each file: enough for wrong keys or a wrong format, at no cost


def length(case: Case) -> Iterator[Problem]:
    """epochs, or one of the lengths that pretraining has too."""
    epochs, given = case.recipe.training.epochs, [key for key in LENGTHS if case.value(key) is not None]
    if epochs is None and not given:
        yield Problem("nothing says how long to train", "training", "give training.epochs, or one of " + ", ".join(LENGTHS))
    elif epochs is None:
        yield from training_length(case)
    elif case.recipe.training.rampup_batch_size:
        what = "epochs are not counted with a batch that grows"
        yield Problem(what, case.at("training.epochs", "training.rampup_batch_size"), "training.rampup_batch_size=null, or training.train_samples=NUMBER")
    elif given:
        yield Problem(
            "the length of the training is given twice",
            case.at("training.epochs", *given),
            "keep one, such as training.epochs, and set the others to null",
        )


def rows(case: Case) -> Iterator[Problem]:
    """The files of data.train and data.valid are there, and their first rows are questions and answers."""
    d, t = case.recipe.data, case.recipe.training
    if d.train is None:
        yield Problem("no training data is given", "data", "data.train=FILE.jsonl, with a question and an answer on each line")
    if d.data_path is not None:
        yield Problem(
            "data.data_path is for pretraining, and fine-tuning reads data.train",
            case.at("data.data_path"),
            "data.data_path=null, or take `yuan pretrain`",
        )
    if d.valid is None and t.eval_iters and d.train is not None:
        yield Problem(
            "there are no validation data, so nothing is evaluated",
            case.at("data.valid", "training.eval_iters"),
            "training.eval_iters=0, or data.valid=FILE.jsonl",
            "warning",
        )
    for key in ("data.train", "data.valid"):
        value = case.value(key)
        for name in value if isinstance(value, list) else [] if value is None else [value]:
            yield from _one_file(case, key, name)


def _one_file(case: Case, key: str, name: object) -> Iterator[Problem]:
    from data_tools.conversations import conversation
    from data_tools.errors import InputError
    from data_tools.records import BadLine
    from data_tools.rows import first_rows

    if not isinstance(name, str):
        yield Problem(f"{key} names a file or a list of files, and {name!r} is neither", case.at(key), f"{key}=FILE.jsonl")
        return
    bad_rows = 0
    try:
        for where, row in first_rows(Path(name), ROWS_READ, case.recipe.preprocess.format):
            try:
                conversation(row)
            except BadLine as bad:
                bad_rows += 1
                if bad_rows > case.recipe.preprocess.max_bad:
                    raise bad.at(where) from None
    except InputError as error:
        yield Problem(error.what, f"{error.where}, {case.at(key)}" if error.where else case.at(key), error.fix)


def template(case: Case) -> Iterator[Problem]:
    """How questions and answers are written is known, and the tokenizer can write it."""
    from data_tools.errors import TokenizerError
    from data_tools.templates import build_template
    from launcher.recipe.tokenizer import tokenizer_of

    name = case.recipe.tokenizer.chat_template
    if name is None:
        fix = "tokenizer.chat_template=alpaca, yuan, llama2, chatml, plain, or tokenizer for the tokenizer's own"
        yield Problem("nothing says how questions and answers are written", case.at("tokenizer.chat_template"), fix)
        return
    try:
        tokenizer = tokenizer_of(case.recipe.tokenizer)
    except TokenizerError:
        return  # told by `check_data.tokenizer`
    try:
        build_template(name, tokenizer)
    except TokenizerError as error:
        key = case.at("tokenizer.chat_template")
        yield Problem(error.what, key if error.where == "tokenizer.chat_template" else f"{error.where}, {key}", error.fix)


def weights(case: Case) -> Iterator[Problem]:
    """Fine-tuning starts from a checkpoint; whether it is there is `check_checkpoint.load`'s to say."""
    if case.recipe.checkpoint.load is None and not has_checkpoints(Path(case.recipe.run.dir or "") / "checkpoints"):
        yield Problem(
            "fine-tuning starts from trained weights, and none are named",
            case.at("checkpoint.load"),
            "checkpoint.load=RUN_OR_CHECKPOINT, or take `yuan pretrain` to start from random ones",
        )
    elif case.recipe.checkpoint.load is not None and not case.recipe.checkpoint.finetune:
        what = "the fine-tuning would begin at the step, the schedule and the optimizer of the training that it starts from"
        yield Problem(what, case.at("checkpoint.finetune"), "checkpoint.finetune=true, or leave it out")


def packing(case: Case) -> Iterator[Problem]:
    """Rows in one sample do not see each other."""
    d = case.recipe.data
    if d.train is not None and d.packing and not d.reset_attention_mask:
        what = "packed rows would look at the rows before them"
        yield Problem(what, case.at("data.packing", "data.reset_attention_mask"), "data.reset_attention_mask=true, or data.packing=false")


def in_vain(case: Case) -> Iterator[Problem]:
    """What only fine-tuning reads does nothing in pretraining, and what says how to load nothing where nothing is loaded."""
    given = [key for key in ("training.epochs", "data.train", "data.valid") if case.given(key)]
    if given:
        yield Problem(
            f"{' and '.join(given)} {'say' if len(given) > 1 else 'says'} nothing to pretraining",
            case.at(*given),
            "leave out what is of fine-tuning, or give a recipe for `yuan sft`",
            "warning",
        )
    of_load = [key for key in ("checkpoint.finetune", "checkpoint.no_load_optim") if case.given(key) and case.value(key)]
    if of_load and case.recipe.checkpoint.load is None:
        yield Problem(
            f"{' and '.join(of_load)} {'say' if len(of_load) > 1 else 'says'} how to start from a checkpoint, and none is named",
            case.at(*of_load, "checkpoint.load"),
            "checkpoint.load=RUN_OR_CHECKPOINT, or " + ", and ".join(f"{key}=false" for key in of_load),
            "warning",
        )
