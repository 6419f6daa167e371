"""One old command, taken apart: launcher, program, arguments."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from launcher.errors import UserError
from launcher.migrate.flags import TORCHRUN
from launcher.migrate.result import Line
from launcher.migrate.shell import ASSIGNMENT, Command

UNKNOWN = re.compile(r"\$[A-Za-z0-9_({@*#?$!-]|`|<[A-Za-z][^<>]*>")
SHELLS = {"sh", "bash", "zsh", "dash", "ksh"}
BEGINS = re.compile(r"python[\d.]*|torchrun|\w*sh|.*\.(?:py|sh)")  # what srun starts, behind its own options
BEFORE = {"nohup", "exec", "time", "sudo", "command", "env"}
WITHOUT_VALUE = {"standalone", "use_env", "no_python", "m", "module", "run_path"}
MEETING = {"master_addr", "master_port"}


@dataclass
class Call:
    """A command in its parts.

    Attributes:
        program: the script or Python file, as written.
        arguments: what follows it.
        variables: what the shell knew when it ran.
        launcher: what became of torchrun's own options.
        text: the whole command.
        line: of the script that it stands in; 0 on a command line.
        shell: commands in a text of their own, behind `bash -c` or `eval`.
    """

    program: str
    arguments: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    launcher: list[Line] = field(default_factory=list)
    text: str = ""
    line: int = 0
    shell: str = ""

    @property
    def basename(self) -> str:
        """The program's name without folders."""
        return PurePosixPath(self.program).name

    @property
    def place(self) -> str:
        """Where an error is: the program, and its line in a script."""
        return self.basename + (f", line {self.line}" if self.line else "")


def take_apart(command: Command) -> Call:
    """A command's launcher, program and arguments; `bash`, `python`, `nohup`, `X=1` before it are taken off."""
    words, variables = list(command.words), dict(command.variables)
    launcher: list[Line] = []
    text = shlex.join(command.words)
    while words:
        first = PurePosixPath(words[0]).name
        if first == "eval" or (first in SHELLS and "-c" in words[1:3]):
            inner = " ".join(words[1:]) if first == "eval" else words[words.index("-c") + 1]
            return Call(first, [], variables, launcher, text, command.line, inner)
        if hit := ASSIGNMENT.fullmatch(words[0]):
            variables[hit.group(1)] = hit.group(3)
            words.pop(0)
        elif first in BEFORE:
            words.pop(0)
        elif first == "srun":
            begins = [at for at, word in enumerate(words) if at and BEGINS.fullmatch(PurePosixPath(word).name)]
            words = words[begins[0] :] if begins else words[1:]
            launcher.append(Line("srun", "srun", "", note="dropped: launch.kind=slurm does it"))
        elif first in SHELLS:
            words = _without_options(words[1:])
        elif re.fullmatch(r"python[\d.]*", first):
            words = _without_options(words[1:], keep="-m")
            if words[:1] == ["-m"] and len(words) > 1:
                words = ["torchrun", *words[2:]] if words[1].startswith("torch.distributed.") else words[1:]
        elif first == "torchrun":
            more, words = _launcher(words[1:])
            launcher += more
        elif UNKNOWN.match(words[0]) and any(BEGINS.fullmatch(PurePosixPath(word).name) for word in words[1:]):
            lost = "nothing here sets it: give launch.nproc_per_node and launch.nnodes, if it said them"
            launcher.append(Line("torchrun", words.pop(0), "", lost=lost))
        else:
            break
    program = words[0] if words else ""
    return Call(program, words[1:], variables, launcher, text, command.line)


def _without_options(words: list[str], keep: str = "") -> list[str]:
    while words and words[0].startswith("-") and words[0] != keep:
        words = words[1:]
    return words


def _launcher(words: list[str]) -> tuple[list[Line], list[str]]:
    """torchrun's options as lines, and the words from the script on."""
    given: dict[str, str] = {}
    while words and words[0].startswith("-"):
        name, equals, value = words.pop(0).lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not equals and name not in WITHOUT_VALUE and words:
            value = words.pop(0)
        given[name] = value
    alone = given.get("nnodes", "1") in ("1", "1:1")
    lines = [_launch_line(name, value) for name, value in given.items() if name not in MEETING]
    for line in lines:
        if alone and line.name in ("--node_rank", "--rdzv_endpoint"):
            line.became, line.lost, line.note = {}, "", "dropped: there is one machine"
    if MEETING & given.keys():
        meeting = f"{given.get('master_addr', 'localhost')}:{given.get('master_port', '29500')}"
        if alone:
            note = "dropped: on one machine yuan takes a free port, so that two jobs never meet"
            lines.append(Line("torchrun", "master_addr:port", meeting, note=note))
        else:
            lines.append(Line("torchrun", "master_addr:port", meeting, {"launch.rdzv_endpoint": meeting}, **_fill(meeting)))
    return lines, words


def _launch_line(name: str, value: str) -> Line:
    line = Line("torchrun", f"--{name}", value)
    if name not in TORCHRUN:
        line.note = "dropped: yuan starts and joins the processes itself"
    elif name == "rdzv_endpoint":
        line.became = {TORCHRUN[name]: value}
    elif value.isdigit():
        line.became = {TORCHRUN[name]: int(value)}
    elif hit := re.fullmatch(r"(\d+):(\d+)", value):
        line.became = {TORCHRUN[name]: int(hit.group(2))}
        line.lost = "" if hit.group(1) == hit.group(2) else f"a number of machines that varies; {hit.group(2)} were taken"
    else:
        line.lost = f"its value is known only where it runs: give {TORCHRUN[name]}"
    return line


def _fill(value: str) -> dict[str, str]:
    return {"lost": "its value is known only where it runs"} if UNKNOWN.search(value) else {}


def no_such_program(call: Call, known: list[str]) -> UserError:
    """The error for a command that is none of those that can be migrated."""
    from difflib import get_close_matches

    near = get_close_matches(call.basename, known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(
        f"{call.program or 'this'} is no command that yuan migrates, and no script that is here to be read",
        f"line {call.line}" if call.line else "the old command line",
        f"{hint}known are: {', '.join(known)}; a shell script with one of them in it is read where its path is given",
    )
