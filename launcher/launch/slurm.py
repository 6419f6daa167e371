"""A run as a Slurm job: the batch script, and its submission.

One task per machine runs `yuan pretrain` on the recipe as it was checked (job.yaml), as one would type it on several
machines. What the script leaves to whom:
- Slurm's --signal without `B:` sends SIGTERM to the tasks, which are `yuan` itself, on every machine. A trap in the
  script would have to go through srun, which answers SIGTERM by ending the step; and a script with a trap would queue
  again a job that a person cancelled.
- `yuan` passes the signal on to its ranks, they save, and exit code 3 tells the script to queue the job again.
- The launchers notice a machine that fails (launcher.launch.machines): srun must not kill the others while they save,
  nor because one ended some seconds before them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from launcher.errors import UserError
from launcher.launch.torchrun import STOPPED
from launcher.recipe.load import Loaded
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder
from launcher.whole import write_whole

SCRIPT, RECIPE, JOB = "job.sh", "job.yaml", "job_id.txt"
# A job gets these of its submitter's environment and those that slurm.environment names, and no others.
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "USER")


def submit(loaded: Loaded, folder: RunFolder, verb: str) -> str:
    """Write the job's script and recipe into the run folder and submit it.

    Returns:
        What the user wants to know of it, in lines: its number, its logs, how to watch and stop it.

    Raises:
        UserError: sbatch is not there or refuses, or the run waits in the queue already.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        fix = "submit from a machine of the cluster; --dry-run shows the script; launch.kind=torchrun runs it here"
        raise UserError("sbatch is not on the PATH: this machine has no Slurm", "launch.kind=slurm", fix)
    _refuse_queued(folder)
    write_whole(folder.path / RECIPE, job_recipe(loaded))
    path = folder.path / SCRIPT
    write_whole(path, script(loaded.recipe, folder, verb))
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise UserError(f"sbatch refused the job: {said}", str(path), "mend the keys of slurm.* and launch.* that it names")
    job = done.stdout.strip().split(";")[0]
    write_whole(folder.path / JOB, job + "\n")
    log = _log(folder).replace("%j", job)
    return "\n".join(
        [
            f"job        {job}, submitted from {path}",
            f"logs       {log}, {folder.logs}/rank_*.log",
            f"watch      squeue --jobs={job}; tail -F {shlex.quote(log)}",
            f"stop       scancel {job}    (it saves a checkpoint if that takes less than Slurm's KillWait, often 30 s)",
        ]
    )


def script(recipe: Recipe, folder: RunFolder, verb: str) -> str:
    """The batch script; nothing is written."""
    options = "\n".join(f"#SBATCH {_quoted(option)}" for option in _options(recipe, folder))
    several, tracker = recipe.launch.nnodes > 1, shlex.quote(str(folder.checkpoints / "latest_checkpointed_iteration.txt"))
    meet = ""
    if several:
        # Two jobs that share a machine have numbers near each other, and so different ports; below those the kernel gives out.
        meet = '\nfirst=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\nendpoint=$first:$((20000 + SLURM_JOB_ID % 12000))\n'
    lines = f"""\
#!/bin/bash
# Written by yuan. `yuan {verb} … launch.kind=slurm` submits it; by hand: sbatch {shlex.quote(str(folder.path / SCRIPT))}
{options}
{meet}
# srun has stopped taking this from sbatch by itself
[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
before=$(cat {tracker} 2>/dev/null)

{shlex.join(_srun(recipe))} \\
  {_task(recipe, folder, verb)}{' yuan "$endpoint"' if several else ""}
code=$?
"""
    if recipe.slurm.requeue:
        lines += f"""
# {STOPPED}: a signal ended the run in good order, before the time limit or for a preemption; it goes on from what it saved
if [ "$code" -eq {STOPPED} ]; then
  if [ "$(cat {tracker} 2>/dev/null)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "not queued again: no step was saved since this start; is slurm.time too short?" >&2
  fi
fi
"""
    return lines + 'exit "$code"\n'


def job_recipe(loaded: Loaded) -> str:
    """What was given for this run, as a recipe of its own: editing the recipes meanwhile does not change a waiting job."""
    recipe = OmegaConf.to_container(OmegaConf.structured(loaded.recipe))
    given: dict[str, dict] = {}
    for key, source in loaded.sources.items():
        group, leaf = key.split(".")
        if source not in ("default", "derived"):
            given.setdefault(group, {})[leaf] = recipe[group][leaf]
    given.setdefault("run", {}).update(recipe["run"])
    given.setdefault("launch", {})["device"] = loaded.recipe.derived.device  # auto was answered for the cluster
    return f"# {loaded.name}, as it was submitted\n{OmegaConf.to_yaml(OmegaConf.create(given))}"


