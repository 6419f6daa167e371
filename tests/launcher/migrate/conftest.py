"""A folder of its own for each test, the users' own commands, and migrating through the command line."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli import app

COMMANDS = Path(__file__).parent / "commands"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder and an empty config folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("YUAN_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "100")  # what a report is wrapped to, whatever runs the tests
    return folder


@pytest.fixture
def yuan(here):
    """yuan(*words) → what it printed."""

    def run(*words: str) -> str:
        return CliRunner().invoke(app, list(words), catch_exceptions=False).stdout

    return run


@pytest.fixture
def migrated(yuan):
    """migrated(*words) → (dotted key → value, report) of the recipe that `yuan migrate` writes."""

    def run(*words: str) -> tuple[dict, str]:
        report = yuan("migrate", "--output", "m.yaml", "--force", "--", *words)
        groups = yaml.safe_load(Path("m.yaml").read_text())
        return {f"{group}.{leaf}": value for group, keys in groups.items() for leaf, value in keys.items()}, report

    return run
