"""Slurm as far as a batch script meets it: `sbatch`, `srun`, `scontrol`, `squeue` and `scancel`, by the name it is called.

State is in $STANDIN: per job ID.tasks (process ids of the tasks), ID.requeue, ID.code once it has ended for good. A file
ID.limit plays the time limit coming near: every task gets the signal of --signal once, as Slurm does without `B:`.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ.get("STANDIN", "."))
KNOWN = """job-name chdir output open-mode nodes ntasks-per-node gpus-per-node cpus-per-task account partition qos time signal
    requeue no-requeue export exclusive comment""".split()


def options_of(script: str) -> dict[str, str]:
    """The #SBATCH lines before the first command."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            for word in shlex.split(line.removeprefix("#SBATCH ")):
                name, _, value = word.removeprefix("--").partition("=")
                found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


def sbatch(words: list[str]) -> int:
    script = Path(words[-1]).read_text()
    options = options_of(script)
    unknown = set(options) - set(KNOWN)
    if words[:-1] != ["--parsable"] or unknown or options.get("account") == "nobody":
        print(f"sbatch: error: Invalid account or option: {unknown}", file=sys.stderr)
        return 1
    job = str(1 + len(list(STATE.glob("*.sh"))))
    (STATE / f"{job}.sh").write_text(script)
    names = options["export"].split(",")
    env = {name: os.environ[name] for name in names} | {"STANDIN": str(STATE)}
    runner = [sys.executable, __file__, "run", job]
    subprocess.Popen(runner, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    print(f"{job};cluster")
    return 0


def run(words: list[str]) -> int:
    """The life of a job, from start to start to its end."""
    job, options = words[0], options_of((STATE / f"{words[0]}.sh").read_text())
    nodes = int(options["nodes"])
    env = os.environ | {"SLURM_JOB_ID": job, "SLURM_NNODES": options["nodes"], "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]"}
    while True:
        (STATE / f"{job}.tasks").write_text("")
        with open(options["output"].replace("%j", job).replace("%%", "%"), "a" if options["open-mode"] == "append" else "w") as log:
            batch = subprocess.Popen(["bash", STATE / f"{job}.sh"], env=env, cwd=options["chdir"], stdout=log, stderr=log)
            while batch.poll() is None:
                time.sleep(0.05)
                if (STATE / f"{job}.limit").exists():
                    (STATE / f"{job}.limit").unlink()
                    name, _, seconds = options["signal"].partition("@")
                    assert int(seconds) > 0
                    for pid in (STATE / f"{job}.tasks").read_text().split():
                        os.kill(int(pid), getattr(signal, f"SIG{name}"))
        if not (STATE / f"{job}.requeue").exists():
            break
        (STATE / f"{job}.requeue").unlink()
        assert "requeue" in options
    (STATE / f"{job}.code").write_text(str(batch.returncode))
    return 0


def srun(words: list[str]) -> int:
    while words[0].startswith("--"):
        assert words.pop(0).partition("=")[0] in ("--kill-on-bad-exit", "--wait", "--export")
    tasks = []
    for node in range(int(os.environ["SLURM_NNODES"])):
        tasks.append(subprocess.Popen(words, env=os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}))
    (STATE / f"{os.environ['SLURM_JOB_ID']}.tasks").write_text(" ".join(str(task.pid) for task in tasks))
    return max(task.wait() % 256 for task in tasks)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        prefix, first, last = re.fullmatch(r"(.*)\[(\d+)-(\d+)\]", words[2]).groups()
        print("\n".join(f"{prefix}{n}" for n in range(int(first), int(last) + 1)))
    else:
        assert words[0] == "requeue"
        (STATE / f"{words[1]}.requeue").touch()
    return 0


def squeue(words: list[str]) -> int:
    job = words[1].partition("=")[2]
    if (STATE / f"{job}.code").exists():
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    print("RUNNING")
    return 0


if __name__ == "__main__":
    called = Path(sys.argv[0]).name
    if called == "slurm_standin.py":
        called = sys.argv.pop(1)
    sys.exit(globals()[called](sys.argv[1:]))
