"""The record of a run: metrics.jsonl, TensorBoard, the lines on the terminal."""

import io
import json
import os
import pty
import select
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder
from launcher.run.progress import Progress, train_line


def record(iteration: int, **values) -> dict:
    return {
        "iteration": iteration, "train_iters": 1000, "consumed_samples": 8 * iteration, "lm_loss": 10.0 / iteration,
        "learning_rate": 6e-5, "grad_norm": 1.5, "loss_scale": 1.0, "global_batch_size": 8, "skipped_iterations": 0,
        "nan_iterations": 0, "iteration_time_ms": 250.0, "tokens_per_second": 12345.6, "supervised_tokens_per_second": None, "tflops": 0.1234,
        "memory_gib": 2.25, "eta_s": 3725.0, "time": 1.7e9 + iteration, **values,
    }  # fmt: skip


def progress(folder, iteration=0, terminal=None, tensorboard=False) -> Progress:
    recipe = Recipe()
    recipe.logging.tensorboard = tensorboard
    return Progress(RunFolder(folder), recipe, terminal or io.StringIO(), iteration)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_logged_step_is_one_object_with_the_promised_keys(tmp_path):
    out = io.StringIO()
    run = progress(tmp_path, terminal=out)
    run.train(record(1))
    run.step(2)
    run.train({key: value for key, value in record(10).items() if key != "time"})
    run.validation({"iteration": 10, "consumed_samples": 80, "set": "validation", "lm_loss_validation": 2.0, "ppl": 7.389})
    run.close()
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first == record(1)
    assert list(first) == list(record(1))
    assert second["time"] > 1.7e9
    assert lines(tmp_path / "validation.jsonl")[0]["lm_loss_validation"] == 2.0
    assert out.getvalue() == (
        "step    1/1000 | loss 10.0000 | lr 6.000e-05 | grad norm 1.500 | 12,346 tok/s | 0.123 TFLOP/s | 2.2 GiB | ETA 1:02:05\n"
        "step   10/1000 | loss 1.0000 | lr 6.000e-05 | grad norm 1.500 | 12,346 tok/s | 0.123 TFLOP/s | 2.2 GiB | ETA 1:02:05\n"
        "validation after step 10: loss 2.0000 | perplexity 7.389\n"
    )


@pytest.mark.parametrize("wrong", [{"loss": 1.0}, None])
def test_a_record_of_other_keys_is_refused(tmp_path, wrong):
    bad = {**record(1), **wrong} if wrong else {"iteration": 1}
    with pytest.raises(ValueError, match="loss"):
        progress(tmp_path).train(bad)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_what_is_not_a_number_is_null_and_valid_json(tmp_path):
    run = progress(tmp_path)
    run.train(record(1, lm_loss=float("nan"), grad_norm=float("inf"), skipped_iterations=1))
    run.close()
    kept = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (kept["lm_loss"], kept["grad_norm"]) == (None, None)
    assert "loss - |" in train_line(kept)
    assert "| grad norm - | 1 skipped |" in train_line(kept)


@given(done=st.integers(0, 30), resumed_at=st.integers(0, 30), torn=st.integers(0, 200))
def test_after_a_resume_every_step_is_there_once(tmp_path_factory, done, resumed_at, torn):
    """A run is killed after `done` steps, perhaps amid a write, and goes on from the checkpoint of an earlier one."""
    folder = tmp_path_factory.mktemp("run")
    resumed_at = min(resumed_at, done)
    run = progress(folder)
    for iteration in range(1, done + 1):
        run.train(record(iteration))
    run.close()
    text = json.dumps(record(done + 1))[:torn]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)
    run = progress(folder, iteration=resumed_at)
    for iteration in range(resumed_at + 1, 33):
        run.train(record(iteration, lm_loss=0.5))
    run.close()
    kept = lines(folder / "metrics.jsonl")
    assert [line["iteration"] for line in kept] == list(range(1, 33))
    assert [line["lm_loss"] for line in kept[:resumed_at]] == [10.0 / i for i in range(1, resumed_at + 1)]
    assert all(line["lm_loss"] == 0.5 for line in kept[resumed_at:])


def test_tensorboard_has_megatrons_tags_once_each_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = progress(tmp_path, tensorboard=True)
    for iteration in range(1, 8):
        run.train(record(iteration))
    run.validation({"iteration": 4, "consumed_samples": 32, "set": "validation", "lm_loss_validation": 2.5, "ppl": 12.2})
    run.close()
    run = progress(tmp_path, iteration=4, tensorboard=True)
    run.train(record(5, lm_loss=0.5))
    run.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    both = {"learning-rate", "batch-size", "lm loss", "loss-scale", "grad-norm", "lm loss validation", "lm loss validation ppl"}
    assert set(board.Tags()["scalars"]) == both | {f"{tag} vs samples" for tag in both} | {"iteration-time", "throughput"}
    assert [e.step for e in board.Scalars("lm loss")] == [1, 2, 3, 4, 5]
    assert [e.value for e in board.Scalars("lm loss")] == pytest.approx([10.0, 5.0, 10 / 3, 2.5, 0.5])
    assert [e.step for e in board.Scalars("lm loss vs samples")] == [8, 16, 24, 32, 40]
    assert [e.wall_time for e in board.Scalars("grad-norm")] == [1.7e9 + i for i in range(1, 6)]
    assert [e.value for e in board.Scalars("iteration-time")] == [0.25] * 5
    assert [(e.step, e.value) for e in board.Scalars("lm loss validation")] == [(4, 2.5)]


def read_all(master: int) -> str:
    shown = b""
    while select.select([master], [], [], 0.2)[0]:
        shown += os.read(master, 65536)
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_keeps_lines_and_redraws_one_under_them(tmp_path):
    master, slave = pty.openpty()
    terminal = os.fdopen(slave, "w", buffering=1)
    run = progress(tmp_path, terminal=terminal)
    run.train(record(500))
    run.note("saved step 500")
    time.sleep(0.25)  # redrawn five times a second at most
    run.step(600)
    run.train(record(750, eta_s=59.0))
    run.close()
    shown = read_all(master)
    drawn = shown.split("\r\x1b[2K")
    kept = [part.split("\n")[0] for part in drawn if "\n" in part]
    assert [line.split(" | ")[0] for line in kept] == ["step  500/1000", "saved step 500", "step  750/1000"]
    assert kept[0].endswith(" tok/s") and all(len(line) < 80 for line in kept)  # the rest is in metrics.jsonl
    live = [part.split("\n")[-1] for part in drawn[1:]]
    assert live[1] == live[2]  # it stands under the note as before
    assert live[3].endswith("] 600/1000  60%  loss 0.0200  ETA 1:01:40")  # 100 steps of 250 ms later
    assert live[-2].endswith("] 750/1000  75%  loss 0.0133  ETA 0:00:59")
    filled, empty = live[-2].count("#"), live[-2].split("]")[0].count("-")
    assert filled == round(0.75 * (filled + empty)) >= 7
    assert all(len(line) < 80 for line in live)
    assert drawn[-1] == ""  # nothing is left standing at the end
    terminal.close()
    os.close(master)


def test_a_lost_terminal_does_not_stop_the_training(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    run = progress(tmp_path, terminal=os.fdopen(writer, "w", buffering=1))
    run.train(record(1))
    run.train(record(2))
    run.close()
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
