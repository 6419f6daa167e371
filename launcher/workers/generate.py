"""The worker of `yuan generate`: one rank that answers a file of prompts from a checkpoint."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.workers.entry import Stop, run_worker, terminal

if TYPE_CHECKING:  # importing them takes 0.5 s, in which no signal is answered
    from launcher.engine.generate.records import Line
    from launcher.recipe.schema import Recipe
    from launcher.run.folder import RunFolder

SUMMARY = "summary.json"  # in the folder of the frozen recipe, for the command that launched the ranks
SHOW_S, SHOW_IN_LOG_S = 0.2, 10.0


def main(recipe: Recipe, folder: RunFolder, stop: Stop) -> None:
    """Answer `generate.input` into `generate.output`; rank 0 reads, writes, and leaves `summary.json`."""
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    import torch

    from launcher.engine.generate.answer import Meter, answer_all, fill, to_prompts
    from launcher.engine.generate.records import read_lines
    from launcher.recipe.tokenizer import tokenizer_of

    first = torch.distributed.get_rank() == 0
    tokenizer = tokenizer_of(recipe.tokenizer)
    shared, lines = [None], []
    if first:
        lines = read_lines(Path(recipe.generate.input), recipe.tokenizer.chat_template is not None)
        shared = [to_prompts(recipe, tokenizer, lines)]
    torch.distributed.broadcast_object_list(shared, src=0)
    prompts = shared[0]
    model = load_model(recipe)
    print(f"loaded {recipe.generate.load}; {len(prompts)} prompts to answer")
    live = Live(len(prompts), recipe.derived.data_parallel_size) if first and prompts else None
    started = time.monotonic()
    answers = answer_all(recipe, model, prompts, tokenizer, stop, Meter(live.show if live else lambda *_: None))
    if first:
        if live:
            live.close()
        fill(lines, answers, tokenizer)
        output, stopped = Path(recipe.generate.output), len(answers) < len(prompts)
        if stopped:  # what there is does not replace an earlier, whole output
            output = output.with_name(f"{output.stem}.stopped{output.suffix}")
        if answers or not stopped:
            write(lines, output)
        _summarise(folder.path / SUMMARY, lines, output, stopped, time.monotonic() - started)
    finish()


def write(lines: list[Line], output: Path) -> None:
    """Write the answers.

    Raises:
        UserError: the disk does not take them; it says where they are kept instead.
    """
    from launcher.engine.generate.records import write_lines
    from launcher.errors import UserError

    try:
        write_lines(lines, output)
    except OSError as error:
        fix = "make room there, and start again"
        with suppress(OSError):
            kept = Path(tempfile.mkdtemp(prefix="yuan-answers-")) / output.name
            write_lines(lines, kept)
            fix = f"the answers are kept in {kept}: make room, and move them"
        raise UserError(f"the answers cannot be written: {error.strerror}", str(output), fix) from error


def load_model(recipe: Recipe):
    """The checkpoint `generate.load` (an iter_ folder) as a model with a cache.

    Raises:
        UserError: the checkpoint is damaged, or does not fit the model at this TP and PP.
    """
    from checkpoints.folder import CheckpointError
    from launcher.engine.checkpoint import load_weights
    from launcher.engine.generate.cache import CachedModel, generation_config
    from launcher.engine.model import build_chunks
    from launcher.errors import UserError

    chunks = build_chunks(recipe, generation_config(recipe))
    checkpoint = Path(recipe.generate.load)
    try:
        load_weights(recipe, chunks, checkpoint)
    except CheckpointError as error:
        raise UserError(str(error), str(checkpoint), error.fix or "give another one: --load RUN_OR_CHECKPOINT") from error
    return CachedModel(recipe, chunks)


class Live:
    """Rank 0's line of progress; its own share stands for those of the other data-parallel ranks."""

    def __init__(self, total: int, replicas: int):
        self.total, self.replicas = total, replicas
        self.terminal = terminal()
        self.on_tty = self.terminal.isatty()
        self.shown = time.monotonic()

    def show(self, answered: int, tokens: int, seconds: float) -> None:
        now = time.monotonic()
        if now - self.shown < (SHOW_S if self.on_tty else SHOW_IN_LOG_S):
            return
        self.shown = now
        answered = min(answered * self.replicas, self.total)
        text = f"answered {answered:,} of {self.total:,}, {tokens * self.replicas / max(seconds, 1e-9):,.0f} tokens/s"
        self._write(f"\r\x1b[2K{text}" if self.on_tty else text + "\n")

    def close(self) -> None:
        if self.on_tty:
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        try:
            self.terminal.write(text)
            self.terminal.flush()
        except (OSError, ValueError):  # the terminal may be closed under us; the job goes on
            pass


def _summarise(path: Path, lines: list, output: Path, stopped: bool, seconds: float) -> None:
    from launcher.engine.generate.answer import NOT_REACHED

    answered = [line for line in lines if line.prompt is not None and line.error is None]
    bad = [line for line in lines if line.error not in (None, NOT_REACHED)]
    summary = {
        "output": str(output),
        "stopped": stopped,
        "answered": len(answered),
        "blank": sum(line.record is None for line in lines),
        "bad": len(bad),
        "first_bad": [[line.number, line.error] for line in bad[:3]],
        "tokens": sum(line.completion_tokens for line in answered),
        "seconds": seconds,
        "sample": [answered[0].prompt, answered[0].output] if answered else None,
    }
    path.write_text(json.dumps(summary), encoding="utf-8")


if __name__ == "__main__":
    run_worker(main)
