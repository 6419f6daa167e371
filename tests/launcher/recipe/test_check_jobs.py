"""What fine-tuning, conversion, generation and serving need, and which of the verbs a recipe is for."""

import json
import socket
from pathlib import Path

import pytest

from launcher.recipe import load
from launcher.recipe.check import check
from launcher.recipe.frozen import write_frozen
from launcher.recipe.inference import inference_recipe
from launcher.recipe.size import parameters
from launcher.recipe.verb import verb_of

MODEL = "model: {family: llama, num_layers: 6, hidden_size: 32, num_attention_heads: 8, num_query_groups: 4, swiglu: true}\n"
NULL = "tokenizer: {type: NullTokenizer, vocab_size: 63}\n"
SFT = (
    MODEL
    + NULL.replace("63}", "63, chat_template: plain}")
    + """training: {seq_length: 16, micro_batch_size: 1, epochs: 2, eval_iters: 0}
optimizer: {lr: 1.0e-5, lr_warmup_fraction: 0.1}
data: {train: rows.jsonl}
checkpoint: {load: start, finetune: true}
launch: {device: cpu}
"""
)
CONVERT = MODEL + NULL + "convert: {source: start, target: made, to: torch}\n"
ROW = {"instruction": "a", "output": "b"}


@pytest.fixture(autouse=True)
def files(workspace, write_recipe):
    """A fine-tuning and a conversion that pass."""
    write_recipe("sft", SFT)
    write_recipe("convert", CONVERT)
    Path("rows.jsonl").write_text(json.dumps(ROW) + "\n")
    Path("start/iter_0000001").mkdir(parents=True)
    Path("start/iter_0000001/metadata.json").write_text("{}")
    Path("start/latest_checkpointed_iteration.txt").write_text("1")


def problems(name: str, *words: str, **options: bool):
    loaded = load([f"recipe={name}", *words])
    return check(loaded.recipe, loaded.sources, verb_of(loaded), **options)


@pytest.mark.parametrize("name", ["sft", "convert"])
def test_what_they_start_from_passes(name):
    assert problems(name) == []


@pytest.mark.parametrize(
    "words, what, fix",
    [
        (["training.epochs=null"], "nothing says how long", "training.epochs"),
        (["training.epochs=0"], "training.epochs must be at least 1, not 0", "at least 1"),
        (["training.epochs=3", "training.train_iters=50"], "given twice", "training.epochs"),
        (["data.train=null"], "no training data", "data.train="),
        (["data.train=gone.json"], "no such file: gone.json", "JSONL"),
        (["data.train=[rows.jsonl,wrong.jsonl]"], "no answer in this row, which has instruction, reply", "output, response"),
        (["data.train=[rows.jsonl,7]"], "7 is neither", "data.train=FILE.jsonl"),
        (["data.valid=empty.json"], "holds no rows", "instruction"),
        (["data.data_path=x"], "data.data_path is for pretraining", "data.data_path=null"),
        (["training.eval_iters=1"], "no validation data", "training.eval_iters=0"),
        (["checkpoint.load=null"], "starts from trained weights", "checkpoint.load="),
        (["checkpoint.load=gone"], "no whole checkpoint in gone", "checkpoint.load="),
        (["training.global_batch_size=3", "launch.nproc_per_node=2"], "no multiple of micro_batch_size", "2 or 4"),
        (["optimizer.lr=null"], "optimizer.lr is not given", "optimizer.lr="),
        (["parallel.pipeline_model_parallel_size=4", "launch.nproc_per_node=4"], "6 layers cannot be shared out", "layout"),
    ],
)
def test_fine_tunings_that_would_not_run(words, what, fix):
    Path("wrong.jsonl").write_text('{"instruction": "a", "reply": "b"}\n')
    Path("empty.json").write_text("[]")
    (problem,) = problems("sft", *words)
    assert what in problem.what and fix in problem.fix and problem.where
    assert "fresh weights" not in problem.fix


def test_what_is_of_fine_tuning_does_nothing_in_pretraining():
    loaded = load(["recipe=sft"])
    found = check(loaded.recipe, loaded.sources, "pretrain")
    assert [p.severity for p in found if "training.epochs and data.train say nothing to pretraining" in p.what] == ["warning"]


def test_a_fine_tuning_counted_in_steps_needs_no_epochs():
    """Steps that are typed put the epochs of a recipe aside."""
    assert problems("sft", "training.train_iters=50") == []


