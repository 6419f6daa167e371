"""What `yuan convert` tells of a conversion: before it, while it runs, after it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import typer

from checkpoints.recognise import Found

if TYPE_CHECKING:  # it imports torch
    from checkpoints.formats.base import Source


def plan(source: Source, found: Found, to: str, target: str, precisions: list[str], size: int) -> str:
    """What is about to be done; `size` in bytes."""
    ranks = f", {source.layout or f'TP {found.tensor}'}" if found.tensor * found.pipeline > 1 else ""
    state = source.state
    going = f"training   step {state.iteration:,}, the optimizer's state {state.form}" if state else ""
    return "\n".join(
        [
            f"source     {source.path}: {source.format}{ranks}",
            f"model      {source.model}",
            *([going] if going else []),
            f"target     {target}: {to}, {' and '.join(precisions)}, {size / 1e6:,.1f} MB",
        ]
    )


def errors(of_weights: dict[str, float]) -> str:
    """The errors of quantized weights, a line for each layer."""
    modules = list(dict.fromkeys(name.split(".", 3)[3].removesuffix(".weight").split("linear_")[1] for name in of_weights))
    rows: dict[str, list[str]] = {}
    for name, error in of_weights.items():
        rows.setdefault(name.split(".")[2], []).append(f"{100 * error:6.2f}%")
    head = f"error      |w - scale q| / |w|\n  layer  {'  '.join(f'{one:>7}' for one in modules)}"
    return "\n".join([head, *(f"  {layer:>5}  {'  '.join(row)}" for layer, row in rows.items())])


def grouped(left_out: dict[str, str]) -> dict[str, str]:
    """One line for each reason: how many, or the one name."""
    names: dict[str, list[str]] = {}
    for name, why in left_out.items():
        names.setdefault(why, []).append(name)
    return {all_[0] if len(all_) == 1 else f"{len(all_)} tensors, such as {all_[0]}": why for why, all_ in names.items()}


def next_step(to: str, target: str, training: bool) -> str:
    """What one does with `target`."""
    if to == "hf":
        return f'AutoModelForCausalLM.from_pretrained("{target}")'
    if to == "mindspore":
        return f"yuan inspect {target}; MindFormers: load_checkpoint: {target}, auto_trans_ckpt: False"
    if to in ("yuan", "pai"):
        return f"yuan inspect {target}"
    if training:
        return f"yuan pretrain recipe=... checkpoint.load={target}, at {'any layout' if to == 'torch_dist' else 'its layout'}"
    return f"yuan generate --load {target} --input pred_input.jsonl"


class Meter:
    """Bytes, rate and time left on stderr: a bar on a terminal, elsewhere a line every 10 seconds."""

    def __init__(self, size: int, shares: int = 1):
        """`size` in bytes is that of what is written, then read back; of several shares by whoever is the last."""
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._size, self._total = size, size // shares + (size if shares == 1 else 0)
        self._task = self._bar.add_task("writing", total=self._total)
        self._done, self._kept = 0, 0
        self._last = "writing"
        self._started = self._shown = time.monotonic()

    def show(self, what: str, count: int) -> None:
        """`count` more bytes are written, or checked; or were kept, before it began."""
        if what == "checking" and self._last != what:
            self._total = self._done + self._size
        self._last = what
        self._done += count
        if what == "kept":
            self._kept += count
        self._bar.update(self._task, completed=self._done, total=self._total, description=what)
        now = time.monotonic()
        if not self._bar.console.is_terminal and now - self._shown > 10 and self._done > self._kept:
            self._shown = now
            rate = (self._done - self._kept) / (now - self._started)
            left = (self._total - self._done) / rate
            text = f"{what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    def tell(self, what: str, text: str) -> None:
        """A line above the bar."""
        line = f"{what:<10} {text}"
        self._bar.console.print(line) if self._bar.console.is_terminal else typer.echo(line)

    def __enter__(self) -> Meter:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
