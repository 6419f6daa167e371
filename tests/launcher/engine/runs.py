"""Training runs of a tiny model through the command line, and what they recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from launcher.recipe.device import gpu_count
from launcher.run.folder import RunFolder
from tests.launcher.engine import warm

# The model, data and schedule of the curves that Megatron-LM itself printed.
REFERENCE = """\
model: {num_layers: 4, hidden_size: 128, num_attention_heads: 4, attention_dropout: 0.0, hidden_dropout: 0.0,
        make_vocab_size_divisible_by: 64}
training: {seq_length: 128, micro_batch_size: 2, global_batch_size: 8, train_iters: 20, eval_interval: 10, eval_iters: 2}
optimizer: {lr: 1.0e-3, min_lr: 1.0e-4, lr_decay_style: cosine, lr_decay_iters: 20, lr_warmup_iters: 2,
            weight_decay: 0.1, adam_beta2: 0.95}
data: {data_path: shakespeare_text_document, split: "90,5,5"}
tokenizer: {type: NullTokenizer, vocab_size: 50257}
logging: {log_interval: 1, tensorboard: false}
launch: {device: cpu, cpu_threads: 1}
"""

# A smaller one, for everything that needs no reference: a second or two per run.
SMALL = """\
model: {num_layers: 4, hidden_size: 32, num_attention_heads: 4, make_vocab_size_divisible_by: 64}
training: {seq_length: 32, micro_batch_size: 2, global_batch_size: 8, train_iters: 8, eval_interval: 4, eval_iters: 1}
optimizer: {lr: 1.0e-2, lr_decay_style: cosine, lr_warmup_iters: 2, lr_decay_iters: 8, weight_decay: 0.1}
data: {data_path: ids, split: "90,5,5"}
tokenizer: {type: NullTokenizer, vocab_size: 255}
checkpoint: {save_interval: 4}
logging: {log_interval: 1, tensorboard: false}
launch: {device: cpu, cpu_threads: 1}
"""


def yuan(folder: Path, *words: object, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run `yuan WORDS...` in `folder`, by a process that has imported the engine already; with options of `subprocess.run`, or on a
    machine with a GPU, by one of its own."""
    command = [str(Path(sys.executable).with_name("yuan")), *map(str, words)]
    if options or gpu_count():
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, env=os.environ | {"NO_COLOR": "1"}, **options)
    else:
        done = subprocess.CompletedProcess(command, *warm.ask(words=command[1:], cwd=str(folder)))
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
    return done


def launched(folder: RunFolder, worker: str) -> None:
    """Run the script `worker` on every rank of the recipe that is frozen in `folder`."""
    code, _, told = warm.ask(frozen=str(folder.recipe), worker=worker)
    assert code == 0, told


def executed(script: str, *arguments: object) -> None:
    """Run a script, which may fork ranks of its own."""
    code, _, told = warm.ask(script=[script, *map(str, arguments)])
    assert code == 0, told


def records(path: Path) -> list[dict]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path, run: str) -> dict[int, float]:
    """{iteration: loss} of a run."""
    return {record["iteration"]: record["lm_loss"] for record in records(folder / "runs" / run / "metrics.jsonl")}


def layout(tp: int = 1, pp: int = 1, dp: int = 1, **more) -> list[str]:
    """The words of a layout; `more` are keys of `parallel`."""
    words = [f"launch.nproc_per_node={tp * pp * dp}", f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}"]
    return words + [f"parallel.{key}={str(value).lower()}" for key, value in more.items()]
