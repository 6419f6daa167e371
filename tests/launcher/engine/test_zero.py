"""ZeRO's stages compute what data parallelism without sharding computes, and go on from each other's checkpoints."""

import json
from pathlib import Path

import pytest

from launcher.launch.torchrun import launch
from launcher.recipe.frozen import write_frozen
from launcher.run.folder import RunFolder
from tests.launcher.engine import zero_worker as worker

NEAR = {"fp32": 1e-5, "bf16": 2e-2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one job of two ranks that trains every case at every stage, and what it found."""
    folder = RunFolder(tmp_path_factory.mktemp("zero"))
    folder.logs.mkdir()
    recipe = worker.of_case("gpt2", None)
    write_frozen(recipe, folder.recipe)
    assert launch(recipe, folder, Path(worker.__file__), "test") == 0
    return folder.path, json.loads((folder.path / "result.json").read_text())


def close(name: str, found: list, expected: list) -> bool:
    near = NEAR[worker.CASES[name][1]]
    return [pytest.approx(numbers, rel=near) for numbers in expected] == found


@pytest.mark.parametrize("name", worker.CASES)
def test_losses_and_norms_are_those_without_sharding(run, name):
    curves = run[1]["curves"]
    plain = curves[f"{name} None"]
    assert len(plain) == worker.STEPS and max(norm for _, norm in plain) > 0.7  # it clips
    for zero in (1, 2, 3):
        assert close(name, curves[f"{name} {zero}"], plain), zero


@pytest.mark.parametrize(("name", "saved", "new", "tp"), worker.RESUMED)
def test_each_goes_on_from_the_others_checkpoints(run, name, saved, new, tp):
    found, whole = run[1]["resumed"][f"{name} {saved} {new} {tp}"], run[1]["curves"][f"{name} {saved}"][worker.SAVED :]
    if (new, tp) == (saved, 1):
        assert found == whole  # bit for bit
    assert close(name, found, whole)
