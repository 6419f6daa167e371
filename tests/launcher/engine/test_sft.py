"""Fine-tuning: the loss and its gradients are those of the rows one by one, whatever the layout and however they are packed."""

import json

import pytest

from launcher.launch.torchrun import launch
from launcher.recipe.frozen import write_frozen
from launcher.run.folder import RunFolder
from tests.launcher.engine import sft_worker as worker


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What four ranks found: for each case the largest differences from the rows one by one, in plain PyTorch."""
    folder = RunFolder(tmp_path_factory.mktemp("sft"))
    folder.logs.mkdir()
    recipe = worker.of_case("packed")
    write_frozen(recipe, folder.recipe)
    assert launch(recipe, folder, worker.Path(worker.__file__), "test") == 0
    return json.loads((folder.path / "result.json").read_text())


@pytest.mark.parametrize("name", worker.CASES)
def test_loss_and_gradients_are_those_of_the_rows_one_by_one(found, name):
    gradients = [value for key, value in found[name].items() if key.startswith("gradient")]
    assert found[name]["loss"] < 1e-5
    assert len(gradients) == (0 if "zero1" in name else 4 * 12 + 2) and max(gradients, default=0) < 1e-4
