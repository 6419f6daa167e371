"""`yuan check`: exit code, faults, and the sizes it prints."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from data_tools.indexed import IndexedWriter
from launcher.cli import app
from launcher.recipe import load
from launcher.run.folder import open_run
from tests.data_tools.samples import small_gpt2

TINY = """# Tiny
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4}
training: {seq_length: 16, micro_batch_size: 2, global_batch_size: 8, train_iters: 5}
optimizer: {lr: 1.0e-3}
tokenizer: {type: NullTokenizer, vocab_size: 50}
data: {data_path: data_text_document, split: '8,2,0'}
launch: {device: cpu, nproc_per_node: 2}
"""
ELSEWHERE = ("  memory", "  arithmetic", "  assumed", "  index")  # tests/launcher/recipe/test_estimate.py


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(*words) → (exit code, what it printed), in a folder with a tiny recipe and its data."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    with IndexedWriter("data_text_document", np.dtype("<u2")) as writer:
        for _ in range(10):
            writer.add_document(np.arange(20))
        writer.finish()

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["check", *words], catch_exceptions=False)
        return result.exit_code, result.stdout

    return run


def test_the_estimate_needs_no_tokenizer_or_says_that_it_does(check):
    code, text = check("recipe=345m_1dp")  # it states its vocabulary; no file of it is here
    assert code == 2 and "GiB a process: weights 1.3, " in text
    code, text = check("recipe=quickstart")
    assert code == 2 and "\n  memory      not known: the tokenizer is missing; with tokenizer.vocab_size=… it is\n" in text
    assert "GiB a process: " in check("recipe=quickstart", "tokenizer.vocab_size=4000")[1]


def test_faults_are_told_without_numpy(check):
    """It costs 0.14 s, a third of such a check."""
    for recipe in ("345m_1dp", "quickstart", "llama2_7b", "yuan2_2b"):
        code = "import sys; from launcher.cli import app; app(standalone_mode=False)"
        told = f"import atexit, sys; atexit.register(lambda: print(sorted({{'numpy', 'torch'}} & set(sys.modules)))); {code}"
        done = subprocess.run([sys.executable, "-c", told, "check", f"recipe={recipe}"], capture_output=True, text=True)
        assert "would not run" in done.stdout and done.stdout.endswith("\n[]\n"), done.stdout + done.stderr


def test_a_recipe_that_would_run(check):
    code, text = check("recipe=./tiny.yaml")
    assert code == 0
    assert re.search(r"^  index +cache/[0-9a-f]{16} \(not there yet", text, re.MULTILINE)
    assert [line.split(maxsplit=1)[1] for line in text.splitlines() if not line.startswith(ELSEWHERE)] == [
        "would run",
        "gpt2, 0.0 M parameters, fp32",
        "2 on cpu: TP 1 x PP 1 x DP 2",
        "8 samples a step = micro batch 2 x DP 2 x 2",
        "5 steps = 40 samples = 640 tokens",
        "51 ids, padded to 128",
        "folder  runs/tiny",
    ]


def test_a_recipe_that_would_not_run(check):
    code, text = check("recipe=./tiny.yaml", "training.global_batch_size=6", "optimizer.min_lr=1")
    assert code == 2
    assert text.count("error: ") == 2 and "training.global_batch_size=4 or 8" in text
    assert text.endswith("tiny would not run: 2 errors\n")


def test_a_warning_does_not_stop_it(check):
    code, text = check("recipe=./tiny.yaml", "optimizer.lr_decay_iters=50")
    assert code == 0 and text.startswith("warning: the training ends after 5 of 50 steps of decay")


def test_a_recipe_for_another_machine(check):
    code, text = check("recipe=./tiny.yaml", "--nodes", "2", "--gpus-per-node", "2", "training.global_batch_size=16")
    assert code == 0 and "4 on cuda: TP 1 x PP 1 x DP 4" in text
    assert "warning: 2 machines need a place to meet" in text
    assert "warning: 2 processes want a GPU each, and on this machine torch can use 0" in text
    code, text = check("recipe=./tiny.yaml", "--gpus-per-node", "3")
    assert code == 2 and "launch.nproc_per_node=3 (--gpus-per-node)" in check("recipe=./tiny.yaml", "--gpus-per-node", "3")[1]


def test_a_run_to_go_on_with(check):
    loaded = load(["recipe=./tiny.yaml"])
    open_run(loaded.recipe, loaded.sources, ["yuan", "pretrain"]).close()
    code, text = check("recipe=./tiny.yaml", "logging.log_interval=1")
    assert code == 0 and text.endswith("  changed logging.log_interval: 100 -> 1\n")
    code, text = check("recipe=./tiny.yaml", "optimizer.lr=0.1")
    assert code == 2 and "optimizer.lr: 0.001 -> 0.1   (command line)" in text
    code, text = check("recipe=./tiny.yaml", "optimizer.lr=0.1", "--accept-changes")
    assert code == 0 and "changed optimizer.lr: 0.001 -> 0.1" in text


def test_for_another_verb(check):
    code, text = check("--for", "preprocess", "recipe=./tiny.yaml", "preprocess.input=gone.jsonl", "preprocess.output_prefix=x")
    assert code == 2 and "no such file: gone.jsonl" in text


def test_the_cut_down_345m_passes_on_a_corpus_of_a_thousand_documents(check):
    """`yuan pretrain recipe=345m_1dp` for two steps, as typed on a laptop: its test share of 0.1 % still holds a document."""
    Path("data").mkdir()
    files = small_gpt2(Path("data"))
    files["vocab_file"].rename("data/gpt2-vocab.json")
    files["merge_file"].rename("data/gpt2-merges.txt")
    with IndexedWriter("data/my-gpt2_text_document", np.dtype("<u2")) as writer:
        for _ in range(1000):
            writer.add_document(np.arange(20))
        writer.finish()
    code, text = check(
        "recipe=345m_1dp",
        "training.train_iters=2",
        "training.global_batch_size=2",
        "training.micro_batch_size=1",
        "launch.device=cpu",
    )
    assert code == 0 and "345m_1dp would run" in text
    assert text.count("warning: ") == 1 and "ends after 2 of 430 warm-up steps" in text
