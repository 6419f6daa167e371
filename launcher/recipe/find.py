"""Where recipes live: ./recipes, then the user's config folder, then the package."""

from __future__ import annotations

import os
import re
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
            if path.is_file():  # no folder, and no link to what is gone
                found.setdefault(path.stem, path)
    return dict(sorted(found.items(), key=lambda item: in_order(item[0])))


def find(name: str, beside: Path | None = None) -> Path:
    """The file of the recipe `name`: a path where it ends in .yaml, else a name in one of the folders, such as
    `345m` or `bases/llama2_7b`.

    `beside` is the recipe whose `base:` asks: its own folder comes first, and it never finds itself, so that a
    user's `345m.yaml` can build on the packaged one of the same name.
    """
    own = [beside.parent] if beside else []
    if name.endswith((".yaml", ".yml")):
        candidates = [folder / Path(name).expanduser() for folder in [*own, Path()]]
    else:
        candidates = [folder / f"{name}.yaml" for folder in [*own, *folders(), *([Path()] if "/" in name else [])]]
    for path in candidates:
        if path.is_file() and not (beside and path.samefile(beside)):
            return path
    raise unknown_recipe(name, str(beside) if beside else f"recipe={name}", beside)


def unknown_recipe(name: str, where: str, beside: Path | None = None) -> UserError:
    """The error for a recipe that is not there, with the nearest names, `beside` itself not among them."""
    is_file = name.endswith((".yaml", ".yml"))
    stem = Path(name).stem if is_file else name
    there = {key: path for key, path in available().items() if not (beside and path.samefile(beside))}
    lower = {key.lower(): key for key in there}
    near = [stem.lower()] if stem.lower() in lower else get_close_matches(stem.lower(), lower, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(lower[one] for one in near)}? " if near else ""
    if is_file:
        return UserError(f"no recipe file {name}", where, f"{hint}give the path of a .yaml file, or a name of `yuan recipes list`")
    return UserError(f"no recipe is named {name!r}", where, f"{hint}`yuan recipes list` shows them all")


def label(path: Path) -> str:
    """How a recipe's file is shown: `recipes/NAME.yaml` for a packaged one, else its path as short as it goes."""
    if path.resolve().is_relative_to(package_folder()):
        return f"recipes/{path.resolve().relative_to(package_folder())}"
    for base, prefix in ((Path.cwd(), "./"), (Path.home(), "~/")):
        if path.resolve().is_relative_to(base):
            return prefix + str(path.resolve().relative_to(base))
    return str(path)


def describe(path: Path) -> tuple[str, str | None]:
    """What a recipe's first comments say: its one-line description, and the verb of the first command below it."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip() and not line.startswith("#"):
            break
        lines += [line.lstrip("# ").strip()] if line.startswith("#") else []
    verbs = re.findall(r"^yuan (?:.*\byuan )?([a-z]+)", "\n".join(lines[1:]), re.MULTILINE)
    return (lines[0] if lines else "", verbs[0] if verbs else None)


def in_order(name: str) -> list[str | int]:
    """A key to sort names by, numbers by their size: llama2_7b before llama2_13b."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
