"""What gives a recipe its values: YAML files with their bases, words of the command line, options of a verb.

Each becomes a list of `Given` in the order in which they apply; every fault is collected, none stops the reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.errors import UserError
from launcher.recipe.find import find, label
from launcher.recipe.keys import groups, table


@dataclass(frozen=True)
class Given:
    """One value given for one dotted key. `source` is what `show` prints, `place` also has the line."""

    key: str
    value: Any
    source: str
    place: str


class Unread(UserError):
    """A recipe, or one that it builds on, could not be read: what it says is not known."""


def from_recipe(path: Path, faults: list[UserError], chain: tuple[Path, ...] = ()) -> list[Given]:
    """The values of the recipe at `path`, its bases' first; later ones override earlier ones."""
    if path.resolve() in chain:
        names = " → ".join(label(one) for one in (*chain, path))
        faults.append(Unread(f"recipes build on each other in a circle: {names}", label(path), "remove one `base:`"))
        return []
    lines: dict[str, int] = {}
    content = _read(path, lines, faults)
    given = []
    for base in _bases(content.pop("base", None), path, lines, faults):
        try:
            found = find(base, beside=path)
        except UserError as error:
            faults.append(Unread(error.what, f"{label(path)}:{lines.get('base', 1)}", error.fix))
            continue
        given += from_recipe(found, faults, (*chain, path.resolve()))
    for key, value in _flatten(content):
        line = lines.get(key) or lines.get(key.split(".")[0], 1)
        given.append(Given(key, value, label(path), f"{label(path)}:{line}"))
    return given


def _bases(base: Any, path: Path, lines: dict[str, int], faults: list[UserError]) -> list[str]:
    names = [] if base is None else base if isinstance(base, list) else [base]
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        fix = "write a recipe's name, or a list of names; quote a name made of digits"
        faults.append(Unread(f"base: {wrong[0]!r} is no recipe's name", f"{label(path)}:{lines.get('base', 1)}", fix))
    return [name for name in names if isinstance(name, str)]


def _read(path: Path, lines: dict[str, int], faults: list[UserError]) -> dict[str, Any]:
    """The content of a YAML file as OmegaConf reads it; `lines` gets the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise Unread(
                "a recipe is made of groups of keys", f"{label(path)}:1", "write `training:` and below it `  seq_length: 1024`"
            )
        if _walk(node, "", lines, path, faults):
            text = yaml.serialize(node, Dumper=yaml.SafeDumper)
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        faults.append(
            Unread(
                f"not YAML: {error.problem or error.context}", f"{label(path)}:{line}", "mind indentation, quotes and brackets"
            )
        )
    except Unread as error:
        faults.append(error)
    except OmegaConfBaseException as error:  # an expression that is not closed
        faults.append(Unread(f"this recipe cannot be read: {str(error).splitlines()[0]}", label(path), "close every ${...}, or quote what is none: \\${...}"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        faults.append(Unread(f"this recipe cannot be read: {error}", label(path), "give a YAML file in UTF-8"))
    return {}


def _walk(node: yaml.MappingNode, prefix: str, lines: dict[str, int], path: Path, faults: list[UserError]) -> bool:
    """Note each key's line; True where a key stands twice, which YAML's reader would take silently or refuse alone: then
    the last of them stays in the node."""
    twice, pairs = False, {}
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in lines:
            what = f"{key} is given twice, on lines {lines[key]} and {line}"
            faults.append(UserError(what, f"{label(path)}:{line}", "keep one of them"))
            twice = True
        lines[key] = line
        pairs[key] = (key_node, value_node)
        if isinstance(value_node, yaml.MappingNode) and not prefix:
            twice |= _walk(value_node, f"{key}.", lines, path, faults)
    node.value = list(pairs.values())
    return twice


def _flatten(content: dict[str, Any]) -> list[tuple[str, Any]]:
    flat = []
    for group, keys in content.items():
        if isinstance(keys, dict) and group in groups():
            flat += [(f"{group}.{key}", value) for key, value in keys.items()]
        elif keys is not None or group not in groups():
            flat.append((str(group), keys))
    return flat


def from_words(words: list[str], faults: list[UserError]) -> tuple[list[Given], list[str]]:
    """The values of `key=value` words, and the names of `recipe=NAME` words; where none is named, the first name that was
    meant to be one."""
    given, recipes, meant = [], [], []
    for word in words:
        key, equals, text = word.partition("=")
        if name := _meant_recipe(word):
            meant.append(name)
            what = f"unknown key {key}" if equals else f"{word!r} is not key=value"
            faults.append(UserError(what, "command line", f"did you mean recipe={name}?"))
        elif not equals or not key or word == "recipe=":
            fix = "write key=value, such as training.train_iters=100, or recipe=NAME"
            faults.append(UserError(f"{word!r} is not key=value", "command line", fix))
        elif key == "recipe":
            recipes.append(text)
        else:
            try:
                value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
            except (yaml.YAMLError, OmegaConfBaseException, ValueError):
                fix = f"close brackets and quotes; text with signs in it is quoted twice: '{key}=\"...\"'"
                faults.append(UserError(f"the value of {key} cannot be read: {text}", "command line", fix))
                continue
            given.append(Given(key, _as_typed(key, text, value), "command line", "command line"))
    return given, recipes or meant[:1]


def _meant_recipe(word: str) -> str | None:
    """The recipe that a word seems to mean: `345m`, `recipes/345m.yaml`, `recpie=345m`."""
    key, equals, text = word.partition("=")
    if equals:
        typo = key != "recipe" and "." not in key and key not in groups() and get_close_matches(key.lower(), ["recipe"], cutoff=0.7)
        return text if typo else None
    try:
        find(word)
    except UserError:
        return None
    return word


def _as_typed(key: str, text: str, value: Any) -> Any:
    """Text stays as it was typed where the key holds text: 007 is not 7, and true not True."""
    known = table().get(key)
    if known and known.type is str and isinstance(value, (int, float)):
        return text
    return value
