"""What the families' readers of config.json have in common: refusing, by name, what cannot be had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.folder import CheckpointError
from checkpoints.models.model import Model


def need(config: Mapping[str, Any], where: str, **rules: tuple[Any, Any]) -> None:
    """Each key of a config.json must have the one value that the engine computes: key=(the default, that value).

    Raises:
        CheckpointError: naming every key that has another.
    """
    wrong = [f"{key}={found!r}" for key, (default, wanted) in rules.items() if (found := config.get(key, default)) != wanted]
    if wrong:
        raise CheckpointError(f"{where}: the engine has no {', '.join(wrong)}")


def expect(model: Model, whose: str, **values: Any) -> None:
    """The model must have these values to be written in another format.

    Raises:
        CheckpointError: naming every one that it has not.
    """
    wrong = [f"{key}={getattr(model, key)}" for key, value in values.items() if getattr(model, key) != value]
    if wrong:
        raise CheckpointError(f"{whose} has no {', '.join(wrong)}")
