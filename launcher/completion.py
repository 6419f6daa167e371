"""Shell completion: the words that can stand at the cursor. No torch, and nothing is loaded but the list of recipes.

Typer's own knows options and verbs, and not that `recipe=34` is a word in zsh and fish but three in bash
(COMP_WORDBREAKS), nor that no space may follow `training.` and `training.seq_length=`.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from launcher.recipe.find import available, describe, folders, in_order
from launcher.recipe.keys import groups, table

SHELL_ENV = "YUAN_COMPLETE"  # which shell asks; the line up to the cursor is the one argument


def answer(app: Any, line: str) -> str:
    """What the asking shell reads: one candidate per line; nothing means files.

    bash replaces the text after the last of COMP_WORDBREAKS alone, and takes a space at the end as meant.
    """
    shell = os.environ[SHELL_ENV]
    words = _split(line)
    found = candidates(app, words)
    if shell == "fish":
        return "\n".join(f"{word}\t{text}" if text else word for word, text in found)
    if shell != "bash":
        return "\n".join(word for word, _ in found)
    breaks = os.environ.get("COMP_WORDBREAKS", "=:")
    kept = 1 + max((words[-1].rfind(sign) for sign in "=:" if sign in breaks), default=-1)
    return "\n".join(word[kept:] + ("" if word.endswith(("=", ".")) else " ") for word, _ in found)


def candidates(app: Any, words: list[str]) -> list[tuple[str, str]]:
    """(word, what it is) for all that the last of `words`, perhaps empty, can become; the first is `yuan`."""
    import typer.main

    *before, current = words[1:] or [""]
    command, rest = _command(typer.main.get_command(app), before)
    if command is None:
        return []
    if rest and _takes_value(command, rest[-1]):
        return _fitting([(word, "") for word in _option_values(rest[-1])], current)
    if hasattr(command, "commands") and not current.startswith("-"):
        verbs = command.list_commands(None)
        return _fitting([(verb, command.commands[verb].short_help or "") for verb in verbs], current)
    if current.startswith("-"):
        options = [(flag, one.help or "") for one in command.params for flag in one.opts if flag.startswith("--")]
        return _fitting([*options, ("--help", "Show this message and exit.")], current)
    return _argument(command, [word for word in rest if not word.startswith("-")], current)


def _command(command: Any, words: list[str]) -> tuple[Any, list[str]]:
    """The verb that the words lead to, None where there is no such verb, and the words that follow it."""
    rest = list(words)
    for word in words:
        if not hasattr(command, "commands"):
            break
        rest.pop(0)
        command = command if word.startswith("-") else command.commands.get(word)
    return command, rest


def _takes_value(command: Any, word: str) -> bool:
    flags = [one for one in command.params if word in one.opts]
    return bool(flags) and not getattr(flags[0], "is_flag", False)


def _option_values(flag: str) -> list[str]:
    """The words that an option takes, where they are few."""
    if flag == "--for":
        from launcher.recipe.check import CHECKS

        return list(CHECKS)
    return ["yaml", "megatron"] if flag == "--as" else []


def _argument(command: Any, before: list[str], current: str) -> list[tuple[str, str]]:
    """What can stand where no option does: recipes, groups, key=value. By the argument's name in the verb's function."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    one = arguments[min(len(before), len(arguments) - 1)] if arguments else None
    if one is None:
        return []
    if one.name == "name":
        return _fitting(_recipes(), current)
    if one.name == "group":
        return _fitting([(group, "") for group in groups() if group != "derived"], current)
    if "=" not in (one.metavar or ""):
        return []
    names = _recipes() if one.metavar.startswith("NAME") and not before else []
    return _fitting(names, current) + _pair(current)


def _pair(current: str) -> list[tuple[str, str]]:
    """key=value words, or recipe=NAME."""
    key, equals, value = current.partition("=")
    if not equals:
        if "." in key:
            return _fitting([(f"{one.name}=", one.doc) for one in table().values() if not one.name.startswith("derived.")], key)
        return _fitting([("recipe=", "A recipe's name"), *((f"{group}.", "") for group in groups() if group != "derived")], key)
    if key == "recipe":
        return [(f"recipe={name}", text) for name, text in _fitting(_recipes(value.rpartition("/")[0]), value)]
    known = table().get(key)
    return [(f"{key}={word}", "") for word, _ in _fitting([(word, "") for word in _values(known.type if known else None)], value)]


def _values(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return list(map(str, get_args(kind)))
    return ["true", "false"] if kind is bool else []


def _recipes(below: str = "") -> list[tuple[str, str]]:
    """Every recipe's name; those `below` a folder of recipes, such as bases, where the word has come so far."""
    if not below:
        return [(name, describe(path)[0]) for name, path in available().items()]
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted((folder / below).glob("*.yaml")):
            found.setdefault(f"{below}/{path.stem}", path)
    return [(name, describe(found[name])[0]) for name in sorted(found, key=in_order)]


def _fitting(offered: list[tuple[str, str]], start: str) -> list[tuple[str, str]]:
    return [(word, text.split("\n")[0]) for word, text in offered if word.startswith(start)]


def _split(line: str) -> list[str]:
    """The line's words as the shell sees them; the last is the one at the cursor, empty after a space."""
    lexer = shlex.shlex(line + "\0", posix=True, punctuation_chars=False)  # the mark keeps an empty last word
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        for word in lexer:
            words.append(word)
    except ValueError:  # a quote that is still open
        words.append(line.split()[-1] if not line.endswith(" ") else "")
    return [word.replace("\0", "") for word in words]
