"""The schema's keys as a flat table: `training.seq_length` → its type, default and documentation."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from launcher.recipe import schema


@dataclass(frozen=True)
class Key:
    """One key of a recipe. `type` is the type without its Optional."""

    name: str
    type: Any
    optional: bool
    default: Any
    doc: str

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        text = _in_words(self.type)
        return f"{text} or null" if self.optional else text


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list [..] of {get_args(kind)[0].__name__} values"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "any value")


@cache
def groups() -> dict[str, type]:
    """Group name → its dataclass, in the schema's order."""
    hints = get_type_hints(schema.Recipe)
    return {f.name: hints[f.name] for f in fields(schema.Recipe) if is_dataclass(hints[f.name])}


@cache
def table() -> dict[str, Key]:
    """Every key of the schema by its dotted name."""
    docs = _docs()
    keys = {}
    for group, cls in groups().items():
        hints, defaults = get_type_hints(cls), cls()
        for f in fields(cls):
            kind, optional = hints[f.name], False
            if get_origin(kind) is Union and type(None) in get_args(kind):
                kind, optional = next(a for a in get_args(kind) if a is not type(None)), True
            name = f"{group}.{f.name}"
            keys[name] = Key(name, kind, optional or kind is Any, getattr(defaults, f.name), docs[name])
    return keys


def _docs() -> dict[str, str]:
    """The string under each field, read from the schema's source: Python itself does not keep it."""
    class_of = {cls.__name__: group for group, cls in groups().items()}
    docs = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef) or node.name not in class_of:
            continue
        for statement, after in zip(node.body, node.body[1:] + [None]):
            if isinstance(statement, ast.AnnAssign):
                string = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                docs[f"{class_of[node.name]}.{statement.target.id}"] = str(after.value.value) if string else ""
    return docs


def suggest(name: str) -> str:
    """`did you mean ...?` for a key that is not in the schema: the same last part in another group first."""
    leaf = name.rsplit(".", 1)[-1].replace("-", "_")
    same = [key for key in table() if key.endswith(f".{leaf}") and not key.startswith("derived.")]
    if not same:
        known = [key for key in table() if not key.startswith("derived.")]
        leaves = {key.rsplit(".", 1)[-1]: key for key in known}
        same = get_close_matches(name, known, n=3, cutoff=0.8)
        same += [leaves[near] for near in get_close_matches(leaf, leaves, n=2, cutoff=0.75)]
    near = list(dict.fromkeys(same))[:3]
    return f"did you mean {' or '.join(near)}?" if near else "`yuan recipes keys` prints every key"


def yaml_scalar(value: Any) -> str:
    """One value in YAML's flow style on one line, so that YAML and OmegaConf read the same back."""
    if isinstance(value, float):
        return repr(value) if "e" not in repr(value) or "." in repr(value) else repr(value).replace("e", ".0e")
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
