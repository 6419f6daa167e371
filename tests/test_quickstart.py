"""The quickstart as it is typed, with a training of four steps: its steps, its files, its answers, its second run, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher.engine.generate.records import unescape

ROOT = Path(__file__).parents[1]
QUESTIONS = [json.loads(line)["query"] for line in (ROOT / "examples/pred_input.jsonl").read_text().splitlines()]
SHORT = ["training.train_iters=4", "logging.log_interval=1", "training.eval_iters=1", "optimizer.lr_warmup_fraction=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("a folder with spaces")


@pytest.fixture(scope="module")
def output(folder):
    return quickstart(folder)


def quickstart(folder: Path) -> str:
    """Run it, without .venv on PATH, as make does; returns what it printed."""
    command = [sys.executable, ROOT / "examples/quickstart.py", *SHORT]
    done = subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PATH": os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != Path(sys.executable).parent)}


def test_every_step_is_printed_as_the_command_one_would_type(output):
    commands = [line[2:].split()[:2] for line in output.splitlines() if line.startswith("$ ")]
    assert commands[0][0] == "python" and commands[0][1].endswith("examples/make_corpus.py")
    assert [" ".join(words) for words in commands[1:]] == ["yuan tokenizer", "yuan preprocess", "yuan pretrain", "yuan generate"]


def test_the_loss_falls(output, folder):
    records = [json.loads(line) for line in (folder / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert records[0]["lm_loss"] == pytest.approx(8.3, abs=0.1)  # ln 4096, before anything was learnt
    assert records[3]["lm_loss"] < records[0]["lm_loss"] - 0.2
    assert [f"{record['lm_loss']:.4f}" for record in records] == re.findall(r"^step \d/4 \| loss ([\d.]+)", output, re.MULTILINE)


def test_two_processes_train(output, folder):
    assert "2 x cpu: TP 1, PP 1, DP 2" in output
    assert {path.name for path in (folder / "runs/quickstart/logs").glob("rank_*.log")} == {"rank_0.log", "rank_1.log"}


def test_each_question_has_its_answer(output, folder):
    answers = (folder / "output.txt").read_text(encoding="utf-8").splitlines()
    assert len(answers) == len(QUESTIONS) == 5
    shown = output.partition("== Done in")[2]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert f"[{question}]{unescape(answer).rstrip()}" in shown


def test_a_second_run_keeps_what_is_there_and_answers_again(output, folder):
    made = [folder / "quickstart" / name for name in ("corpus.jsonl", "tokenizer.model", "data_text_document.idx")]
    before = [path.stat().st_mtime_ns for path in made]
    metrics = (folder / "runs/quickstart/metrics.jsonl").read_text()
    again = quickstart(folder)
    assert again.count("is there already") == 3
    assert [path.stat().st_mtime_ns for path in made] == before
    assert (folder / "runs/quickstart/metrics.jsonl").read_text() == metrics  # trained to its end: no step more
    assert again.partition("\n[")[2] == output.partition("\n[")[2]


def test_ctrl_c_saves_and_says_how_to_go_on(output, folder):
    words = ["run.name=stopped", "training.train_iters=100000", "logging.log_interval=1", "training.eval_iters=0"]
    command = [sys.executable, ROOT / "examples/quickstart.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(command, cwd=folder, env=environment(), start_new_session=True, **pipes)
    watchdog = threading.Timer(240, os.killpg, (job.pid, signal.SIGKILL))
    watchdog.start()
    seen = ""
    for line in job.stdout:
        seen += line
        if re.match(r"step +2/", line):
            os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to every process in the foreground
            break
    seen += job.stdout.read()
    watchdog.cancel()
    assert job.wait(timeout=60) == 130, seen
    assert "Traceback" not in seen and "stopped; the same command goes on from here" in seen
    assert "yuan generate" not in seen
    saved = int((folder / "runs/stopped/checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved >= 2


def test_the_model_is_fine_tuned(output, folder):
    """The example that follows the quickstart, two steps of it: questions before, training, the same questions after."""
    command = [sys.executable, ROOT / "examples/finetune.py", "training.epochs=null", "training.train_iters=2", "training.eval_iters=1"]
    done = subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    commands = [" ".join(line[2:].split()[:2]) for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert commands[1:] == ["yuan generate", "yuan sft", "yuan generate"]
    assert re.search(r"^train      [\d,]+ rows in [\d,]+ samples of 128, \d+\.\d% filled", done.stdout, re.MULTILINE)
    assert all(done.stdout.count(f"\n  {word} ") == 5 for word in ("before", "after", "true"))
