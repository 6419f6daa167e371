"""Which checkpoint answers, and with which recipe."""

import os
import shutil
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.recipe import load
from launcher.recipe.frozen import write_frozen
from launcher.recipe.inference import find_checkpoint, inference_recipe
from tests.launcher.engine.generate_worker import tiny


@pytest.fixture
def make_checkpoint(workspace):
    """make_checkpoint(run, iteration, recipe): a checkpoint's folder with its recipe, and the tracker that names it."""

    def make(run: str, iteration: int = 5, recipe=None, moment: int = 1000) -> Path:
        folder = Path(run) / "checkpoints" / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        write_frozen(recipe or tiny("x"), folder / "recipe.yaml")
        tracker = folder.parent / "latest_checkpointed_iteration.txt"
        tracker.write_text(str(iteration))
        os.utime(tracker, (moment, moment))
        return folder

    return make


def of(*words: str):
    return load(list(words), default="generate")


def inferred(folder: Path, *words: str):
    return inference_recipe(of(*words), folder)[0]


def test_the_newest_whole_checkpoint_under_runs_is_taken(make_checkpoint):
    make_checkpoint("runs/old", moment=1000)
    newest = make_checkpoint("runs/new", moment=2000)
    torn = make_checkpoint("runs/torn", moment=3000)
    shutil.rmtree(torn)
    checkpoint, passed = find_checkpoint(of())
    assert checkpoint == newest
    assert len(passed) == 1 and "runs/torn" in passed[0] and "iter_0000005" in passed[0]


@pytest.mark.parametrize("path", ["elsewhere", "elsewhere/checkpoints", "elsewhere/checkpoints/iter_0000005"])
def test_a_run_its_checkpoints_or_one_of_them_can_be_named(make_checkpoint, path):
    make_checkpoint("runs/newer", moment=3000)
    named = make_checkpoint("elsewhere")
    assert find_checkpoint(of(f"generate.load={path}")) == (named, [])


def test_a_training_recipe_means_its_run(make_checkpoint, write_recipe):
    make_checkpoint("runs/newer", moment=3000)
    folder = make_checkpoint("there/run")
    text = "model: {num_layers: 2, hidden_size: 8}\nrun: {dir: there/run}\n"
    write_recipe("mine", text + "launch: {nproc_per_node: 8}\ngenerate: {top_k: 3}\n")
    loaded = of("recipe=mine")
    assert find_checkpoint(loaded) == (folder, [])
    recipe, _ = inference_recipe(loaded, folder)
    assert (recipe.model.num_layers, recipe.generate.top_k, recipe.launch.nproc_per_node) == (4, 3, 1)


def test_no_checkpoint_names_the_place_and_the_command(workspace):
    with pytest.raises(UserError) as caught:
        find_checkpoint(of())
    assert "runs/*/checkpoints" in caught.value.where and "yuan pretrain" in caught.value.fix
    with pytest.raises(UserError, match="no whole checkpoint in nowhere"):
        find_checkpoint(of("generate.load=nowhere"))


def test_what_belongs_to_training_is_put_aside(make_checkpoint):
    trained = tiny("x", tp=2, pp=2)
    trained.parallel.sequence_parallel = trained.parallel.use_distributed_optimizer = True
    trained.parallel.recompute_granularity = "selective"
    trained.parallel.num_layers_per_virtual_pipeline_stage = 1
    trained.launch.nproc_per_node, trained.launch.nnodes = 8, 4
    recipe = inferred(make_checkpoint("runs/x", recipe=trained))
    p = recipe.parallel
    assert (p.sequence_parallel, p.use_distributed_optimizer, p.recompute_granularity) == (False, False, None)
    assert (recipe.launch.nnodes, recipe.launch.nproc_per_node, recipe.derived.data_parallel_size) == (1, 4, 1)
    assert p.num_layers_per_virtual_pipeline_stage == 1


