"""Run folders: what open_run makes, and which recipes may go on with a run."""

import json
import shlex
import subprocess
import sys

import pytest

from checkpoints.folder import TRACKER, begin, commit
from launcher.errors import UserError
from launcher.recipe import load
from launcher.recipe.frozen import read_frozen, write_frozen
from launcher.run.changes import changed_keys
from launcher.run.folder import RunFolder, open_run

COMMAND = ["yuan", "pretrain", "recipe=345m_1dp", "run.name=with space"]


def opened(tmp_path, *words: str, accept_changes: bool = False) -> RunFolder:
    """The run folder of a recipe, opened and let go again."""
    loaded = load(["recipe=345m_1dp", f"run.dir={tmp_path}/run", *words])
    folder = open_run(loaded.recipe, loaded.sources, COMMAND, accept_changes)
    folder.close()
    return folder


def test_a_new_folder_tells_what_was_asked_for_and_where_it_runs(tmp_path):
    folder = opened(tmp_path)
    recipe = read_frozen(folder.recipe)
    assert recipe.optimizer.lr == 6e-5
    assert recipe.run.dir == str(folder.path)
    assert recipe == load(["recipe=345m_1dp", f"run.dir={tmp_path}/run"]).recipe
    assert shlex.split(folder.command.read_text().splitlines()[1]) == COMMAND
    environment = json.loads(folder.environment.read_text())
    assert environment["packages"]["megatron-core"].startswith("0.16")
    assert environment["cores"] >= 1
    assert folder.logs.is_dir()
    assert not list(folder.path.glob("*.part"))


def test_the_same_recipe_resumes_and_every_start_is_noted(tmp_path):
    assert opened(tmp_path).changes == []
    folder = opened(tmp_path)
    assert folder.changes == []
    assert len(folder.command.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (["training.train_iters=5000"], "training.train_iters: 3000 -> 5000"),
        (["launch.nproc_per_node=2", "parallel.tensor_model_parallel_size=2"], "parallel.tensor_model_parallel_size: 1 -> 2"),
        (["launch.nproc_per_node=2", "parallel.pipeline_model_parallel_size=2"], "launch.nproc_per_node: 1 -> 2"),
        (["training.micro_batch_size=2"], "training.micro_batch_size: 4 -> 2"),
        (["logging.log_interval=1"], "logging.log_interval: 100 -> 1"),
        (["checkpoint.save_interval=null"], "checkpoint.save_interval: 1000 -> not given"),
        (["training.eval_iters=0"], "training.eval_iters: 10 -> 0"),
        (["generate.top_k=5"], "generate.top_k: 0 -> 5"),
    ],
)
def test_a_safe_change_resumes_and_is_told(tmp_path, words, change):
    opened(tmp_path)
    folder = opened(tmp_path, *words)
    assert change in folder.changes
    recipe = load(["recipe=345m_1dp", f"run.dir={tmp_path}/run", *words]).recipe
    assert read_frozen(folder.recipe) == recipe


@pytest.mark.parametrize(
    ("words", "diff"),
    [
        (["optimizer.lr=1e-3"], "optimizer.lr: 6e-05 -> 0.001   (command line)"),
        (["training.global_batch_size=64"], "training.global_batch_size: 32 -> 64   (command line)"),
        (["model.num_layers=12"], "model.num_layers: 24 -> 12   (command line)"),
        (["training.seed=1"], "training.seed: 1234 -> 1   (command line)"),
        (["data.data_path=[0.5,a,0.5,b]"], 'data.data_path: "data/my-gpt2_text_document" -> [0.5, "a", 0.5, "b"]   (command line)'),
        (["optimizer.lr_decay_iters=3000"], "optimizer.lr_decay_iters: 430000 -> 3000   (command line)"),
    ],
)
def test_another_recipe_is_refused_with_a_diff_unless_accepted(tmp_path, words, diff):
    before = opened(tmp_path).recipe.read_text()
    with pytest.raises(UserError) as error:
        opened(tmp_path, "logging.log_interval=1", *words)
    assert error.value.what == f"this run was made with another recipe:\n    {diff}"
    assert "--accept-changes" in error.value.fix
    folder = RunFolder(tmp_path / "run")
    assert folder.recipe.read_text() == before
    assert len(folder.command.read_text().splitlines()) == 2
    assert diff.rsplit("   (")[0] in opened(tmp_path, *words, accept_changes=True).changes
    assert opened(tmp_path, *words).changes == []


