"""Runs that are broken off: the curve after the resume is the uninterrupted one, bit for bit on a CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launcher.engine.runs import layout, losses, records, yuan


def start(folder, *words: str) -> subprocess.Popen:
    return subprocess.Popen([str(Path(sys.executable).with_name("yuan")), "pretrain", "recipe=small", *words], cwd=folder, stderr=subprocess.DEVNULL)


def wait_for(path, text: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.is_file() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{text!r} did not come up in {path}")


def steps(folder, run: str) -> list[dict]:
    return [{k: r[k] for k in ("iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_samples")} for r in records(folder / "runs" / run / "metrics.jsonl")]


@pytest.mark.parametrize("words", [
    layout(),
    layout(tp=2, sequence_parallel=True),
    layout(pp=2, num_layers_per_virtual_pipeline_stage=1),
    layout(dp=2, use_distributed_optimizer=True),
    [*layout(), "checkpoint.format=torch"],
    [*layout(dp=2, use_distributed_optimizer=True), "checkpoint.format=torch", "training.precision=bf16"],
], ids=["one", "tp2", "pp2_interleaved", "zero1", "torch", "torch_zero1_bf16"])  # fmt: skip
def test_the_curve_after_a_resume_is_the_uninterrupted_one_bit_for_bit(small, straight, request, words):
    name = request.node.callspec.id
    straight(f"{name}_straight", *words)
    broken = f"{name}_broken"
    yuan(small, "pretrain", "recipe=small", f"run.name={broken}", *words, "training.exit_interval=3")
    assert records(small / "runs" / broken / "metrics.jsonl")[-1]["iteration"] == 3
    yuan(small, "pretrain", "recipe=small", f"run.name={broken}", *words)
    assert steps(small, broken) == steps(small, f"{name}_straight")
    validations = [
        [(r["iteration"], r["set"], r["lm_loss_validation"]) for r in records(small / "runs" / run / "validation.jsonl")]
        for run in (broken, f"{name}_straight")
    ]
    assert validations[0] == validations[1]


def test_a_line_over_a_break_is_the_uninterrupted_one(small, straight):
    """Losses are averaged over log_interval steps; what the last line had not told yet is in the checkpoint."""
    words = [*layout(pp=2), "logging.log_interval=4"]
    straight("lines", *words)
    yuan(small, "pretrain", "recipe=small", "run.name=lines_broken", *words, "training.exit_interval=3")
    yuan(small, "pretrain", "recipe=small", "run.name=lines_broken", *words)
    assert steps(small, "lines_broken") == steps(small, "lines")
    one = losses(small, straight("each_line", *layout(pp=2)))
    assert losses(small, "lines") == pytest.approx({1: one[1], 4: sum(one[i] for i in range(1, 5)) / 4, 8: sum(one[i] for i in range(5, 9)) / 4})


def test_a_run_whose_every_step_overflowed_goes_on(small):
    words = ["run.name=overflowing", "training.precision=fp16", "training.hysteresis=1", "training.initial_loss_scale=1e30"]
    yuan(small, "pretrain", "recipe=small", *words, "training.exit_interval=2")
    yuan(small, "pretrain", "recipe=small", *words, "training.exit_interval=4")
    lines = records(small / "runs" / "overflowing" / "metrics.jsonl")
    assert [line["loss_scale"] for line in lines] == pytest.approx([1e30 / 2**step for step in range(1, 5)])
    assert lines[-1]["learning_rate"] == 0.0


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(small, straight):
    curve = steps(small, straight("one_straight", *layout()))
    process = start(small, "run.name=killed")
    wait_for(small / "runs" / "killed" / "checkpoints" / "latest_checkpointed_iteration.txt", "4")
    process.kill()
    process.wait()
    yuan(small, "pretrain", "recipe=small", "run.name=killed")
    assert steps(small, "killed") == curve


def test_sigterm_saves_and_ends_and_the_same_command_goes_on(small, straight):
    curve = steps(small, straight("one_straight", *layout()))
    process = start(small, "run.name=stopped", "checkpoint.save_interval=1000")
    wait_for(small / "runs" / "stopped" / "metrics.jsonl", '"iteration": 2,')
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, 3)  # 3: stopped before the last step
    last = records(small / "runs" / "stopped" / "metrics.jsonl")[-1]["iteration"]
    assert (small / "runs" / "stopped" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(last)
    yuan(small, "pretrain", "recipe=small", "run.name=stopped", "checkpoint.save_interval=1000")
    assert steps(small, "stopped") == curve


def test_a_time_limit_saves_and_ends(small):
    yuan(small, "pretrain", "recipe=small", "run.name=timed", "training.exit_duration_in_mins=0.0001")
    assert (small / "runs" / "timed" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "1"


def test_keep_last_keeps_the_newest(small):
    yuan(small, "pretrain", "recipe=small", "run.name=kept", "checkpoint.save_interval=2", "checkpoint.keep_last=2", *layout())
    assert sorted(os.listdir(small / "runs" / "kept" / "checkpoints")) == ["iter_0000006", "iter_0000008", "latest_checkpointed_iteration.txt"]


def test_more_steps_go_on_where_the_run_ended(small, straight):
    name = straight("longer", *layout())
    yuan(small, "pretrain", "recipe=small", f"run.name={name}", "training.train_iters=10")
    assert list(losses(small, name)) == list(range(1, 11))


def test_the_torch_layout_is_the_tree_megatron_lm_leaves(small, straight):
    import torch

    straight("torch_straight", *layout(), "checkpoint.format=torch")
    folder = small / "runs" / "torch_straight" / "checkpoints"
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "8"
    saved = torch.load(folder / "iter_0000008" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    assert saved["iteration"] == 8 and saved["checkpoint_version"] == 3.0 and saved["args"].consumed_train_samples == 64
    assert saved["model"]["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (96, 32)
    assert saved["opt_param_scheduler"]["num_steps"] == 64


def test_a_damaged_checkpoint_is_named_and_nothing_trains(small, straight):
    import shutil

    shutil.copytree(small / "runs" / straight("torch_straight", *layout(), "checkpoint.format=torch"), small / "runs" / "damaged")
    path = small / "runs" / "damaged" / "checkpoints" / "iter_0000008" / "mp_rank_00" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:1000])
    done = yuan(small, "pretrain", "recipe=small", "run.name=damaged", "checkpoint.format=torch", "training.train_iters=9", check=False)
    assert done.returncode == 2 and "iter_0000008" in done.stderr and "Traceback" not in done.stderr


def test_weights_of_another_run_start_a_new_one(small, straight):
    source = straight("one_straight", *layout())
    words = [f"checkpoint.load=runs/{source}", "checkpoint.finetune=true", "training.train_iters=3"]
    yuan(small, "pretrain", "recipe=small", "run.name=tuned", *words)
    assert list(losses(small, "tuned")) == [1, 2, 3]
    assert losses(small, "tuned")[1] < losses(small, source)[1] - 0.2
