"""Slurm: the script that is written, and a job's whole life under a stand-in for Slurm's commands."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter
from launcher.recipe.check_slurm import seconds_of
from launcher.recipe.load import load
from tests.launcher.engine.runs import SMALL, losses
from tests.launcher.launch.slurm_standin import options_of

STANDIN = Path(__file__).with_name("slurm_standin.py")
YUAN = Path(sys.executable).with_name("yuan")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of the stand-in's state, its commands on the PATH."""
    bin, state = tmp_path / "bin", tmp_path / "state"
    bin.mkdir(), state.mkdir()
    for name in ("sbatch", "srun", "scontrol", "squeue"):
        (bin / name).write_text(f"#!{sys.executable}\nimport runpy, sys\nsys.argv[:1] = [{str(STANDIN)!r}, {name!r}]\nrunpy.run_path({str(STANDIN)!r}, run_name='__main__')\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(state))
    return state


def yuan(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run([YUAN, *words], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def wait_until(there, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_is_told_before_its_limit_saves_is_queued_again_and_completes(small, long_run, slurm):
    words = [*long_run.words, "launch.nnodes=2", "launch.device=cpu"]
    code, out, err = yuan(small, "pretrain", "recipe=small", "run.name=queued", *words, "launch.kind=slurm", "slurm.time=1:00:00")
    assert (code, out) == (0, ""), err
    log = small / "runs" / "queued" / "logs" / "slurm_1.log"
    assert "job        1, submitted from runs/queued/job.sh\n" in err and f"tail -F {log}\n" in err and "scancel 1 " in err

    metrics = small / "runs" / "queued" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"iteration": 30,' in metrics.read_text())
    code, _, err = yuan(small, "pretrain", "recipe=small", "run.name=queued", *words, "launch.kind=slurm")
    assert code == 2 and ("error: this run is with Slurm already: job 1 is RUNNING" in err or "another job is writing this run" in err), err
    (slurm / "1.limit").touch()
    wait_until((slurm / "1.code").exists)
    text = log.read_text()
    assert (slurm / "1.code").read_text() == "0", text
    (stopped,) = set(re.findall(r"pretrain stopped by SIGTERM; the same command goes on from step (\d+)", text))
    assert 30 <= int(stopped) < 120 and f"resuming   from step {stopped}\n" in text
    assert losses(small, "queued") == long_run.curve
    (submitted,) = set(re.findall(r"launch.rdzv_endpoint=(\S+)", (small / "runs" / "queued" / "command.txt").read_text()))
    assert submitted == "127.0.0.1:20001"


@pytest.fixture
def home(tmp_path):
    """A folder with recipe `small`, whose run would start but for nothing."""
    folder = tmp_path / "home"
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes" / "small.yaml").write_text(SMALL)
    writer = IndexedWriter(folder / "ids", np.uint16)
    for _ in range(40):
        writer.add_document(np.arange(100))
    writer.finish()
    return folder


def dry(home, *words):
    """The script and the recipe of a dry run."""
    code, out, err = yuan(home, "pretrain", "recipe=small", "launch.kind=slurm", "--dry-run", *words)
    assert code == 0, err
    _, script, recipe = re.split(r"^# --- .*\n", out, flags=re.M)
    return script, recipe


def test_a_dry_run_shows_the_script_and_writes_nothing(home, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    script, recipe = dry(
        home, "launch.nproc_per_node=2", "launch.device=auto", "slurm.account=it's me", "slurm.time=2-12:00:00", "slurm.partition=a100,h100", "slurm.qos=high",
        "slurm.container_image=/images/my image.sqsh", "slurm.container_mounts=[/data:/data:ro]", "slurm.environment=[WANDB_API_KEY]",
        "slurm.setup=['module load cuda/12', 'echo \"it''s\" $HOME']", "slurm.sbatch_args=[--exclusive,'--comment=two words']", "slurm.signal_seconds=600",
    )  # fmt: skip
    assert not (home / "runs").exists()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    options = options_of(script)
    assert options | {"account": "it's me", "partition": "a100,h100", "qos": "high", "time": "2-12:00:00", "signal": "TERM@600"} == options
    assert options | {"gpus-per-node": "2", "nodes": "1", "ntasks-per-node": "1", "exclusive": "", "comment": "two words"} == options
    assert "cpus-per-task" not in options and "requeue" in options and options["chdir"] == str(home)
    assert options["output"] == f"{home}/runs/small/logs/slurm_%j.log"
    assert set(options["export"].split(",")) >= {"PATH", "WANDB_API_KEY"} and "secret-value" not in script + recipe
    srun = shlex.split(script[script.index("\nsrun") :].split("\ncode=")[0].replace("\\\n", " "))
    assert "--container-image=/images/my image.sqsh" in srun and f"--container-mounts={home}:{home},/data:/data:ro" in srun
    assert "--container-env=WANDB_API_KEY" in srun
    assert srun[-2:] == ["-lc", "module load cuda/12\necho \"it's\" $HOME\nexec yuan pretrain recipe=runs/small/job.yaml launch.kind=torchrun"]


def test_a_job_without_requeue(home):
    script, _ = dry(home, "slurm.requeue=false")
    assert "requeue" not in options_of(script) and "no-requeue" in options_of(script) and "scontrol requeue" not in script


def test_the_submitted_recipe_is_the_checked_one(home, monkeypatch):
    monkeypatch.chdir(home)
    words = ["launch.kind=slurm", "launch.nnodes=4", "training.train_tokens=4096", "optimizer.lr_decay_tokens=2048", "optimizer.lr_warmup_tokens=1024", "run.name=other"]
    _, recipe = dry(home, *words)
    (home / "again.yaml").write_text(recipe)
    before, after = load(["recipe=small", *words]).recipe, load(["recipe=again.yaml"]).recipe
    assert after == before and after.launch.device == "cpu"


def test_a_job_runs_on_gpus_though_it_is_submitted_from_a_machine_without():
    recipe = load(["recipe=345m_1dp", "launch.kind=slurm"]).recipe
    assert (recipe.derived.device, recipe.training.precision) == ("cuda", "fp16")


def test_a_variable_that_is_not_set_here_may_be_set_where_the_job_is_submitted(home):
    words = ["recipe=small", "launch.kind=slurm", "slurm.environment=[NO_SUCH_VARIABLE]"]
    code, out, err = yuan(home, "pretrain", *words, "--dry-run")
    assert code == 0 and "warning: the variable NO_SUCH_VARIABLE is not set here" in err
    assert "NO_SUCH_VARIABLE" in next(line for line in out.splitlines() if "--export=" in line)


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("slurm.time=720", "'720' is no time that can be read in one way only"),
        ("slurm.time=tomorrow", "'tomorrow' is no time"),
        ("slurm.time=00:08:00", "00:08:00 is too short: 300 s before its end the run is told to save"),
        ("slurm.environment=[NO_SUCH_VARIABLE]", "the variable NO_SUCH_VARIABLE is not set here"),
        ("slurm.environment=[TOKEN=secret]", "'TOKEN' with what follows it is no name of a variable"),
        ("slurm.container_mounts=[/data]", "'/data' is no mount"),
        ("slurm.sbatch_args=[exclusive]", "'exclusive' is no option of sbatch"),
        ("slurm.signal_seconds=0", "the run must be told before its time is over"),
        ('slurm.account="a\\nb"', "slurm.account is empty or has a line break"),
    ],
)
def test_what_a_job_cannot_be_is_said_before_it_is_submitted(home, word, what):
    code, _, err = yuan(home, "pretrain", "recipe=small", "launch.kind=slurm", word)
    assert code == 2 and f"error: {what}" in err and "secret" not in err, err
    assert not (home / "runs").exists()


@pytest.mark.parametrize(("time", "seconds"), [("12:00:00", 43200), ("2-00:00:00", 172800), ("1-12", 129600), ("30:00", 1800), ("45", None)])
def test_times(time, seconds):
    assert seconds_of(time) == seconds


def test_without_slurm(home, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = yuan(home, "pretrain", "recipe=small", "launch.kind=slurm", "launch.device=cpu")
    assert code == 2 and "error: sbatch is not on the PATH: this machine has no Slurm\n  where: launch.kind=slurm\n" in err


def test_what_sbatch_says_is_shown(home, slurm):
    code, _, err = yuan(home, "pretrain", "recipe=small", "launch.kind=slurm", "slurm.account=nobody")
    assert code == 2 and "error: sbatch refused the job: sbatch: error: Invalid account or option" in err
    assert "where: runs/small/job.sh" in err


def test_a_finished_job_may_be_followed_by_another(home, slurm):
    folder = home / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "job_id.txt").write_text("7\n")
    words = ["pretrain", "recipe=small", "launch.kind=slurm", "slurm.setup=[exit 4]"]
    code, _, err = yuan(home, *words)
    assert code == 2 and "error: this run is with Slurm already: job 7 is RUNNING\n" in err and "scancel 7" in err
    (slurm / "7.code").touch()
    code, _, err = yuan(home, *words)
    assert code == 0 and "job        1, submitted" in err
    wait_until((slurm / "1.code").exists)
    assert (slurm / "1.code").read_text() == "4"


def test_a_job_stopped_before_its_first_step_is_not_queued_again(home, slurm):
    code, _, err = yuan(home, "pretrain", "recipe=small", "launch.kind=slurm", "slurm.setup=[exit 3]")
    assert code == 0, err
    wait_until((slurm / "1.code").exists)
    assert (slurm / "1.code").read_text() == "3"
    assert "not queued again: no step was saved since this start" in (home / "runs" / "small" / "logs" / "slurm_1.log").read_text()
