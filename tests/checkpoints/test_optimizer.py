"""A training goes on from another format and layout, with what Adam remembers, and the files are those that a run saves."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from checkpoints.convert import Wanted, convert, open_source  # noqa: E402
from checkpoints.folder import CheckpointError, newest_checkpoint  # noqa: E402
from checkpoints.recognise import recognise  # noqa: E402
from checkpoints.verify import compare  # noqa: E402
from launcher.cli import app  # noqa: E402
from launcher.recipe.converted import model_of, own_recipe  # noqa: E402

BEGUN = {"gpt2_stages": "gpt2", "gpt2_zero": "gpt2", "gpt2_bf16_stages": "gpt2_bf16", "llama_fp16_interleaved": "llama_fp16", "yuan2_ranks": "yuan2"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of trainings, others converted from them, `NAME_saved` as the trainings that went on from these saved them at
    once; and found.json."""
    folder = tmp_path_factory.mktemp("trained")
    run = "import sys; from tests.checkpoints.training_ranks import main; main(sys.argv[1])"
    with open(folder / "log", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", run, folder], stdout=log, stderr=log, env=environment, timeout=400)
    assert done.returncode == 0, (folder / "log").read_text()[-6000:]
    return folder


def source(path, **more):
    found = recognise(path)
    return open_source(found, model_of(own_recipe(found.path)), states=True, **more)


def same(one, other) -> bool:
    """Whether two checkpoints hold the same weights and moments, bit for bit."""
    kinds = [found.kind for found in compare(source(one), source(other))]
    return len(kinds) > 50 and set(kinds) == {"same"}


def alike(one, other) -> bool:
    """Whether two contents of files are equal, in values, in types and in the order of their keys' numbers."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


@pytest.mark.parametrize("name", BEGUN)
def test_the_loss_curve_goes_on(trained, name):
    found = json.loads((trained / "found.json").read_text())
    close = 1e-4 if "fp16" in name else 1e-6
    assert found["losses"][name] == pytest.approx(found["losses"][BEGUN[name]], abs=close)
    said = found["said"][name]
    assert "training   step 2, the optimizer's state" in said and ("random numbers go on only where" in said) is (name != "gpt2_zero")


@pytest.mark.parametrize("name", BEGUN)
def test_weights_and_moments_are_the_same_bit_for_bit(trained, name):
    assert same(trained / BEGUN[name], trained / name)


@pytest.mark.parametrize("name", [name for name in BEGUN if name != "gpt2_zero"])
def test_the_files_are_those_that_a_run_saves(trained, name):
    """A training that loads what was converted saves it as it lies there: every name, number, group and buffer."""
    written, saved = (sorted(newest_checkpoint(trained / one).glob("mp_rank_*/*.pt")) for one in (name, f"{name}_saved"))
    assert len(written) == len(saved) >= 2 and [one.name for one in written] == [one.name for one in saved]
    for one, other in zip(written, saved, strict=True):
        ours, runs = (torch.load(path, weights_only=False) for path in (one, other))
        if one.name == "distrib_optim.pt":
            assert alike(ours, runs)
            continue
        models = [key for key in runs if key.startswith("model")]
        assert models == [key for key in ours if key.startswith("model")] == (["model0", "model1"] if "interleaved" in name else ["model"])
        weights = [[[key for key, value in content[model].items() if value is not None] for model in models] for content in (ours, runs)]
        assert weights[0] == weights[1]  # by their order the optimizer's are known
        assert all(alike(ours[key], runs[key]) for key in (*models, "iteration", "opt_param_scheduler", "checkpoint_version"))
        for content in (ours, runs):
            for group in content["optimizer"].get("optimizer", content["optimizer"])["param_groups"]:
                group.pop("step", None)  # the plain form has it besides, for other programs
        assert alike(ours["optimizer"], runs["optimizer"])
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "use_distributed_optimizer", "consumed_train_samples"):
            assert getattr(ours["args"], key) == getattr(runs["args"], key)
