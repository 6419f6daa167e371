"""`yuan pretrain` around its worker: checks, plan, run folder, launch, what to type next. No engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.recipe.frozen import read_frozen

WORKER = Path(__file__).parents[1] / "launch" / "worker.py"
# `yuan` with the tests' worker in place of the engine's
YUAN = f"import pathlib, launcher.commands.pretrain as p; p.WORKER = pathlib.Path({str(WORKER)!r}); import launcher.cli; launcher.cli.main()"

RECIPE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
parallel: {tensor_model_parallel_size: 2}
training: {seq_length: 16, micro_batch_size: 1, global_batch_size: 4, train_iters: 2, eval_iters: 0}
optimizer: {lr: 1.0e-3, min_lr: 1.0e-4}
tokenizer: {type: NullTokenizer, vocab_size: 50}
preprocess: {input: ids.jsonl, output_prefix: ids, append_eod: true}
data: {data_path: ids_text_document, split: "100,0,0"}
launch: {device: cpu, nproc_per_node: 2}
"""


def yuan(cwd: Path, *words: str) -> tuple[int, str, str]:
    job = subprocess.run([sys.executable, "-c", YUAN, *words], cwd=cwd, capture_output=True, text=True, timeout=60)
    return job.returncode, job.stdout, job.stderr