def test_a_decay_as_long_as_the_training_grows_with_it(tmp_path):
    tied = ["optimizer.lr_decay_iters=null"]
    opened(tmp_path, *tied)
    folder = opened(tmp_path, *tied, "training.train_iters=4000")
    assert "optimizer.lr_decay_iters: 3000 -> 4000" in folder.changes


def saved(tmp_path, *words: str) -> RunFolder:
    """A run of a recipe with a checkpoint at step 10: what of it classifying a change looks at."""
    folder = opened(tmp_path, *words)
    part = begin(folder.checkpoints, 10)
    write_frozen(read_frozen(folder.recipe), part / "recipe.yaml")
    commit(part)
    return folder


def test_the_torch_format_ties_a_saved_run_to_its_layout(tmp_path):
    two = ["launch.nproc_per_node=2", "parallel.tensor_model_parallel_size=2"]
    opened(tmp_path / "unsaved", "checkpoint.format=torch")
    assert opened(tmp_path / "unsaved", "checkpoint.format=torch", *two).changes
    saved(tmp_path, "checkpoint.format=torch")
    with pytest.raises(UserError, match="parallel.tensor_model_parallel_size: 1 -> 2") as error:
        opened(tmp_path, "checkpoint.format=torch", *two, accept_changes=True)
    assert "cannot go on" in error.value.what
    assert opened(tmp_path, "checkpoint.format=torch_dist").changes == ['checkpoint.format: "torch" -> "torch_dist"']
    with pytest.raises(UserError, match="the torch format is loaded at the layout that saved it"):
        opened(tmp_path, *two)  # the newest checkpoint still is of the torch format


# What the engine does with each was tried: of these, none can be loaded.
NEVER = [
    (["model.num_layers=12"], ""),
    (["model.hidden_size=2048"], ""),
    (["model.ffn_hidden_size=2048"], ""),
    (["model.num_attention_heads=8", "model.kv_channels=128"], ""),
    (["model.num_attention_heads=32"], ""),
    (["model.num_query_groups=4"], ""),
    (["model.swiglu=true"], ""),
    (["model.max_position_embeddings=2048"], ""),
    (["model.untie_embeddings_and_output_weights=true"], ""),
    (["model.normalization=LayerNorm"], "model.normalization=RMSNorm"),
    (["model.add_bias_linear=true"], "model.add_bias_linear=false"),
    (["model.position_embedding_type=learned_absolute"], "model.position_embedding_type=rope"),
    (["model.family=yuan2"], ""),
    (["training.precision=bf16"], "training.precision=fp32"),
    (["training.precision=fp32"], "training.precision=bf16"),
    (["parallel.use_distributed_optimizer=true"], "checkpoint.format=torch"),
    (["launch.nproc_per_node=2", "parallel.pipeline_model_parallel_size=2"], "checkpoint.format=torch"),
    (["training.epochs=2", "training.global_batch_size=8"], "training.epochs=2"),
]


@pytest.mark.parametrize(("words", "first"), NEVER)
def test_what_no_checkpoint_can_be_loaded_into_is_refused_whatever_is_accepted(tmp_path, words, first):
    before = saved(tmp_path, *[first] * bool(first)).recipe.read_text()
    key = words[-1].split("=")[0]
    with pytest.raises(UserError, match=f"cannot go on with other values than its own:(.|\n)*{key}: (.|\n)*as the run was made: .*{key}=") as error:
        opened(tmp_path, *words, accept_changes=True)
    assert all("--accept-changes" not in one.fix for one in error.value.each)
    assert RunFolder(tmp_path / "run").recipe.read_text() == before


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["model.normalization=RMSNorm"], ""),
        (["model.position_embedding_type=rope"], ""),
        (["model.untie_embeddings_and_output_weights=false"], "model.untie_embeddings_and_output_weights=true"),
        (["model.family=llama"], ""),
        (["training.precision=fp16"], "training.precision=bf16"),
        (["training.precision=bf16", "parallel.use_distributed_optimizer=true"], "training.precision=fp32"),
        (["training.precision=fp32"], "parallel.use_distributed_optimizer=true"),
    ],
)
def test_what_can_be_loaded_and_computes_something_else_needs_consent(tmp_path, words, first):
    saved(tmp_path, "training.precision=bf16", *[first] * bool(first))
    with pytest.raises(UserError, match="this run was made with another recipe"):
        opened(tmp_path, "training.precision=bf16", *words)
    assert opened(tmp_path, "training.precision=bf16", *words, accept_changes=True).changes


