"""What makes a step fast computes the same: loss and output layer in chunks, gradients into their buffer, clipping in AdamW."""

import json

import pytest

from launcher.recipe.frozen import write_frozen
from launcher.run.folder import RunFolder
from tests.launcher.engine import fast_parts_worker as worker
from tests.launcher.engine.runs import launched


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("fast"))
    folder.logs.mkdir()
    recipe = worker.tiny("fast", tp=2)
    write_frozen(recipe, folder.recipe)
    launched(folder, worker.__file__)
    return json.loads((folder.path / "result.json").read_text())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-6), ("bfloat16", 0.05), ("float16", 0.01)])
def test_loss_and_gradients_are_cross_entropys(found, dtype, near, ranks):
    assert found["loss"][f"{dtype}, {ranks} ranks"] < near


@pytest.mark.parametrize("name", worker.CASES)
def test_every_gradient_is_megatron_cores(found, name):
    assert found["gradients"][name] < 1e-5


def test_documents_hide_from_each_other_what_megatrons_mask_hides(found):
    assert found["documents"]


@pytest.mark.parametrize("name", worker.MODELS)
@pytest.mark.parametrize("way", ["GPU", "unfused"])
def test_a_model_computes_the_same_otherwise(found, name, way):
    assert found["otherwise"][name][way] < 1e-5


def test_a_run_stops_where_no_loss_scale_would_help(found):
    told = found["refusals"]
    assert not told["taken"] and not told["skipped"] and not told["fixed, taken"]
    for name, words in {"at the floor": "training.min_loss_scale=2", "fixed": "training.loss_scale=8", "loss": "loss nan"}.items():
        assert words in told[name] and "iteration 7" in told[name]


@pytest.mark.parametrize("name", worker.CLIPPED)
def test_clipping_and_update_are_torchs(found, name):
    assert found["clip"][name] < (2**-10 if "fp16" in name else 1e-4)  # half the distance of two numbers is 2**-11 in fp16
