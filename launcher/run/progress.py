"""What a training run shows and keeps: the live line, metrics.jsonl, validation.jsonl, TensorBoard.

The two .jsonl files are the record; TensorBoard's event files are made from them and are made anew on a resume, because
TensorBoard's own way (`purge_step`) drops the scalars counted in samples along with those counted in steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from launcher import console
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder
from launcher.whole import write_whole

TRAIN_KEYS = (
    "iteration", "train_iters", "consumed_samples", "lm_loss", "learning_rate", "grad_norm", "loss_scale",
    "global_batch_size", "skipped_iterations", "nan_iterations", "iteration_time_ms", "tokens_per_second", "supervised_tokens_per_second",
    "tflops", "memory_gib", "eta_s", "time",
)  # fmt: skip
VALIDATION_KEYS = ("iteration", "consumed_samples", "set", "lm_loss_validation", "ppl", "time")

# Megatron-LM's tags: each also as "<tag> vs samples" over the samples consumed.
TRAIN_TAGS = {
    "learning-rate": "learning_rate",
    "batch-size": "global_batch_size",
    "lm loss": "lm_loss",
    "loss-scale": "loss_scale",
    "grad-norm": "grad_norm",
}

LAST_SETS = {"final validation", "test"}
CLEAR = "\r\x1b[2K"  # back to the line's start, and empty it


class Progress:
    """Rank 0's record of a training run.

    Args:
        folder: the run folder.
        recipe: `logging.tensorboard` turns the event files off.
        terminal: where the lines go; it may be closed under us, the training goes on.
        iteration: the step the training goes on from, 0 for a new one. What a killed run wrote of later steps is
            dropped, so that every step appears once.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, terminal: TextIO, iteration: int):
        self._line = _LiveLine(terminal)
        self._writer = None
        kept = _drop_after(folder.metrics, iteration)
        # The evaluations after the last step are made again, and would stand there twice.
        kept_validation = _drop_after(folder.validation, iteration, lambda record: record["set"] in LAST_SETS)
        if recipe.logging.tensorboard:
            self._writer = _new_writer(folder.tensorboard)
            for record in kept:
                self._train_scalars(record)
            for record in kept_validation:
                self._validation_scalars(record)
        self._metrics = folder.metrics.open("a", encoding="utf-8")
        self._validation = folder.validation.open("a", encoding="utf-8")

    def train(self, record: dict[str, Any]) -> None:
        """Record one logged step; `record` has the keys TRAIN_KEYS (`time` may be left out), times in the unit of
        their name, `tflops` per process, `memory_gib` of this process."""
        record = _complete(record, TRAIN_KEYS)
        _append(self._metrics, record)
        self._train_scalars(record)
        self._line.train(record)

    def step(self, iteration: int) -> None:
        """Show on a live terminal that a step between two logged ones is done; free to call at every step."""
        self._line.step(iteration)

    def validation(self, record: dict[str, Any]) -> None:
        """Record one evaluation: keys VALIDATION_KEYS (`time` may be left out), `set` such as "validation" or "test"."""
        record = _complete(record, VALIDATION_KEYS)
        _append(self._validation, record)
        self._validation_scalars(record)
        self._line.keep(
            f"{record['set']} after step {record['iteration']}: loss {_number(record['lm_loss_validation'], '.4f')}"
            f" | perplexity {_number(record['ppl'], '.4g')}"
        )

    def note(self, text: str) -> None:
        """Print a line that stays, behind a label of 11 columns."""
        self._line.note(text)

    def close(self) -> None:
        self._line.clear()
        self._metrics.close()
        self._validation.close()
        if self._writer:
            self._writer.close()

    def _train_scalars(self, record: dict[str, Any]) -> None:
        for tag, key in TRAIN_TAGS.items():
            self._scalar(tag, record, key)
        if self._writer:
            at = {"global_step": record["iteration"], "walltime": record["time"]}
            self._writer.add_scalar("iteration-time", record["iteration_time_ms"] / 1000, **at)  # Megatron-LM: seconds
            self._writer.add_scalar("throughput", record["tflops"], **at)
            self._writer.flush()

    def _validation_scalars(self, record: dict[str, Any]) -> None:
        name = "test" if record["set"] == "test" else "validation"
        self._scalar(f"lm loss {name}", record, "lm_loss_validation")
        self._scalar(f"lm loss {name} ppl", record, "ppl")

    def _scalar(self, tag: str, record: dict[str, Any], key: str) -> None:
        if self._writer and record[key] is not None:
            self._writer.add_scalar(tag, record[key], record["iteration"], walltime=record["time"])
            self._writer.add_scalar(f"{tag} vs samples", record[key], record["consumed_samples"], walltime=record["time"])


