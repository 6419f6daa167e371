"""The frozen recipe: the resolved recipe as one YAML file, written once, read by every worker."""

from pathlib import Path

from omegaconf import OmegaConf

from launcher.recipe.schema import Recipe


def write_frozen(recipe: Recipe, path: Path) -> None:
    """Write `recipe` as YAML to `path`: beside it first, then renamed, so that a reader sees a whole file or none."""
    part = path.with_name(path.name + ".part")
    part.write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)), encoding="utf-8")
    part.replace(path)


def read_frozen(path: Path) -> Recipe:
    """Read a file of `write_frozen` back into typed dataclasses; an unknown key or a wrong type raises OmegaConf's error."""
    merged = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(path))
    return OmegaConf.to_object(merged)