def _options(recipe: Recipe, folder: RunFolder) -> list[str]:
    launch, slurm = recipe.launch, recipe.slurm
    options = [
        f"--job-name={recipe.run.name}",
        f"--chdir={Path.cwd()}",
        f"--output={_log(folder)}",
        "--open-mode=append",  # a job that is queued again goes on with its log
        f"--nodes={launch.nnodes}",
        "--ntasks-per-node=1",
    ]
    if recipe.derived.device == "cuda" and not _given(slurm.sbatch_args, "--gres", "--gpus", "--gpus-per-node", "-G"):
        options.append(f"--gpus-per-node={launch.nproc_per_node}")
    if not _given(slurm.sbatch_args, "--exclusive", "--cpus-per-task", "--cpus-per-gpu", "-c"):
        # Slurm's own default is one core for all of a machine's processes and their data loaders
        per_rank = launch.cpu_threads or 1 if recipe.derived.device == "cpu" else 2 + (recipe.data.num_workers or 0)
        options.append(f"--cpus-per-task={launch.nproc_per_node * per_rank}")
    for name in ("account", "partition", "qos", "time"):
        value = getattr(slurm, name)
        options += [f"--{name}={value}"] if value is not None else []
    options.append(f"--signal=TERM@{slurm.signal_seconds}")
    options.append("--requeue" if slurm.requeue else "--no-requeue")
    names = [name for name in ENVIRONMENT if name in os.environ]
    options.append("--export=" + ",".join(dict.fromkeys([*names, *slurm.environment])))
    return options + list(slurm.sbatch_args)


def _srun(recipe: Recipe) -> list[str]:
    slurm = recipe.slurm
    words = ["srun", "--kill-on-bad-exit=0", "--wait=0", "--export=ALL"]
    if slurm.container_image:
        here = str(Path.cwd())
        mounts = [f"{here}:{here}"]
        run = Path(recipe.run.dir)
        if run.is_absolute() and not run.is_relative_to(here):
            mounts.append(f"{run}:{run}")
        words += [f"--container-image={slurm.container_image}", f"--container-workdir={here}"]
        words.append("--container-mounts=" + ",".join(dict.fromkeys([*mounts, *slurm.container_mounts])))
        words += [f"--container-env={','.join(slurm.environment)}"] if slurm.environment else []
    return words


def _task(recipe: Recipe, folder: RunFolder, verb: str) -> str:
    """What every machine runs, as one quoted word for bash, which srun starts."""
    yuan = ["yuan"] if recipe.slurm.container_image else [sys.executable, "-m", "launcher.cli"]
    command = shlex.join([*yuan, verb, f"recipe={folder.path / RECIPE}", "launch.kind=torchrun"])
    if recipe.launch.nnodes > 1:
        command += ' "launch.node_rank=$SLURM_NODEID" "launch.rdzv_endpoint=$1"'
    # exec: the task that Slurm signals is then yuan itself. A login shell where there are setup lines: it knows `module`.
    shell = "bash -lc" if recipe.slurm.setup else "bash -c"
    return f"{shell} {shlex.quote(chr(10).join([*recipe.slurm.setup, f'exec {command}']))}"


def _quoted(option: str) -> str:
    """An option as a shell's word, which is also how sbatch reads its lines."""
    name, equals, value = option.partition("=")
    return name + equals + (shlex.quote(value) if value else "")


def _given(arguments: list[str], *options: str) -> bool:
    return any(re.split(r"[=\s]", one, maxsplit=1)[0] in options for one in arguments)


def _log(folder: RunFolder) -> str:
    """The job's own log, %j standing for its number."""
    return str(folder.logs.absolute()).replace("%", "%%") + "/slurm_%j.log"


def _refuse_queued(folder: RunFolder) -> None:
    """Refuse a second job for the run while Slurm has its first one."""
    squeue, path = shutil.which("squeue"), folder.path / JOB
    if squeue is None or not path.is_file():
        return
    job = path.read_text(encoding="utf-8").strip()
    asked = subprocess.run([squeue, "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True)
    state = asked.stdout.strip()
    if asked.returncode == 0 and state:  # a job that Slurm has forgotten is an error to squeue
        fix = f"wait for it, or take it back: scancel {job}, or start another run with run.name=NAME"
        raise UserError(f"this run is with Slurm already: job {job} is {state}", str(path), fix)
