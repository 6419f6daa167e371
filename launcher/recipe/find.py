"""Where recipes live: ./recipes, then the user's config folder, then the package."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

import launcher
from launcher.errors import UserError


def package_folder() -> Path:
    """The recipes that come with yuan: the folder beside the package `launcher`, in a checkout and when installed."""
    return Path(launcher.__file__).resolve().parent.parent / "recipes"


def folders() -> list[Path]:
    """The folders that are searched, first match wins."""
    if os.environ.get("YUAN_CONFIG_DIR"):
        user = Path(os.environ["YUAN_CONFIG_DIR"])
    else:
        user = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "yuan" / "recipes"
    return [Path("recipes"), user, package_folder()]


def available() -> dict[str, Path]:
    """Every recipe's name and the file that the name means; a user's file hides a packaged one of the same name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find(name: str, beside: Path | None = None) -> Path:
    """The file of the recipe `name`, which is a path where it ends in .yaml or has a slash.

    `beside` is the recipe whose `base:` asks: its own folder comes first, and it never finds itself, so that a
    user's `345m.yaml` can build on the packaged one of the same name.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        candidates = [Path(name).expanduser()]
        if beside and not candidates[0].is_absolute():
            candidates.insert(0, beside.parent / name)
    else:
        searched = ([beside.parent] if beside else []) + folders()
        candidates = [folder / f"{name}.yaml" for folder in searched]
    for path in candidates:
        if path.is_file() and not (beside and path.samefile(beside)):
            return path
    raise unknown_recipe(name, str(beside) if beside else f"recipe={name}")


def unknown_recipe(name: str, where: str) -> UserError:
    """The error for a recipe that is not there, with the nearest names or with all of them."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return UserError(f"no recipe file {name}", where, "give the path of a .yaml file, or a name of `yuan recipes list`")
    names = list(available())
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(f"no recipe is named {name!r}", where, f"{hint}there are: {', '.join(names)}")


def label(path: Path) -> str:
    """How a recipe's file is shown: `recipes/NAME.yaml` for a packaged one, else its path as short as it goes."""
    if path.resolve().parent == package_folder():
        return f"recipes/{path.name}"
    for base, prefix in ((Path.cwd(), "./"), (Path.home(), "~/")):
        if path.resolve().is_relative_to(base):
            return prefix + str(path.resolve().relative_to(base))
    return str(path)


def describe(path: Path) -> str:
    """A recipe's one-line description: its first comment."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
        if line.strip():
            break
    return ""