class _LiveLine:
    """On a terminal: kept lines, and under them one that is redrawn with a bar. Elsewhere: kept lines alone."""

    def __init__(self, terminal: TextIO):
        self._terminal: TextIO | None = terminal
        self._live = terminal.isatty()
        self._live_text = ""
        self._drawn = 0.0
        self._last: dict[str, Any] = {}

    def train(self, record: dict[str, Any]) -> None:
        self._last = record
        self.keep(train_line(record, self._columns()))
        self._draw(record["iteration"], record["eta_s"])

    def step(self, iteration: int) -> None:
        if not self._live or not self._last or time.monotonic() - self._drawn < 0.2:
            return
        seconds_since = (iteration - self._last["iteration"]) * self._last["iteration_time_ms"] / 1000
        self._draw(iteration, max(self._last["eta_s"] - seconds_since, 0))

    def keep(self, text: str) -> None:
        self._write(f"{CLEAR}{text}\n{self._live_text}" if self._live else f"{text}\n")

    def note(self, text: str) -> None:
        self.keep(console.labelled(text, self._terminal) if self._terminal else text)

    def clear(self) -> None:
        if self._live:
            self._write(CLEAR)

    def _draw(self, iteration: int, eta_s: float) -> None:
        if not self._live:
            return
        self._drawn = time.monotonic()
        total = self._last["train_iters"]
        share = iteration / max(total, 1)
        text = f" {iteration}/{total} {share:4.0%}  loss {_number(self._last['lm_loss'], '.4f')}  ETA {_duration(eta_s)}"
        # One column short of the width: a full last column makes some terminals wrap.
        width = self._columns() or console.UNKNOWN
        room = min(width - 1 - len(text) - 2, 40)
        bar = f"[{'#' * round(share * room):-<{room}}]" if room >= 10 else ""
        self._live_text = (bar + text)[: width - 1]
        self._write(CLEAR + self._live_text)

    def _columns(self) -> int | None:
        return console.columns(self._terminal, least=1) if self._live and self._terminal else None

    def _write(self, text: str) -> None:
        if self._terminal is None:
            return
        try:
            self._terminal.write(text)
            self._terminal.flush()
        except (OSError, ValueError):  # the terminal was closed, or the pipe's reader is gone
            self._terminal = None


def train_line(record: dict[str, Any], width: int | None = None) -> str:
    """One logged step in one line; where that is longer than `width`, the last parts are left to metrics.jsonl."""
    total = str(record["train_iters"])
    parts = [
        f"step {record['iteration']:{len(total)}}/{total}",
        f"loss {_number(record['lm_loss'], '.4f')}",
        f"lr {_number(record['learning_rate'], '.3e')}",
        f"grad norm {_number(record['grad_norm'], '.3f')}",
        *([f"{record['skipped_iterations']} skipped"] if record["skipped_iterations"] else []),
        f"{_number(record['tokens_per_second'], ',.0f')} tok/s{_supervised(record['supervised_tokens_per_second'])}",
        f"{_number(record['tflops'], '.3g')} TFLOP/s",
        f"{_number(record['memory_gib'], '.1f')} GiB",
        f"ETA {_duration(record['eta_s'])}",
    ]
    while width is not None and len(parts) > 2 and len(" | ".join(parts)) >= width:
        parts.pop()
    return " | ".join(parts)


def _supervised(rate: float | None) -> str:
    return "" if rate is None else f", {rate:,.0f} supervised"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02}:{seconds:02}"


def _complete(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The record in the order of `keys`; JSON knows no NaN and no infinity, they become null."""
    record = {"time": time.time(), **record}
    if set(record) != set(keys):
        missing, unknown = set(keys) - set(record), set(record) - set(keys)
        raise ValueError(f"a record of metrics lacks {sorted(missing)} or has unknown keys {sorted(unknown)}")
    unreal = {key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in unreal else record[key] for key in keys}


def _append(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, allow_nan=False) + "\n")
    file.flush()


def _drop_after(path: Path, iteration: int, also: Callable[[dict], bool] = lambda record: False) -> list[dict[str, Any]]:
    """Keep the lines of a .jsonl file up to `iteration`, and return them; a line torn by a kill goes, and what `also` says."""
    if not path.exists():
        return []
    kept, lines = [], []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["iteration"] <= iteration and not also(record):
            kept.append(record)
            lines.append(line.rstrip("\n") + "\n")
    write_whole(path, "".join(lines))
    return kept


def _new_writer(folder: Path):
    """A TensorBoard writer (torch.utils.tensorboard.SummaryWriter) in a folder cleared of older event files."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    return SummaryWriter(str(folder))
