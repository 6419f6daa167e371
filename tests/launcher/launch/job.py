"""A job of the tests: `job.py RUN_DIR SCENARIO [key=value ...]` launches worker.py on two ranks as a verb would."""

import sys
from pathlib import Path

from launcher.cli import print_errors
from launcher.errors import UserError
from launcher.launch import connection, processes
from launcher.launch.torchrun import launch
from launcher.recipe.schema import Recipe
from launcher.run.folder import open_run


def main(run_dir: str, scenario: str, *settings: str) -> int:
    if scenario == "first_raises_other_hangs":
        processes.GRACE_S = 1.0
    if scenario in ("silent", "until_told"):
        processes.GRACE_S, connection.SILENCE_S = 1.0, 3.0
    recipe = Recipe()
    recipe.run.dir, recipe.run.name, recipe.derived.device = run_dir, scenario, "cpu"
    recipe.launch.nproc_per_node, recipe.launch.cpu_threads = 2, 1
    named = dict(setting.split("=") for setting in settings)
    verb = named.pop("verb", "pretrain")
    for key, value in named.items():
        setattr(recipe.launch, key, int(value) if value.isdigit() else value)
    try:
        folder = open_run(recipe, {}, ["yuan", verb, scenario])
        if scenario == "impatient":
            recipe.parallel.distributed_timeout_minutes = 0.05
        return launch(recipe, folder, Path(__file__).with_name("worker.py"), verb)
    except UserError as error:
        print_errors(error)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
