"""What a check says of the run folder, of the disk, and of the checkpoint that a training starts from."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from checkpoints.folder import begin, commit
from launcher.errors import UserError
from launcher.recipe import load
from launcher.recipe.check import check
from launcher.recipe.check_run import checkpoint_bytes, going_on
from launcher.recipe.frozen import write_frozen
from launcher.run.folder import Lock, open_run
from tests.data_tools.samples import small_gpt2
from tests.launcher.recipe import conftest

BASE = f"{conftest.BASE}checkpoint: {{save_interval: 10}}\n"


@pytest.fixture
def problems(write_recipe, write_data):
    """problems(*words, …) → what `check` says about BASE with these words; BASE by itself is sound."""
    write_recipe("base", BASE)
    write_data("data_text_document", [200] * 20)

    def ask(*words: str, **options: bool):
        loaded = load(["recipe=base", *words])
        return check(loaded.recipe, loaded.sources, **options)

    assert ask() == []
    return ask


def run_once(*words: str, step: int | None = None):
    """The run of BASE with these words: its folder as a start leaves it, with a checkpoint where a step is given."""
    loaded = load(["recipe=base", *words])
    folder = open_run(loaded.recipe, loaded.sources, ["yuan", "pretrain"])
    folder.close()
    if step is not None:
        part = begin(folder.checkpoints, step)
        write_frozen(loaded.recipe, part / "recipe.yaml")
        commit(part)
    return folder


def test_a_run_in_use_is_told_and_not_touched(problems):
    folder = run_once()
    lock = Lock(folder.path / ".lock")
    (problem,) = problems()
    assert problem.what.startswith("another job is writing this run: pid ") and problem.severity == "error"
    assert problems("run.name=another") == []
    assert problems(launching=True) == []  # `open_run` says it then
    lock.release()
    assert problems() == []


def test_changes_are_told_by_what_they_need(problems):
    run_once(step=10)
    assert problems("training.train_iters=200", "logging.log_interval=1") == []
    assert going_on(load(["recipe=base", "logging.log_interval=1"]).recipe) == [
        "resuming from step 10",
        "changed logging.log_interval: 100 -> 1",
    ]
    (asked,) = problems("optimizer.lr=0.01")
    assert "optimizer.lr: 0.001 -> 0.01   (command line)" in asked.what and "--accept-changes" in asked.fix
    assert problems("optimizer.lr=0.01", accept_changes=True) == []
    never, also = problems("model.hidden_size=48", "optimizer.lr=0.01")
    assert "model.hidden_size: 96 -> 48" in never.what and "--accept-changes" not in never.fix
    assert problems("model.hidden_size=48", "optimizer.lr=0.01", accept_changes=True) == [never]
    assert problems("model.hidden_size=48", "optimizer.lr=0.01", launching=True) == []


def test_a_run_cannot_end_before_the_step_that_is_done(problems):
    run_once(step=60)
    (short,) = problems("training.train_iters=59", "training.eval_iters=0")
    assert short.what == "step 60 of this run is done, and the training is to end at step 59" and short.severity == "error"
    assert short.where == "training.train_iters=59 (command line)" and short.fix == "training.train_iters=61 or more"
    assert problems("training.train_iters=59", "training.eval_iters=0", accept_changes=True) == [short]
    samples = problems("training.train_iters=null", "training.train_samples=400", accept_changes=True)
    assert [one.fix for one in samples if one.severity == "error"] == ["training.train_samples=488 or more"]
    with pytest.raises(UserError, match="step 60 of this run is done"):  # where processes are about to start
        run_once("training.train_iters=59")
    assert problems("training.train_iters=60", "training.eval_iters=0") == []
    line, *_ = going_on(load(["recipe=base", "training.train_iters=60", "training.eval_iters=0"]).recipe)
    assert line == "the run is complete: step 60 is its last, and there is nothing to do; to train on: training.train_iters=61 or more"


def test_a_new_run_goes_on_from_nothing(problems):
    assert going_on(load(["recipe=base"]).recipe) == []
    assert not Path("runs").exists()  # a look leaves nothing behind


def test_a_folder_nobody_may_write_is_told(problems):
    Path("file").write_text("")
    (problem,) = problems("run.dir=file/run")
    assert problem.what == f"the run folder cannot be made: {Path('file').absolute()} cannot be written"


def test_a_file_system_that_takes_no_files_is_told_and_not_called_full(problems):
    (problem,) = problems("run.dir=/proc/x")
    assert problem.what == "the run folder cannot be made: /proc cannot be written" and problem.severity == "error"
    (problem,) = problems("data.data_cache_path=/proc/cache")
    assert problem.what == "the sample index cannot be built in /proc/cache: /proc cannot be written"
    (problem,) = problems("data.data_cache_path=data_text_document.idx/cache")  # a file is in the way
    assert "cannot be written" in problem.what
    assert problems("data.data_cache_path=cache/below") == [] and not Path("cache").exists()


@pytest.fixture
def free_disk(monkeypatch):
    """free_disk(bytes): what every disk has free."""

    def set_free(free: int) -> None:
        usage = namedtuple("usage", "total used free")(10**15, 0, free)
        monkeypatch.setattr("launcher.recipe.check_run.shutil.disk_usage", lambda _: usage)

    return set_free


def test_a_disk_that_cannot_hold_what_is_kept(problems, free_disk):
    size = checkpoint_bytes(load(["recipe=base"]).recipe)
    free_disk(10 * size)
    assert problems() == []
    free_disk(10 * size - 1)
    (problem,) = problems()
    assert problem.what.startswith("10 more checkpoints of ") and problem.severity == "warning"
    assert problem.fix.startswith("checkpoint.keep_last=8, or run.dir on a larger disk")
    assert problems("checkpoint.keep_last=8") == []
    free_disk(2 * size)
    assert problems("checkpoint.keep_last=1") == []
    free_disk(2 * size - 1)
    for words in (["checkpoint.keep_last=1"], []):
        (problem,) = problems(*words)
        assert problem.severity == "error"
    assert problems("checkpoint.save_interval=null") == []  # the last step alone is saved
    assert problems("launch.kind=slurm", "launch.device=cpu")[0].severity == "warning"


def test_checkpoints_that_are_there_need_no_more_room(problems, free_disk):
    for step in (10, 20, 30):
        run_once(step=step)
    free_disk(7 * checkpoint_bytes(load(["recipe=base"]).recipe))
    assert problems() == []
    assert problems("run.name=another")[0].what.startswith("10 more")


@pytest.mark.parametrize(
    ("words", "bytes_each"),
    [
        ([], 12),
        (["training.precision=bf16"], 14),
        (["parallel.use_distributed_optimizer=true"], 16),
        (["training.precision=bf16", "parallel.use_distributed_optimizer=true"], 14),
    ],
)
def test_the_size_of_a_checkpoint(problems, words, bytes_each):
    """As measured with 23.6 M parameters: 283.5, 330.9, 378.0 and 330.8 MB."""
    large = ["model.num_layers=6", "model.hidden_size=512", "model.max_position_embeddings=32", "tokenizer.vocab_size=9000"]
    recipe = load(["recipe=base", *large, *words]).recipe
    measured = {12: 283_536_371, 14: 330_850_137, 16: 378_018_445}[bytes_each]
    assert checkpoint_bytes(recipe) == pytest.approx(measured, rel=0.003)


def test_a_checkpoint_to_start_from_must_fit(problems):
    start = "checkpoint.load=runs/first"
    run_once("run.name=first", step=10)
    assert problems(start) == []
    (wide,) = problems(start, "model.hidden_size=192", "model.ffn_hidden_size=384", "model.kv_channels=24")
    assert wide.what == "runs/first/checkpoints/iter_0000010 has model.hidden_size=96: the checkpoint's tensors have other shapes"
    assert wide.fix == "model.hidden_size=96"
    (precision,) = problems(start, "training.precision=bf16")
    assert "checkpoint.no_load_optim=true" in precision.fix
    assert problems(start, "training.precision=bf16", "checkpoint.no_load_optim=true") == []
    run_once(start)
    assert [problem.what.split(":")[0] for problem in problems("checkpoint.load=null")] == ["this run was made with another recipe"]
    run_once(start, step=5)  # now the run has one of its own, and does not ask
    assert problems("checkpoint.load=gone") == []


@pytest.mark.parametrize(
    ("word", "before"),
    [
        ("model.rotary_base=500000", "10000"),
        ("model.norm_epsilon=1e-3", "1e-05"),
        ("model.rotary_percent=0.5", "1.0"),
        ("model.position_embedding_type=none", "rope"),
        ("model.max_position_embeddings=512", "16"),
        ("model.hidden_dropout=0.0", "0.1"),
    ],
)
def test_a_model_that_the_checkpoint_was_not_trained_as_is_told(problems, word, before):
    """Its tensors fit, so nothing else would ever say it."""
    rope = "model.position_embedding_type=rope"
    run_once("run.name=first", rope, step=10)
    start = [rope, "checkpoint.load=runs/first"]
    assert problems(*start) == []
    (told,) = problems(*start, word)
    key, _, _ = word.partition("=")
    assert told.severity == "warning" and f"\n    {key}: " in told.what and told.fix.startswith(f"{key}={before}; ")


def test_a_checkpoint_of_another_tokenizer_is_told(problems, workspace):
    """Its copies are compared, wherever the files lie now."""
    files = small_gpt2(workspace)
    gpt2 = ["tokenizer.type=GPT2BPETokenizer", "tokenizer.vocab_size=null", "tokenizer.vocab_file=v.json", "tokenizer.merge_file=m.txt"]
    shutil.copy(files["vocab_file"], "v.json")
    shutil.copy(files["merge_file"], "m.txt")
    folder = run_once("run.name=first", *gpt2, step=10)
    copies = folder.checkpoints / "iter_0000010/tokenizer"
    copies.mkdir()
    for name in ("v.json", "m.txt"):
        shutil.copy(name, copies)
    start = [*gpt2, "checkpoint.load=runs/first"]
    assert problems(*start) == []
    merges = Path("m.txt").read_text().splitlines()
    Path("m.txt").write_text("\n".join(merges[:-1]) + "\n")
    vocabulary = json.loads(Path("v.json").read_text())
    first, second, *_ = [word for word in vocabulary if len(word) == 1]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    Path("v.json").write_text(json.dumps(vocabulary))
    (problem,) = problems(*start)
    assert "was trained with another tokenizer" in problem.what and problem.severity == "error"
    (problem,) = problems(*start, "checkpoint.finetune=true")
    assert problem.severity == "warning"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["optimizer.lr_warmup_tokens=100"], "a warm-up of 0 steps is none"),
        (["optimizer.lr_warmup_fraction=0.001"], "a warm-up of 0.1 steps is none"),
        (["training.train_iters=1", "optimizer.lr_warmup_fraction=0.5"], "the only step is the first of a warm-up, at a learning rate of 0"),
        (["optimizer.lr_decay_iters=400000"], "100 of 400000 steps of decay"),
        (["parallel.sequence_parallel=true"], "sequence parallelism shares the sequence over tensor-parallel ranks, and there is one"),
        (["parallel.recompute_method=block"], "parallel.recompute_method says nothing with no recomputation"),
        (["training.precision=fp16", "training.loss_scale=8", "training.hysteresis=3"], "this one is fixed"),
        (
            ["launch.nproc_per_node=2", "parallel.pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_layout='|Et*8L'"],
            "the layout has E not on the first stage",
        ),
        (
            ["launch.nproc_per_node=2", "parallel.pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_layout=Et*8L|"],
            "stage 2 of 2 holds nothing",
        ),
    ],
)
def test_what_megatron_takes_and_is_hardly_meant_is_a_warning(problems, words, what):
    found = problems(*words)
    assert any(what in problem.what for problem in found), found
    assert {problem.severity for problem in found} == {"warning"}


@pytest.mark.parametrize(
    ("endpoint", "what", "severity"),
    [
        ("foo", "foo is no host and port to meet at", "error"),
        ("foo:99999999", "foo:99999999 is no host and port", "error"),
        (":29500", ":29500 is no host and port", "error"),
        ("localhost:29500", "localhost is to every machine its own address", "warning"),
        ("'[::1]:29500'", "::1 is to every machine its own address", "warning"),
        ("null", "2 machines need a place to meet", "warning"),
    ],
)
def test_a_place_where_machines_cannot_meet(problems, endpoint, what, severity):
    two = ["launch.nnodes=2", "launch.rdzv_endpoint=node0:29500"]
    assert problems(*two) == []
    (problem,) = problems(*two, f"launch.rdzv_endpoint={endpoint}")
    assert problem.what.startswith(what) and problem.severity == severity
    assert problems("launch.kind=slurm", "launch.device=cpu", f"launch.rdzv_endpoint={endpoint}", "launch.nnodes=2") == []


def test_an_attention_chosen_by_the_environment_is_not_heard(problems, monkeypatch):
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    (found,) = problems()
    assert found.severity == "warning" and "NVTE_FUSED_ATTN=0 in the environment is not heard" in found.what
    assert "model.attention_backend=flash" in found.fix


def test_another_number_of_hardware_queues_is_told(problems, monkeypatch):
    words = ["launch.device=cuda", "launch.nproc_per_node=2", "parallel.tensor_model_parallel_size=2"]

    def told(*more: str) -> list[str]:
        return [one.severity for one in problems(*words, *more) if "CUDA_DEVICE_MAX_CONNECTIONS=8" in one.what]

    assert told() == []
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert told() == ["warning"]
    assert told("parallel.tensor_model_parallel_size=1") == told("launch.device=cpu") == told("launch.kind=slurm") == []
