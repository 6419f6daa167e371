"""The examples' stories, as far as they take seconds: quickstart.py has a test of its own."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app

pytest.importorskip("torch")
EXAMPLES = Path(__file__).parents[1] / "examples"


def test_yuan2_51b_from_its_stages_to_tensor_ranks(tmp_path, monkeypatch):
    """Every command of the story in this process, but for the answers."""
    said = []

    def here(line, env):
        code = 0
        if line[1] != "generate":
            done = CliRunner().invoke(app, line[1:])
            said.append(done.output)
            code = done.exit_code
        return subprocess.CompletedProcess(line, code)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", here)
    spec = importlib.util.spec_from_file_location("convert_yuan2", EXAMPLES / "convert_yuan2.py")
    story = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(story)
    story.main("51b")
    assert "layout     TP 1, PP 16, layers 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2" in said[1]
    assert "tensors    506: 506 the same bit for bit, 0 differ" in said[3]
    assert len(list(tmp_path.glob("yuan2_51b_small/4tp/release/mp_rank_*"))) == 4
    assert (tmp_path / "yuan2_51b_small/torch_dist/release/recipe.yaml").is_file()