@pytest.mark.parametrize(
    "words, what, fix",
    [
        (["convert.source=null"], "convert.source is not given", "convert.source=FOLDER"),
        (["convert.target=null"], "convert.target is not given", "convert.target=FOLDER"),
        (["convert.source=gone"], "no such folder: gone", "convert.source="),
        (["convert.source=recipes"], "no whole checkpoint in recipes", "convert.source="),
        (["convert.target=recipes"], "recipes is there already", "convert.target"),
        (["convert.target=start/made"], "one in the other", "convert.target=start-converted"),
        (["convert.target=there/../start/x"], "one in the other", "convert.target=start-converted"),
        (["convert.to=mindspore"], "how query, key and value lie", "convert.fused_layout=separate"),
        (["convert.to=hf", "convert.hf_config=recipes"], "no config.json", "convert.hf_config="),
        (["convert.to=hf", "convert.tensor_model_parallel_size=2"], "hf is no format of so many ranks", "parallel_size=1"),
        (["convert.tensor_model_parallel_size=0"], "at least 1, not 0", "at least 1"),
        (["convert.tensor_model_parallel_size=3"], "num_attention_heads 8 cannot be cut into TP 3", "2 or 4"),
        (["convert.pipeline_model_parallel_size=4"], "6 layers cannot be shared out over 4", "=3 or 6"),
        (["convert.pipeline_model_parallel_layout='Ett|tttx|L'", "convert.pipeline_model_parallel_size=3"], "'x'", "Et*3"),
        (["convert.pipeline_model_parallel_layout='Ett|tttL'", "convert.pipeline_model_parallel_size=3"], "2 stages, not PP 3", "=2"),
        (["convert.pipeline_model_parallel_layout='Ett|ttL'", "convert.pipeline_model_parallel_size=2"], "4 layers", "6 times t"),
        (["convert.to=yuan", "convert.tensor_model_parallel_size=4", "tokenizer.vocab_size=8", "model.make_vocab_size_divisible_by=3"], "padded_vocab_size 9", "3"),
    ],
)  # fmt: skip
def test_conversions_that_would_not_run(words, what, fix):
    found = problems("convert", *words)
    assert [problem for problem in found if what in problem.what and fix in problem.fix and problem.where], found


def test_uneven_stages_are_fine_where_the_layout_says_them():
    assert problems("convert", "convert.pipeline_model_parallel_size=4", "convert.pipeline_model_parallel_layout='Et|tt|tt|tL'") == []


@pytest.mark.parametrize("dtype, width", [("bf16", 2), ("fp32", 4)])
def test_a_target_that_the_disk_cannot_hold(monkeypatch, dtype, width):
    """What counts is what is written, and not the source, which may be a training of ten times the size."""
    Path("start/iter_0000001/__0_0.distcp").write_bytes(b"0" * 5_000_000)
    words = [f"convert.dtype={dtype}", "model.max_position_embeddings=16"]
    recipe = load(["recipe=convert", *words]).recipe
    padding = (recipe.derived.padded_vocab_size - recipe.derived.vocab_size) * recipe.model.hidden_size
    needed = width * (parameters(recipe) - padding)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed - 1})())
    (problem,) = problems("convert", *words)
    assert "MB are free" in problem.what and "convert.target" in problem.fix
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed})())
    assert problems("convert", *words) == []


def test_a_server_needs_a_free_port(write_recipe):
    write_recipe("served", "generate: {load: start}\nserve: {port: 8000}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (problem,) = problems("served", f"serve.port={port}")
        assert f"port {port} is taken" in problem.what
        free = problem.fix.split(",")[0]
        assert problems("served", free) == []
    assert problems("served", f"serve.port={port}") == []
    for words, what in ((["serve.port=0"], "at least 1, not 0"), (["serve.port=70000"], "at most 65535")):
        assert what in problems("served", *words)[0].what
    (problem,) = problems("served", f"serve.port={port}", "serve.host=192.0.2.1")
    assert "no address of this machine" in problem.what and "0.0.0.0" in problem.fix
    (problem,) = problems("served", f"serve.port={port}", "generate.load=gone")
    assert "no whole checkpoint in gone" in problem.what


@pytest.mark.parametrize(
    "text, verb",
    [
        ("optimizer: {lr: 1}", "pretrain"),
        ("training: {epochs: 2}\ndata: {train: x}", "sft"),
        ("training: {micro_batch_size: 2}\npreprocess: {input: x}", "pretrain"),
        ("optimizer: {lr: 1}\ngenerate: {top_k: 2}\nserve: {port: 9}", "pretrain"),
        ("convert: {to: hf}", "convert"),
        (MODEL + "generate: {load: x}\nserve: {port: 9}", "serve"),
        (MODEL + "generate: {load: x}", "generate"),
        ("preprocess: {input: x}", "preprocess"),
        (MODEL, "pretrain"),
    ],
)
def test_the_verb_that_a_recipe_is_for(write_recipe, text, verb):
    write_recipe("mine", text + "\n")
    assert verb_of(load(["recipe=mine"])) == verb


def test_a_recipe_for_generation_gives_the_layout_and_the_checkpoint_its_model(write_recipe):
    """The model in it is for checkpoints that hold no recipe of their own."""
    write_recipe("answer", MODEL + NULL + "generate: {load: start}\nparallel: {tensor_model_parallel_size: 2}\nlaunch: {nproc_per_node: 2, device: cpu}\n")
    loaded = load(["recipe=answer"])
    folder = Path("start/iter_0000001")
    recipe, _ = inference_recipe(loaded, folder)
    assert (recipe.model.num_layers, recipe.parallel.tensor_model_parallel_size) == (6, 2)
    trained = load(["recipe=sft", "model.num_layers=3"]).recipe
    write_frozen(trained, folder / "recipe.yaml")
    recipe, _ = inference_recipe(load(["recipe=answer"]), folder)
    assert (recipe.model.num_layers, recipe.parallel.tensor_model_parallel_size, recipe.derived.world_size) == (3, 2, 2)
    with pytest.raises(Exception, match="model.num_layers is fixed by the checkpoint"):
        inference_recipe(load(["recipe=answer", "model.num_layers=4"]), folder)
