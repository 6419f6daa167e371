"""ZeRO's stages compute what data parallelism without sharding computes, and go on from each other's checkpoints."""

import json

import pytest

from launcher.recipe.frozen import write_frozen
from launcher.run.folder import RunFolder
from tests.launcher.engine import zero_worker as worker
from tests.launcher.engine.runs import launched, yuan

NEAR = {"fp32": 1e-5, "bf16": 2e-2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one job of two ranks that trains every case at every stage, and what it found."""
    folder = RunFolder(tmp_path_factory.mktemp("zero"))
    folder.logs.mkdir()
    recipe = worker.of_case("gpt2", None)
    write_frozen(recipe, folder.recipe)
    launched(folder, worker.__file__)
    return folder.path, json.loads((folder.path / "result.json").read_text())


def close(name: str, found: list, expected: list) -> bool:
    near = NEAR[worker.CASES[name][1]]
    return [pytest.approx(numbers, rel=near) for numbers in expected] == found


@pytest.mark.parametrize(("name", "zero"), [pair for pair in worker.TRAINED if pair[1]])
def test_losses_and_norms_are_those_without_sharding(run, name, zero):
    curves = run[1]["curves"]
    plain = curves[f"{name} None"]
    assert len(plain) == worker.STEPS and max(norm for _, norm in plain) > 0.7  # it clips
    assert close(name, curves[f"{name} {zero}"], plain)


@pytest.mark.skipif(not worker.compiler(), reason="torch.compile needs a C++ compiler, and there is none")
def test_a_compiled_model_has_the_same_losses(run):
    curves = run[1]["curves"]
    assert close("llama", curves["llama compiled"], curves["llama 3"])


@pytest.mark.parametrize(("name", "saved", "new", "tp"), worker.RESUMED)
def test_each_goes_on_from_the_others_checkpoints(run, name, saved, new, tp):
    found, whole = run[1]["resumed"][f"{name} {saved} {new} {tp}"], run[1]["curves"][f"{name} {saved}"][worker.SAVED :]
    if (new, tp) == (saved, 1):
        assert found == whole  # bit for bit
    assert close(name, found, whole)


def test_a_rank_asks_a_checkpoint_for_what_it_keeps_alone(run):
    every, first, second = run[1]["asked"]
    assert sorted({*first, *second}) == every and len(first) + len(second) <= len(every) + 1  # one may lie on both


def test_megatron_core_is_asked_to_use_the_hosts_memory(run):
    assert run[1]["offloaded"] == [True, 0.5, True, 1]


def test_weights_of_other_formats_fill_its_rows(run):
    assert run[1]["filled"]


def test_its_checkpoints_are_converted_like_any(run):
    """Their rows are cut where no other layout cuts them, gate and up in the middle."""
    done = yuan(run[0], "convert", "llama_3/checkpoints", "hf", "--to", "hf")
    assert "read back and found equal" in done.stdout + done.stderr and (run[0] / "hf" / "model.safetensors").is_file()
