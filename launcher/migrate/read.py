"""An old command line, or a script that holds some, into recipes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from launcher.errors import UserError
from launcher.migrate import convert, megatron, mindspore, pai
from launcher.migrate.command import Call, no_such_program, take_apart
from launcher.migrate.result import Migration
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
PARTITIONS = re.compile(r"ckpt_partitions_(51B|102B)\.sh")
SERVERS = re.compile(r"run_inference_server_(2\.1B|51B|102B)\.sh")
OF_YUAN = ["ckpt_partitions_51B.sh", "ckpt_partitions_102B.sh"]
OF_YUAN += [f"run_inference_server_{size}.sh" for size in ("2.1B", "51B", "102B")]
KNOWN = [*POSITIONAL, *OF_YUAN, *WITH_FLAGS]
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
    if not words:
        raise UserError("there is no command", "the command line", "yuan migrate -- sh run_pretrain_megatron_llama.sh dsw …")
    found: list[Migration] = []
    notes: list[str] = []
    if len(words) == 1 and re.search(r"\s", words[0]) and not os.path.exists(words[0]):
        _script(read_script(words[0]), "command", found, notes, 0)
    else:
        _command(Command([word for word in words if word.strip()], 0, {}), found, notes, 0, "")
    _name_apart(found)
    return found, notes


def _command(command: Command, found: list[Migration], notes: list[str], depth: int, script: str) -> bool:
    """Migrate one command; False where it is none that is known. `script` names the file that it stands in."""
    call = take_apart(command)
    name, path = call.basename, Path(call.program)
    if PARTITIONS.fullmatch(name):
        if os.path.isfile(path):
            call.variables |= {
                key: value for key, value in read_script(_text(path)).variables.items() if isinstance(value, str)
            }
        found.append(convert.yuan(call))
    elif name in POSITIONAL:
        call.arguments = [word for word in call.arguments if word != "&"]
        found.append(POSITIONAL[name](call))
        if re.match(r"python", Path(command.words[0]).name) and name.endswith(".sh"):
            notes.append(f"{call.place}: a shell script started with {command.words[0]}, which cannot run it")
    elif name in WITH_FLAGS:
        found.append(WITH_FLAGS[name](call, script))
    elif SERVERS.fullmatch(name) and not os.path.isfile(path):
        found.append(megatron.yuan_server(call, SERVERS.fullmatch(name).group(1)))
    elif depth < DEPTH and os.path.isfile(path) and not name.endswith(".py"):
        variables = dict(call.variables)
        _script(read_script(_text(path), dict(variables), call.arguments), path.stem, found, notes, depth + 1)
    elif not command.line:
        raise no_such_program(call, KNOWN)
    else:
        return False
    return True


def _script(script: Script, name: str, found: list[Migration], notes: list[str], depth: int) -> None:
    notes += [f"{name}, line {line}: {text}" for line, text in script.notes]
    before = len(found)
    file = "" if name == "command" else name
    rest = [one for one in script.commands if not _command(one, found, notes, depth, file)]
    if len(found) == before and depth <= 1:
        names = [take_apart(command).basename for command in script.commands]
        what = f"no command in it can be migrated; it has {', '.join(names) or 'none'}"
        raise UserError(what, name, f"known are: {', '.join(KNOWN)}")
    notes += [f"{name}, line {one.line}: `{' '.join(one.words)[:60]}` is no part of a recipe" for one in rest]


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
