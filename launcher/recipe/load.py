"""Words of a command line → one typed, resolved recipe that knows where each value came from."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from math import ceil, floor, isfinite
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.errors import UserError, raise_all
from launcher.recipe.device import on_gpu, resolve_device
from launcher.recipe.find import find
from launcher.recipe.keys import Key, groups, suggest, table, yaml_scalar
from launcher.recipe.layers import Given, Unread, from_recipe, from_words
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Recipe

ALTERNATIVES = (
    ("training.train_iters", "training.train_samples", "training.train_tokens", "training.epochs"),
    ("optimizer.lr_decay_iters", "optimizer.lr_decay_samples", "optimizer.lr_decay_tokens"),
    ("optimizer.lr_warmup_iters", "optimizer.lr_warmup_samples", "optimizer.lr_warmup_tokens", "optimizer.lr_warmup_fraction"),
    ("optimizer.lr_wsd_decay_iters", "optimizer.lr_wsd_decay_samples", "optimizer.lr_wsd_decay_tokens"),
    ("parallel.zero", "parallel.use_distributed_optimizer"),
)

OmegaConf.register_resolver("on_gpu", on_gpu, replace=True)


@dataclass
class Loaded:
    """A recipe ready to use.

    Attributes:
        recipe: typed and resolved: derived values are filled.
        sources: for every dotted key, where its value came from: a recipe's file, `command line`, an option
            such as `--input`, a file of the checkpoint that a training starts from, `derived` or `default`.
        name: the recipe's name, without folder and suffix.
        faults: what is wrong with single keys; others' values, or defaults, stand for theirs. Empty unless asked for.
    """

    recipe: Recipe
    sources: dict[str, str]
    name: str
    faults: tuple[UserError, ...] = ()


def load(
    words: list[str], options: dict[str, tuple[object, str]] | None = None, default: str | None = None, checked: bool = False
) -> Loaded:
    """Compose a recipe.

    Args:
        words: `recipe=NAME` and `key=value` as typed on the command line; the last of a key wins.
        options: dotted key → (value, flag), from a verb's own options; they override everything, None is skipped.
        default: the recipe to take where the words name none; "" where none is needed.
        checked: the caller goes on to `check` or `ensure`: faults of single keys are left in `Loaded.faults`, to be told
            together with those that the rules find.

    Raises:
        UserError: with every fault at once: unknown recipes and keys, wrong types, keys given twice.
    """
    faults: list[UserError] = []
    words_given, names = from_words(words, faults)
    if len(names) > 1:
        faults.append(
            Unread(  # which of them is meant is not known
                f"two recipes are named: {' and '.join(names)}", "command line", "name one; a recipe's `base:` joins several"
            )
        )
    path, given = _named(names[-1] if names else default, faults)
    given += words_given
    given += [Given(key, value, flag, flag) for key, (value, flag) in (options or {}).items() if value is not None]

    config, sources = _apply(given, faults)
    recipe = _typed(config, sources, faults)
    if not checked or any(isinstance(fault, Unread) for fault in faults):
        raise_all(faults)
    if recipe.checkpoint.load:
        from launcher.recipe.start import take

        take(recipe, sources, path.stem)
    resolve(recipe, sources, path.stem)
    return Loaded(recipe, sources, path.stem, tuple(faults))


def _named(name: str | None, faults: list[UserError]) -> tuple[Path, list[Given]]:
    """The file of the recipe and what it gives."""
    if name is None:
        faults.append(Unread("no recipe is named", "command line", "add recipe=NAME; `yuan recipes list` shows them all"))
        return Path(), []
    if not name:
        return Path(), []
    try:
        path = find(name)
    except UserError as error:
        faults.append(Unread(error.what, error.where, error.fix))
        return Path(), []
    return path, from_recipe(path, faults)


def _apply(given: list[Given], faults: list[UserError]) -> tuple[DictConfig, dict[str, str]]:
    config = OmegaConf.structured(Recipe)
    sources = dict.fromkeys(table(), "default")
    for one in given:
        for other in _displaced(one, sources):
            OmegaConf.update(config, other, table()[other].default)
            sources[other] = "default"
        key = table().get(one.key)
        if key is None:
            faults.append(_unknown(one))
        elif one.key.startswith("derived."):
            fix = "leave it out: it follows from other keys, and `yuan recipes show` prints it"
            faults.append(UserError(f"{one.key} cannot be given", one.place, fix))
        else:
            try:
                OmegaConf.update(config, one.key, _whole(key, one.value))
                sources[one.key] = one.source
            except OmegaConfBaseException:
                faults.append(_wrong_type(key, one.value, one.place))
    return config, sources


def _displaced(one: Given, sources: dict[str, str]) -> list[str]:
    """Alternatives of the key that an earlier layer gave: train_tokens on the command line puts a recipe's train_iters aside.

    Two alternatives from one place both stay, and `check` refuses them.
    """
    others = [key for group in ALTERNATIVES if one.key in group for key in group if key != one.key]
    return [key for key in others if one.value is not None and sources[key] not in ("default", one.source)]


def _unknown(one: Given) -> UserError:
    if one.key in groups():
        fix = f"give its keys, such as {next(key for key in table() if key.startswith(one.key + '.'))}=…"
        return UserError(f"{one.key} is a group of keys, not a value", one.place, fix)
    near = get_close_matches(one.key, groups(), n=1) if "." not in one.key else []
    if near and isinstance(one.value, dict):
        return UserError(f"unknown group {one.key}", one.place, f"did you mean {near[0]}?")
    return UserError(f"unknown key {one.key}", one.place, suggest(one.key))


def _wrong_type(key: Key, value: Any, place: str) -> UserError:
    shown = "null" if value is None else repr(value)
    return UserError(f"{key.name} must be {key.expected}, not {shown}", place, _right_type(key, value))


def _right_type(key: Key, value: Any) -> str:
    """What to write instead: the nearest choice, or a value of the type."""
    if value is None:
        return f"leave it out for the default, {yaml_scalar(key.default)}"
    if get_origin(key.type) is Literal:
        choices = {str(choice).lower(): choice for choice in get_args(key.type)}
        typed = str(value).lower()
        near = [one for one in choices if one.startswith(typed)][:1] or get_close_matches(typed, choices, n=1)
        return f"did you mean {key.name}={choices[near[0]]}?" if near else f"take one of {', '.join(choices.values())}"
    if key.type is int and isinstance(value, float) and isfinite(value):
        return f"{key.name}={floor(value)} or {ceil(value)}"
    if get_origin(key.type) is list:
        return f"such as {key.name}=[{'1,2,3' if get_args(key.type)[0] in (int, float) else 'a,b'}]"
    shapes = {int: "digits alone, such as {}=8", float: "digits alone, such as {}=0.1 or {}=1e-4", bool: "{}=true or false", str: "one text, such as {}=text"}
    return shapes.get(key.type, "see `yuan recipes keys`").replace("{}", key.name)


def _whole(key: Key, value: Any) -> Any:
    """1e9 is a float to YAML; where a whole number is wanted it is taken as the whole number it is."""
    return int(value) if key.type is int and isinstance(value, float) and value.is_integer() else value


def _typed(config: DictConfig, sources: dict[str, str], faults: list[UserError]) -> Recipe:
    """Resolve `${...}` one by one, so that a fault names its key and `show` can tell what an expression gave."""
    device = None
    for name, key in table().items():
        group, leaf = name.split(".")
        if not OmegaConf.is_interpolation(config[group], leaf):
            continue
        expression = OmegaConf.to_container(config[group], resolve=False)[leaf]
        try:
            config[group][leaf] = config[group][leaf]
            if "on_gpu" in expression:
                device = device or resolve_device(config.launch)
                sources[name] += f": {expression} on {device}"
        except (OmegaConfBaseException, TypeError) as error:
            what = f"{name}: {expression} gives no value: {str(error).splitlines()[0]}"
            faults.append(UserError(what, sources[name], f"it must be {key.expected}"))
            config[group][leaf] = key.default
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an expression inside a list
        faults.append(
            UserError(f"{error.full_key}: {str(error).splitlines()[0]}", sources.get(str(error.full_key).split("[")[0], ""))
        )
        return Recipe()
