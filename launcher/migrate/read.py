"""An old command line, or a script that holds some, into recipes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from launcher.errors import UserError
from launcher.migrate import convert, megatron, mindspore, pai, slurm
from launcher.migrate.command import Call, no_such_program, take_apart
from launcher.migrate.result import Line, Migration
from launcher.migrate.shell import Command, Script, read_script

POSITIONAL: dict[str, Callable[[Call], Migration]] = {
    "run_pretrain_megatron_llama.sh": pai.pretrain,
    "run_finetune_megatron_llama.sh": pai.finetune,
    "run_text_generation_megatron_llama.sh": pai.generate,
    "run_ds_train_huggingface_llama.sh": pai.deepspeed,
    "model_convertor.sh": convert.pai,
    "hf2megatron_convertor.sh": convert.pai,
    "hf2mcore_convertor.sh": convert.pai_mcore,
    "ckpt_convert.sh": mindspore.mindspore,
    "ckpt_convert_for_16p.sh": mindspore.mindspore,
    "ckpt_convert_n_to_m.sh": mindspore.mindspore,
}
WITH_FLAGS: dict[str, Callable[[Call, str], Migration]] = {
    "pretrain_gpt.py": megatron.pretrain,
    "pretrain_yuan.py": megatron.pretrain,
    "run_text_generation_server.py": megatron.serve,
    "preprocess_data.py": megatron.preprocess,
    "split_tp_partitions.py": convert.yuan_tool,
    "merge_pp_partitions.py": convert.yuan_tool,
    "merge_tp_partitions.py": convert.yuan_tool,
    "convert_hf.py": convert.yuan_tool,
}
TRAINERS = re.compile(r"pretrain_(?:gpt\w*|yuan\w*|(?:megatron_|mcore_)?llama\w*)\.py")  # the same flags, under other names
PARTITIONS = re.compile(r"ckpt_partitions_(51B|102B)\.sh")
SERVERS = re.compile(r"run_inference_server_(2\.1B|51B|102B)\.sh")
OF_YUAN = ["ckpt_partitions_51B.sh", "ckpt_partitions_102B.sh"]
OF_YUAN += [f"run_inference_server_{size}.sh" for size in ("2.1B", "51B", "102B")]
KNOWN = [*POSITIONAL, *OF_YUAN, *WITH_FLAGS]
ON_GPUS = ("pretrain", "sft", "generate", "serve")  # all of these programs need them, but for trials over gloo
ASSUMED = {"launch.device": "cuda", "launch.gpu_memory_gib": 80}
DEPTH = 3  # scripts that call scripts


def migrate(words: list[str]) -> tuple[list[Migration], list[str]]:
    """Read an old command.

    Args:
        words: the command as a shell hands it on; or one word that is a script's path, or the text of commands.

    Returns:
        One migration per command found, and what of a script was left out, with its line.

    Raises:
        UserError: nothing in it can be migrated, or an argument has a value that it cannot have.
    """
    words = [word for word in words if word.strip()]
    if not words:
        raise UserError("there is no command", "the command line", "yuan migrate -- sh run_pretrain_megatron_llama.sh dsw …")
    finder = _Finder()
    if len(words) == 1 and re.search(r"\s", words[0]) and not os.path.exists(words[0]):
        finder.script(words[0], "the text given", read_script(words[0]))
    else:
        finder.command(Command(words))
    _name_apart(finder.found)
    for one in finder.found:
        if one.verb in ON_GPUS and not any((line.name, line.value) == ("--distributed-backend", "gloo") for line in one.lines):
            one.lines.append(Line("assumed", "GPU", "", dict(ASSUMED), note="the old command does not say what its GPUs are"))
    return finder.found, finder.notes


class _Finder:
    """Walks through scripts and the scripts that they call.

    Attributes:
        found: a migration for each command that is known.
        notes: what was left out.
        files: the scripts that are being read, the outermost first.
        slurm: what the outermost script's #SBATCH lines say.
    """

    def __init__(self) -> None:
        self.found: list[Migration] = []
        self.notes: list[str] = []
        self.files: list[str] = []
        self.slurm: list[Line] = []

    def command(self, command: Command) -> bool:
        """Migrate one command; False where it is none that is known."""
        call = take_apart(command)
        path, name = Path(call.program), call.basename
        if call.shell:
            self.script(call.shell, "", read_script(call.shell, call.variables))
        elif not self._known(call, name, path):
            if len(self.files) >= DEPTH or not os.path.isfile(path) or name.endswith(".py"):
                if command.line:
                    return False
                raise no_such_program(call, KNOWN)
            given = {key: value for key, value in call.variables.items() if key in command.inherited or not command.line}
            text = _text(path)
            self.script(text, path.stem, read_script(text, given, call.arguments))
        return True

    def _known(self, call: Call, name: str, path: Path) -> bool:
        """Whether the program is one of those that are migrated without reading on; then it is."""
        handler = WITH_FLAGS.get(name) or (megatron.pretrain if TRAINERS.fullmatch(name) else None)
        if PARTITIONS.fullmatch(name):
            inside = read_script(_text(path)).variables if os.path.isfile(path) else {}
            call.variables |= {key: value for key, value in inside.items() if isinstance(value, str)}
            self.found.append(convert.yuan(call))
        elif name in POSITIONAL:
            self.found.append(POSITIONAL[name](call))
            if call.text.startswith("python"):
                self.notes.append(f"{call.place}: a shell script started with python, which cannot run it")
        elif handler:
            call.launcher = slurm.joined(self.slurm, call.launcher)
            self.found.append(handler(call, next((file for file in reversed(self.files) if file), "")))
        elif SERVERS.fullmatch(name) and not os.path.isfile(path):
            self.found.append(megatron.yuan_server(call, SERVERS.fullmatch(name).group(1)))
        else:
            return False
        return True

    def script(self, text: str, name: str, script: Script) -> None:
        """Every command of a script; `name` is its file's, or empty for `bash -c` and `eval`."""
        where = name or "bash -c"
        self.notes += [f"{where}, line {line}: {note}" for line, note in script.notes]
        self.slurm = self.slurm or slurm.directives(text)
        before, outermost = len(self.found), not self.files
        self.files.append("" if name == "the text given" else name)
        rest = [one for one in script.commands if not self.command(one)]
        self.files.pop()
        if len(self.found) == before and outermost:
            names = [take_apart(command).basename for command in script.commands]
            what = f"no command in it can be migrated; it has {', '.join(names) or 'none'}"
            left = "".join(f"; line {line}: {note}" for line, note in script.notes)
            fix = "a command in a loop or function is migrated by itself: yuan migrate 'torchrun … pretrain_gpt.py …'; " if left else ""
            raise UserError(what + left, where, f"{fix}known are: {', '.join(KNOWN)}")
        self.notes += [f"{where}, line {one.line}: `{' '.join(one.words)[:60]}` is no part of a recipe" for one in rest]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the script cannot be read: {error}", str(path), "give a shell script's path") from None


def _name_apart(found: list[Migration]) -> None:
    """Several commands of one script do not write one recipe."""
    seen: dict[str, int] = {}
    for one in found:
        seen[one.name] = seen.get(one.name, 0) + 1
        if seen[one.name] > 1:
            one.name += f"_{seen[one.name]}"
