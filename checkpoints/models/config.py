"""What the families' readers of config.json have in common: refusing, by name, what cannot be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from checkpoints.folder import CheckpointError
from checkpoints.models.model import Model


def whole(config: Mapping[str, Any], where: str, *names: str, free: Sequence[str] = ()) -> None:
    """Each key must be a whole number above 0; those of `free` may be missing or null.

    Raises:
        CheckpointError: naming every key that is none, or is missing.
    """
    keys = [name for name in (*names, *free) if not (name in free and config.get(name) is None)]
    if missing := [name for name in keys if config.get(name) is None]:
        raise CheckpointError(f"{where} does not say what the model is: {', '.join(missing)} missing", f"add them to {where}")
    if wrong := [f"{name} is {config[name]!r}" for name in keys if type(config[name]) is not int or config[name] < 1]:
        raise CheckpointError(f"{where}: {', '.join(wrong)}, and a whole number above 0 is wanted", f"mend {where}")


def number(value: Any, key: str, where: str) -> float:
    """A number above 0.

    Raises:
        CheckpointError: it is another thing; `key` and `where` name it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < inf:
        raise CheckpointError(f"{where}: {key} is {value!r}, and a number above 0 is wanted", f"mend {where}")
    return float(value)


def shared(size: int, count: int, names: str, where: str) -> int:
    """How much of `size` each of `count` has.

    Raises:
        CheckpointError: it does not come out even; `names` are both keys.
    """
    if size % count:
        raise CheckpointError(f"{where}: {names} are {size} and {count}, which does not divide it", f"mend {where}")
    return size // count


def need(config: Mapping[str, Any], where: str, **rules: tuple[Any, Any]) -> None:
    """Each key of a config.json must have the one value that the engine computes: key=(the default, that value).

    Raises:
        CheckpointError: naming every key that has another.
    """
    wrong = [f"{key}={found!r}" for key, (default, wanted) in rules.items() if (found := config.get(key, default)) != wanted]
    if wrong:
        raise CheckpointError(
            f"{where}: the engine has no {', '.join(wrong)}",
            f"mend {where} if that is wrong there: such a model is none of the engine's",
        )


def expect(model: Model, whose: str, **values: Any) -> None:
    """The model must have these values to be written in another format.

    Raises:
        CheckpointError: naming every one that it has not.
    """
    wrong = [f"{key}={getattr(model, key)}" for key, value in values.items() if getattr(model, key) != value]
    if wrong:
        raise CheckpointError(f"{whose} has no {', '.join(wrong)}", "--to torch_dist, which holds every model")
