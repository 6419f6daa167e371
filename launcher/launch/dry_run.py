"""What a launch would run, as text: the commands of this machine's processes or the batch script, and the recipe."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from omegaconf import OmegaConf

from launcher.launch.machines import Alone, meeting_point
from launcher.launch.slurm import RECIPE, SCRIPT, job_recipe, script
from launcher.launch.torchrun import commands
from launcher.recipe.load import Loaded
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder
from launcher.workers.entry import PARENT_ENV

PORT = 29500  # stands for the free one that a start finds


def dry_run(loaded: Loaded, folder: RunFolder, worker: Path, verb: str) -> str:
    """All that a start would run and read; nothing is started or written."""
    if loaded.recipe.launch.kind == "slurm":
        return _slurm(loaded, folder, verb)
    recipe = OmegaConf.to_yaml(OmegaConf.structured(loaded.recipe))
    return f"{_processes(loaded.recipe, folder, worker)}\n# --- {folder.recipe}\n{recipe}"


def _slurm(loaded: Loaded, folder: RunFolder, verb: str) -> str:
    parts = [f"# sbatch {shlex.quote(str(folder.path / SCRIPT))}", f"# --- {folder.path / SCRIPT}"]
    parts += [script(loaded.recipe, folder, verb), f"# --- {folder.path / RECIPE}", job_recipe(loaded)]
    return "\n".join(parts)


def _processes(recipe: Recipe, folder: RunFolder, worker: Path) -> str:
    """Lines for a shell: what all processes share, one command per rank, and torchrun's command that does the same."""
    launch = recipe.launch
    machine = Alone(PORT)
    if launch.nnodes > 1:
        machine.address, machine.interface = meeting_point(recipe)[0], None
    ranks = {rank: (words, _set_by_us(environment)) for rank, (words, environment) in commands(recipe, folder.recipe, worker, machine).items()}
    environments = [environment for _, environment in ranks.values()]
    common = {name: value for name, value in environments[0].items() if all(one.get(name) == value for one in environments)}
    own = ("RANK", "LOCAL_RANK")
    lines = [f"cd {shlex.quote(str(Path.cwd()))}", f"export {_assignments({n: v for n, v in common.items() if n not in own})}"]
    for words, environment in ranks.values():
        lines.append(f"{_assignments({name: environment[name] for name in own})} {shlex.join(words)} &")
    lines.append("wait")
    where = f" on machine {launch.node_rank} of {launch.nnodes}" if launch.nnodes > 1 else ""
    torchrun = ["torchrun", f"--nnodes={launch.nnodes}", f"--node-rank={launch.node_rank}", f"--nproc-per-node={launch.nproc_per_node}"]
    torchrun += [f"--master-addr={machine.address}", f"--master-port={PORT}", str(worker), str(folder.recipe)]
    note = [f"# what runs{where} (a free port stands for {PORT}; yuan also watches over them, and restarts them)"]
    return "\n".join([*note, *lines, f"# in the same environment, by torchrun: {shlex.join(torchrun)}"]) + "\n"


def _set_by_us(environment: dict[str, str]) -> dict[str, str]:
    """What a rank's environment has that this one has not."""
    return {n: v for n, v in environment.items() if n != PARENT_ENV and (n in ("RANK", "LOCAL_RANK") or os.environ.get(n) != v)}


def _assignments(environment: dict[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