@pytest.fixture
def home(tmp_path):
    """A folder with a recipe `tiny` and its data."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"text": " ".join(map(str, range(40)))}) + "\n" for _ in range(20)))
    code, _, err = yuan(tmp_path, "preprocess", "recipe=tiny", "--workers", "1")
    assert code == 0, err
    return tmp_path


def test_a_run_from_plan_to_the_next_command_and_again(home):
    code, out, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes")
    assert (code, out) == (0, ""), err
    assert "run        runs/completes\n" in err
    assert "processes  2 x cpu: TP 2, PP 1, DP 1, fp32\n" in err
    assert "batch      4 samples of 16 tokens (4 micro-batches of 1 per rank)\n" in err
    assert "training   2 steps, 8 samples, 128 tokens\n" in err
    assert err.endswith("next       yuan generate --input pred_input.jsonl\n")
    run = home / "runs" / "completes"
    assert read_frozen(run / "recipe.yaml").optimizer.lr == 1e-3
    assert (run / "command.txt").read_text().endswith("\nyuan pretrain recipe=tiny run.name=completes\n")
    assert {path.name for path in run.iterdir()} >= {"recipe.yaml", "command.txt", "environment.json", "logs", "checkpoints"}

    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes")
    assert code == 0 and err.endswith("step 2 is its last, and there is nothing to do; to train on: training.train_iters=3 or more\n")
    assert len((run / "logs" / "rank_0.log").read_text().split(" rank 0 of 2, pid ")) == 2  # no process was started
    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes", "training.train_iters=1")
    assert code == 2 and "step 2 of this run is done" in err

    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes", "training.train_iters=3", "logging.log_interval=1")
    assert code == 0
    assert "resuming   from step 2\n" in err
    assert "changed    training.train_iters: 2 -> 3\n" in err
    assert "next " not in err  # step 3 was not reached

    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes", "optimizer.lr=1e-2")
    assert code == 2
    assert "error: this run was made with another recipe:\n    optimizer.lr: 0.001 -> 0.01   (command line)\n" in err
    assert "Traceback" not in err

    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes", "optimizer.lr=1e-2", "--accept-changes")
    assert code == 0
    assert "changed    optimizer.lr: 0.001 -> 0.01\n" in err
    assert read_frozen(run / "recipe.yaml").optimizer.lr == 1e-2


def test_a_run_elsewhere_names_its_folder_in_the_next_command(home):
    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes", "run.dir=elsewhere/x")
    assert code == 0, err
    assert err.endswith("next       yuan generate --input pred_input.jsonl --load elsewhere/x\n")


def test_every_fault_is_shown_and_nothing_is_started(home):
    code, out, err = yuan(home, "pretrain", "recipe=tiny", "training.global_batch_size=0", "data.data_path=nowhere", "model.num_attention_heads=3")
    assert (code, out) == (2, "")
    assert err.count("error: ") >= 3
    assert "nowhere" in err
    assert "Traceback" not in err
    assert not (home / "runs").exists()


def test_a_dry_run_shows_the_plan_and_leaves_nothing(home):
    code, out, err = yuan(home, "pretrain", "recipe=tiny", "--dry-run")
    assert code == 0
    assert "torchrun --nnodes=1 --node-rank=0 --nproc-per-node=2 " in out and "\n# --- runs/tiny/recipe.yaml\nmodel:\n" in out
    assert "model      gpt2: 2 layers, hidden 32, 2 heads, vocabulary 51, 0.0 M parameters\n" in err
    assert not (home / "runs").exists()


def test_what_a_dry_run_shows_is_what_runs(home):
    """Its lines, typed into a shell with the recipe that it shows, are the run."""
    code, out, err = yuan(home, "pretrain", "recipe=tiny", "run.name=success", "--dry-run")
    assert code == 0, err
    commands, recipe = out.split("# --- runs/success/recipe.yaml\n")
    (home / "runs" / "success").mkdir(parents=True)
    (home / "runs" / "success" / "recipe.yaml").write_text(recipe)
    done = subprocess.run(["bash", "-c", commands], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.stderr == "shown to the user\n" * 2
    by_hand = [(home / "runs" / "success" / "logs" / f"rank_{rank}.log").read_text().splitlines()[1:] for rank in (0, 1)]
    assert yuan(home, "pretrain", "recipe=tiny", "run.name=success")[0] == 0
    for rank in (0, 1):
        (log,) = (home / "runs" / "success" / "logs").glob(f"rank_{rank}.log")
        assert log.read_text().splitlines()[len(by_hand[rank]) + 2 :] == by_hand[rank]


def test_a_worker_that_dies_gives_exit_code_1(home):
    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=first_raises")
    assert code == 1
    assert "the run died, first of rank 1: RuntimeError: the boom\n" in err
    assert "next " not in err


def test_a_checkpoint_of_another_version_is_refused_in_plain_lines(home):
    checkpoints = home / "runs" / "old" / "checkpoints"
    (checkpoints / "iter_0000001").mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("1")
    (checkpoints / "iter_0000001" / "recipe.yaml").write_text("optimizer: {momentum_of_old: 0.9}\n")
    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=old")
    assert code == 2 and "Traceback" not in err
    assert "Key 'momentum_of_old' not in 'Optimizer'" in err and "run.name=NAME" in err


def test_a_checkpoint_to_start_from_is_looked_for_before_anything_starts(home):
    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes", "checkpoint.load=nowhere")
    assert code == 2 and "there is no whole checkpoint in nowhere" in err and "checkpoint.load=nowhere (command line)" in err
    assert not (home / "runs").exists()
    assert yuan(home, "pretrain", "recipe=tiny", "run.name=completes")[0] == 0
    # The run has a checkpoint of its own now, and goes on from that one.
    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes", "checkpoint.load=nowhere", "--accept-changes")
    assert code == 0 and "resuming   from step 2\n" in err


def test_a_run_whose_tracker_is_gone_is_not_started_anew(home):
    assert yuan(home, "pretrain", "recipe=tiny", "run.name=completes")[0] == 0
    (home / "runs" / "completes" / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    commands = (home / "runs" / "completes" / "command.txt").read_text()
    code, _, err = yuan(home, "pretrain", "recipe=tiny", "run.name=completes")
    assert code == 2 and "echo 2 > runs/completes/checkpoints/latest_checkpointed_iteration.txt" in err and "Traceback" not in err
    assert (home / "runs" / "completes" / "command.txt").read_text() == commands
