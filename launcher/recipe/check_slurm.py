"""What a Slurm job says of itself: its time, and values that become words of a script."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from launcher.recipe.problem import Case, Problem

# sbatch's forms that nobody can misread: a bare number is minutes to sbatch and what YAML makes of 12:00:00 (43200)
TIMES = (
    (r"(?P<h>\d+):(?P<m>\d\d):(?P<s>\d\d)", "12:00:00"),
    (r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d\d)(:(?P<s>\d\d))?)?", "2-00:00:00"),
    (r"(?P<m>\d+):(?P<s>\d\d)", "30:00"),
)
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
START_S = 300  # until a run has started, found its checkpoint and taken a step


def slurm(case: Case) -> Iterator[Problem]:
    """The keys of `slurm`, where launch.kind=slurm asks for them."""
    if case.recipe.launch.kind != "slurm":
        return
    spec = case.recipe.slurm
    yield from _time(case)
    if spec.signal_seconds <= 0:
        yield Problem("the run must be told before its time is over", case.at("slurm.signal_seconds"), "slurm.signal_seconds=300")
    for name in spec.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            fix = "names alone: the values are read where the job is submitted"
            yield Problem(f"{name.split('=')[0]!r} with what follows it is no name of a variable", "slurm.environment", fix)
        elif name not in os.environ:
            at, severity = case.at("slurm.environment"), "error" if case.launching else "warning"
            yield Problem(f"the variable {name} is not set here", at, f"export {name}=… where the job is submitted", severity)
    for mount in spec.container_mounts:
        if not all(mount.split(":")[:2]) or len(mount.split(":")) not in (2, 3):
            yield Problem(f"{mount!r} is no mount", case.at("slurm.container_mounts"), "HOST:CONTAINER, both whole paths")
    for option in spec.sbatch_args:
        if not re.match(r"--?[a-zA-Z]", option) or (" " in option and "=" not in option):
            yield Problem(f"{option!r} is no option of sbatch", case.at("slurm.sbatch_args"), "one option each, as '--name=value'")
    yield from _lines(case)


def _time(case: Case) -> Iterator[Problem]:
    time, at = case.recipe.slurm.time, case.at("slurm.time")
    if time is None:
        return
    seconds = seconds_of(time)
    if seconds is None:
        fix = "slurm.time=HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS; in a file in quotes: '12:00:00' is 43200 to YAML without"
        yield Problem(f"{time!r} is no time that can be read in one way only", at, fix)
    elif seconds < case.recipe.slurm.signal_seconds + START_S:
        what = f"{time} is too short: {case.recipe.slurm.signal_seconds} s before its end the run is told to save"
        yield Problem(what, case.at("slurm.time", "slurm.signal_seconds"), "a longer slurm.time, or a smaller slurm.signal_seconds")


def seconds_of(time: str) -> int | None:
    """The seconds of a time limit of sbatch's; None where it is none, or may be read in two ways."""
    for form, _ in TIMES:
        match = re.fullmatch(form, time)
        if match:
            return sum(SECONDS[unit] * int(text) for unit, text in match.groupdict().items() if text)
    return None


def _lines(case: Case) -> Iterator[Problem]:
    """A line break in a value would end its line of the script."""
    spec = case.recipe.slurm
    for key in ("account", "partition", "qos", "container_image"):
        value = getattr(spec, key)
        if value is not None and ("\n" in value or not value.strip()):
            yield Problem(f"slurm.{key} is empty or has a line break", case.at(f"slurm.{key}"), "one line of text")
    for key in ("container_mounts", "sbatch_args"):
        if any("\n" in value for value in getattr(spec, key)):
            yield Problem(f"a value of slurm.{key} has a line break", case.at(f"slurm.{key}"), "one line of text each")
