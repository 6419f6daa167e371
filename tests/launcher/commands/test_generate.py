"""`yuan generate` as typed: from a checkpoint and a file of prompts to a file of answers."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launcher.engine.generate_worker import LIMITS, PROMPTS

INPUT = [
    '{"query": "3 1 4 1 5 9 2 6 5 3 5"}',
    "",
    "not json",
    '{"text": "9 9", "id": 7}',
    '{"query": "50"}',  # no id of the vocabulary
    '{"query": "' + " ".join(["1"] * 24) + '"}',  # fills all positions
    '{"instruction": "6 28 49", "input": "6 12 0 13"}',
]


@pytest.fixture
def project(trained, tmp_path, monkeypatch) -> Path:
    """A folder with one run, `runs/llama`, and `in.jsonl`."""
    shutil.copytree(trained / "llama", tmp_path / "runs" / "llama")
    (tmp_path / "in.jsonl").write_text("\n".join(INPUT) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def yuan(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "launcher.cli", "generate", *words], capture_output=True, text=True, timeout=300)


def expected(trained: Path, prompt: int) -> list[int]:
    ids = json.loads((trained / "result.json").read_text())["llama"][prompt]
    return ids[: ids.index(49)] if 49 in ids else ids


def test_with_nothing_but_an_input_the_newest_checkpoint_answers(project, trained):
    done = yuan("--input", "in.jsonl", "--max-new-tokens", str(LIMITS[0]))
    assert done.returncode == 0, done.stderr
    lines = (project / "output.txt").read_text().split("\n")
    answers = [[int(word) for word in lines[place].split()] for place in (0, 3, 6)]
    assert answers[0] == expected(trained, PROMPTS.index([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]))
    assert answers[1][:3] == expected(trained, PROMPTS.index([9, 9]))
    assert answers[2] == expected(trained, PROMPTS.index([6, 28, 49, 6, 12, 0, 13]))
    assert lines[1] == "" and lines[7:] == [""]
    assert [line.split(": ")[0] for line in (lines[2], lines[4], lines[5])] == [f"[error] line {n}" for n in (3, 5, 6)]
    assert "runs/llama/checkpoints/iter_0000000 (the newest)" in done.stderr and "greedy" in done.stderr
    assert "3 lines were not answered" in done.stderr and "line 5: cannot be tokenized: id 50" in done.stderr
    assert not [*project.glob("yuan-generate*"), *project.glob("*.part")]


def test_two_replicas_write_whole_records_in_order(project, trained):
    options = ("--output", "new/x.jsonl", "--load", "runs/llama", "--batch-size", "1")
    done = yuan("--input", "in.jsonl", *options, "launch.nproc_per_node=2")
    assert done.returncode == 0, done.stderr
    assert "DP 2" in done.stderr
    text = (project / "new" / "x.jsonl").read_text().split("\n")
    assert text[1] == ""
    records = [json.loads(line) for line in text if line]
    assert [record["finish_reason"] == "error" for record in records] == [False, True, False, True, True, False]
    assert "50" in records[3]["error"] and "24 positions" in records[4]["error"] and records[1]["line"] == "not json"
    assert records[2]["id"] == 7 and records[0]["prompt_tokens"] == 11
    for record in (records[0], records[2], records[5]):
        length = len(record["output"].split())
        assert length == record["completion_tokens"]
        # 64 tokens are asked for, and the model has 24 positions
        assert record["finish_reason"] == "stop" or record["prompt_tokens"] + length == 24
    first = [int(word) for word in records[0]["output"].split()]
    assert first[: LIMITS[0]] == expected(trained, 0)


def test_mistakes_are_told_before_anything_starts(project):
    (project / "empty.jsonl").write_text("")
    for words, what in [
        ((), "generate.input is not given"),
        (("--input", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        (("--input", "empty.jsonl"), "the input is empty"),
        (("--input", "in.jsonl", "--output", "in.jsonl"), "would replace the prompts"),
        (("--input", "in.jsonl", "--output", "/proc/x/out.txt"), "the answers cannot be written: /proc takes no files"),
        (("--input", "in.jsonl", "--top-p", "1.5"), "generate.top_p must be at most 1"),
        (("--input", "in.jsonl", "--load", "nowhere"), "no whole checkpoint in nowhere"),
        (("--input", "in.jsonl", "model.num_layers=2"), "model.num_layers is fixed by the checkpoint"),
        (("--input", "in.jsonl", "parallel.tensor_model_parallel_size=3"), "cannot be cut into TP 3 parts"),
    ]:
        done = yuan(*words)
        assert done.returncode == 2 and what in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert not (project / "output.txt").exists()


def test_a_damaged_checkpoint_is_a_plain_line_and_no_output(project):
    (project / "runs" / "llama" / "checkpoints" / "iter_0000000" / "__0_0.distcp").write_bytes(b"torn")
    done = yuan("--input", "in.jsonl")
    assert done.returncode == 2, done.stderr
    assert "iter_0000000 cannot be loaded" in done.stderr and "--load RUN_OR_CHECKPOINT" in done.stderr
    assert not list(project.glob("output*"))


def test_a_stopped_job_leaves_an_earlier_output_alone_and_keeps_what_it_has(project):
    (project / "in.jsonl").write_text('{"query": "3 1 4"}\n' * 4000)
    (project / "output.txt").write_text("earlier\n")
    command = [sys.executable, "-m", "launcher.cli", "generate", "--input", "in.jsonl", "--batch-size", "1"]
    for seconds in (0.3, 3, 30):  # until some are answered
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
            while not (logs := list(project.glob("yuan-generate*/logs/rank_0.log"))) or "loaded" not in logs[0].read_text():
                assert job.poll() is None
                time.sleep(0.1)
            time.sleep(seconds)
            job.terminate()
            _, errors = job.communicate(timeout=120)
        if "nothing was answered yet" not in errors:
            break
        assert job.returncode == 130 and not (project / "output.stopped.txt").exists()
    assert job.returncode == 130, errors
    assert (project / "output.txt").read_text() == "earlier\n"
    lines = (project / "output.stopped.txt").read_text().splitlines()
    assert len(lines) == 4000 and lines[-1] == "[error] line 4000: not answered: the job was stopped before"
    assert errors.endswith("stopped    the output tells which lines were not reached; the same command begins anew\n")
    assert "not answered; the output says why" not in errors and not list(project.glob("yuan-generate*"))
