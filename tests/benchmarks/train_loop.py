"""What the loop around a training step costs: reading samples, agreeing on a stop, lines of metrics, TensorBoard.

A run of fifteen steps of six layers x 384 on random data, every step logged; all that is not inside forward, backward and
update counts as the loop's. Part of `python -m tests.benchmarks.train loop`.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from unittest import mock

from launcher.recipe import load
from tests.benchmarks.train import SHAPES, alone, words_of

STEPS = 15


def main(more: list[str]) -> None:
    import numpy as np

    from data_tools.indexed import IndexedWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = IndexedWriter(Path(folder) / "ids", np.uint16)
        for _ in range(100):
            writer.add_document(np.random.default_rng(0).integers(50000, size=2000))
        writer.finish()
        words = f"data.data_path={folder}/ids data.split=100,0,0 training.train_iters={STEPS} training.eval_iters=0 logging.log_interval=1"
        run(words_of(SHAPES["small"], [*words.split(), f"run.dir={folder}/run", *more]))


def run(words: list[str]) -> None:
    """Train, and tell the share of the time that is not a step's."""
    recipe = load(words).recipe
    alone()
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    from launcher.engine import step, train
    from launcher.run.folder import RunFolder
    from launcher.run.progress import Progress
    from launcher.workers.entry import Stop

    folder = RunFolder(recipe.run.dir)
    folder.path.mkdir(parents=True)
    state = train.build(recipe)
    progress = Progress(folder, recipe, io.StringIO(), 0)
    trainer = train.Trainer(recipe, state, Stop(), progress, lambda *_: None)
    inside, reading = Timed(train.train_step), Timed(step.next_batch)
    with mock.patch.object(train, "train_step", inside), mock.patch.object(step, "next_batch", reading):
        started = time.process_time()
        trainer.run()
        whole = time.process_time() - started
    progress.close()
    loop = whole - inside.seconds + reading.seconds
    print(f"the loop around {STEPS} steps of {whole / STEPS:.2f} s of CPU, every one logged: {loop / whole:.2%} of the CPU time, {reading.seconds / whole:.2%} of it reading")
    finish()


class Timed:
    """A function that adds up the seconds that its calls take."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments, **more):
        started = time.process_time()
        result = self.function(*arguments, **more)
        self.seconds += time.process_time() - started
        return result