def test_what_is_refused_and_what_needs_consent_are_told_at_once(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError) as error:
        opened(tmp_path, "model.num_layers=12", "optimizer.lr=1e-3", "logging.log_interval=1")
    never, asked = error.value.each
    assert "model.num_layers: 24 -> 12 (the checkpoint's tensors have other shapes)   (command line)" in never.what
    assert "optimizer.lr: 6e-05 -> 0.001" in asked.what and "--accept-changes" in asked.fix
    assert "log_interval" not in never.what + asked.what


def test_a_vocabulary_changed_under_its_name_is_noticed(tmp_path):
    old, new = (load(["recipe=345m_1dp", f"run.dir={tmp_path}"]).recipe for _ in range(2))
    old.derived.vocab_size, new.derived.vocab_size = 50257, 50000
    old.derived.world_size = 64
    assert changed_keys(old, new) == {"derived.vocab_size": (50257, 50000)}


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    folder = opened(tmp_path)
    folder.recipe.write_text("model: {no_such_key: 1}\n")
    with pytest.raises(UserError, match="cannot be read") as error:
        opened(tmp_path)
    assert error.value.where == str(folder.recipe)
    assert len(opened(tmp_path, accept_changes=True).changes) == 1


def test_a_folder_in_use_names_its_job(tmp_path):
    loaded = load(["recipe=345m_1dp", f"run.dir={tmp_path}/run"])
    code = "import sys, time; from launcher.run.folder import Lock; lock = Lock(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    (tmp_path / "run").mkdir()
    code = code.replace("Lock(sys.argv[1])", "Lock(__import__('pathlib').Path(sys.argv[1]))")
    job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run" / ".lock")], stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"another job is writing this run: pid {job.pid} on"):
        open_run(loaded.recipe, loaded.sources, COMMAND)
    job.kill()
    job.wait()
    job.stdout.close()
    open_run(loaded.recipe, loaded.sources, COMMAND).close()


def test_a_second_machine_freezes_its_own_recipe_beside_the_firsts(tmp_path):
    first = opened(tmp_path, "launch.nnodes=2")
    second = opened(tmp_path, "launch.nnodes=2", "launch.node_rank=1")
    assert read_frozen(first.recipe).launch.node_rank == 0
    assert second.recipe.name == "recipe.node1.yaml"
    assert read_frozen(second.recipe).launch.node_rank == 1
    assert len(first.command.read_text().splitlines()) == 2


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="the run folder cannot be made"):
        opened(tmp_path)


def test_the_newest_checkpoint_is_what_the_tracker_says(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.newest_checkpoint() is folder.latest_iteration() is None
    for iteration in (1000, 2000):
        commit(begin(folder.checkpoints, iteration))
    assert folder.latest_iteration() == 2000
    (folder.checkpoints / TRACKER).write_text("1000\n")  # set back by a person
    assert folder.newest_checkpoint() == folder.checkpoints / "iter_0001000"


@pytest.mark.parametrize("text", [None, "", "iter_0002000", "\udcff\udcfe", "3000"])
def test_a_run_with_checkpoints_never_starts_anew_by_itself(tmp_path, text):
    """A tracker that is gone, empty or wrong: the line to type names the newest whole checkpoint, and mends it."""
    folder = RunFolder(tmp_path / "a run")
    for iteration in (1000, 2000):
        commit(begin(folder.checkpoints, iteration))
    tracker = folder.checkpoints / TRACKER
    tracker.unlink() if text is None else tracker.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        folder.latest_iteration()
    assert error.value.where == str(tracker)
    subprocess.run(error.value.fix.split(": ")[1], shell=True, check=True)
    assert folder.latest_iteration() == 2000


def test_a_tracker_alone_is_no_fresh_start_either(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    (folder.checkpoints / TRACKER).write_text("7")
    with pytest.raises(UserError, match="iter_0000007, which is not there") as error:
        folder.newest_checkpoint()
    assert f"rm {folder.checkpoints / TRACKER}" in error.value.fix
