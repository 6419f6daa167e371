"""The frozen recipe: the resolved recipe as one YAML file, written once, read by every worker."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from launcher.errors import UserError
from launcher.recipe.schema import Recipe
from launcher.whole import write_whole


def write_frozen(recipe: Recipe, path: Path) -> None:
    """Write `recipe` as YAML to `path`; a reader sees a whole file or none."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def read_frozen(path: Path) -> Recipe:
    """Read a file of `write_frozen` back into typed dataclasses; an unknown key or a wrong type raises OmegaConf's error."""
    merged = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(path))
    return OmegaConf.to_object(merged)


def own_recipe(folder: Path) -> Recipe | None:
    """The recipe inside a checkpoint's folder; None where it has none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        return None
    try:
        return read_frozen(path)
    except Exception as error:  # OmegaConf and PyYAML raise a dozen kinds
        what = f"the checkpoint's recipe cannot be read: {str(error).splitlines()[0]}"
        raise UserError(what, str(path), "another version of yuan may have written it; take another checkpoint, or start another run with run.name=NAME") from error