@pytest.mark.parametrize(
    "words, processes, dp, padded",
    [
        ([], 1, 1, 64),
        (["parallel.tensor_model_parallel_size=2"], 2, 1, 64),
        (["parallel.tensor_model_parallel_size=3"], 3, 1, 96),  # 64 cannot be cut in 3: the next multiple of 32 x 3
        (["parallel.pipeline_model_parallel_size=2", "launch.nproc_per_node=4"], 4, 2, 64),
    ],
)
def test_another_layout(make_checkpoint, words, processes, dp, padded):
    recipe = inferred(make_checkpoint("runs/x"), *words)
    derived = recipe.derived
    assert (derived.world_size, derived.data_parallel_size, derived.padded_vocab_size) == (processes, dp, padded)


def test_another_number_of_stages_forgets_how_the_old_ones_were_cut(make_checkpoint):
    trained = tiny("x", pp=2)
    trained.parallel.decoder_first_pipeline_num_layers = 1
    folder = make_checkpoint("runs/x", recipe=trained)
    assert inferred(folder).parallel.decoder_first_pipeline_num_layers == 1
    assert inferred(folder, "parallel.pipeline_model_parallel_size=1").parallel.decoder_first_pipeline_num_layers is None


def test_what_the_checkpoint_fixes_is_refused_all_at_once(make_checkpoint):
    folder = make_checkpoint("runs/x")
    with pytest.raises(UserError) as caught:
        refused = ["model.num_layers=3", "parallel.sequence_parallel=true", "training.seq_length=99"]
        inferred(folder, *refused, "training.precision=bf16")
    assert [error.what.split(" ")[0] for error in caught.value.each] == [word.split("=")[0] for word in refused]
    assert inferred(folder, "training.precision=bf16").training.precision == "bf16"


def test_the_torch_layout_is_loaded_as_it_was_saved_unless_another_is_asked_for(make_checkpoint):
    trained = tiny("x", tp=2)
    trained.checkpoint.format = "torch"
    folder = make_checkpoint("runs/x", recipe=trained)
    assert inferred(folder).parallel.tensor_model_parallel_size == 2
    assert inferred(folder, "parallel.tensor_model_parallel_size=1").parallel.tensor_model_parallel_size == 1


def test_a_checkpoint_without_a_recipe_is_described_by_the_named_one(make_checkpoint, write_recipe):
    folder = make_checkpoint("runs/x")
    (folder / "recipe.yaml").unlink()
    (folder / "metadata.json").touch()
    with pytest.raises(UserError, match="no recipe of its own"):
        inferred(folder)
    text = "model: {num_layers: 2, hidden_size: 8, num_attention_heads: 2}\ntraining: {seq_length: 8}\n"
    write_recipe("mine", text + "tokenizer: {type: NullTokenizer, vocab_size: 9}\n")
    recipe = inferred(folder, "recipe=mine", "model.num_layers=3")
    assert (recipe.model.num_layers, recipe.derived.vocab_size, recipe.generate.load) == (3, 10, str(folder))


def test_the_tokenizer_comes_from_the_checkpoint(make_checkpoint):
    from data_tools.tokenizers import train_sentencepiece

    trained = tiny("x")
    trained.tokenizer.type, trained.tokenizer.vocab_size = "SentencePieceTokenizer", None
    trained.tokenizer.tokenizer_model = "/gone/since/my.model"
    folder = make_checkpoint("runs/x", recipe=trained)
    with pytest.raises(UserError, match="no such file"):
        inferred(folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "my.model").write_bytes(train_sentencepiece(["to be or not to be, that is the question\n" * 9], 290))
    recipe = inferred(folder)
    assert recipe.tokenizer.tokenizer_model == str(folder / "tokenizer" / "my.model")
    assert recipe.derived.vocab_size == 290


@pytest.mark.parametrize(
    "words, greedy",
    [
        ([], True),
        (["generate.repetition_penalty=1.2"], True),
        (["generate.temperature=0.8"], False),
        (["generate.top_k=5"], False),
        (["generate.top_p=0.9"], False),
        (["generate.greedy=false"], False),
        (["generate.greedy=true", "generate.top_p=0.9"], True),
    ],
)
def test_greedy_unless_somebody_says_how_to_sample(make_checkpoint, words, greedy):
    assert inferred(make_checkpoint("runs/x"), *words).generate.greedy is greedy
