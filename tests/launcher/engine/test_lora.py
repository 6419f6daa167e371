"""LoRA at every layout against W + alpha / r x B A in plain PyTorch; its checkpoints, merged and not, and what `yuan convert` makes of them."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from checkpoints.folder import newest_checkpoint
from tests.launcher.engine import lora_worker as worker
from tests.launcher.engine.runs import executed

MATRICES = {"gpt2": 4, "llama": 4, "yuan2": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks left: result.json, and for each family a run of all weights and one of adapters."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "tokenizer").mkdir()
    executed(worker.__file__, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "result.json").read_text())


def yuan(*words: object, code: int = 0) -> str:
    """`yuan WORDS...` in this process; what it said."""
    from launcher.cli import app

    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize("name", worker.CASES)
def test_logits_loss_and_gradients_are_those_of_the_merged_weights(found, name):
    family, *_, targets = worker.CASES[name]
    differences = dict(found[name])
    assert differences.pop("logits") < 1e-5 and differences.pop("loss") < 1e-5
    for exact in ("initial", "trained besides", "frozen moved", "frozen with a gradient", "buffers", "apart"):
        assert differences.pop(exact) == 0, exact
    gradients = [key for key in differences if key.startswith("gradient")]
    assert len(gradients) == (0 if "zero1" in name else 4 * 2 * (len(targets) if targets else MATRICES[family]))  # ZeRO-1 has shares
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("family", worker.SAVED)
def test_frozen_weights_cost_no_product_for_their_gradient(found, family):
    assert found["about"][f"{family} products"] <= 0  # below: nothing goes back to the input of the first layer


@pytest.mark.parametrize("name", worker.LOADED)
def test_a_run_goes_on_at_another_layout(found, name):
    assert found["next"][name] == pytest.approx(found["next"][worker.SAVED["llama"]], abs=1e-5)


def test_a_run_goes_on_exactly_at_its_own(found):
    assert found["about"]["resumed"] == 0


@pytest.mark.parametrize("name", worker.SAVED.values())
def test_merged_when_they_are_loaded_adapters_give_the_same_logits(found, name):
    assert found["about"][f"merged at {name}"] < 1e-5


def test_a_checkpoint_holds_the_adapters_alone(folder):
    import torch.distributed.checkpoint as dcp

    tensors = dcp.FileSystemReader(newest_checkpoint(folder / "llama_adapters")).read_metadata().state_dict_metadata
    names = {key.removeprefix("optimizer.state.exp_avg_sq.").removeprefix("optimizer.state.exp_avg.") for key in tensors}
    adapters = {name for name in names if not name.startswith("rng_state")}
    assert len(adapters) == 2 * MATRICES["llama"] and all("_lora." in name for name in adapters)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exported_to_hugging_face_they_answer_as_before(folder, tmp_path, family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    said = yuan("convert", folder / f"{family}_adapters", tmp_path / "hf", "--to", "hf")
    assert "merged     LoRA of rank 3, alpha 5" in said and "the optimizer's" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits = model(torch.load(folder / "ids.pt")).logits
    before = torch.load(folder / f"{family}_adapters" / "logits.pt")
    assert before.std() > 0.5 and (logits - before[..., : logits.shape[-1]]).abs().max() < 1e-4


def test_converted_they_are_whole_weights_that_a_conversion_back_verifies(folder, tmp_path):
    adapters = folder / "yuan2_adapters"
    yuan("convert", adapters, tmp_path / "whole")
    assert "the same bit for bit" in yuan("convert", adapters, tmp_path / "whole", "--verify")
    told = yuan("inspect", adapters)
    assert "LoRA of rank 3, alpha 5, in linear_qk, linear_v, linear_proj\n" in told
    assert str(newest_checkpoint(folder / "yuan2")) in told and "problems   none" in told
    assert "LoRA" not in yuan("inspect", tmp_path / "whole")
    from launcher.recipe.frozen import read_frozen

    assert read_frozen(newest_checkpoint(tmp_path / "whole") / "recipe.yaml").lora.rank is None


def test_without_the_weights_that_they_stand_beside_nothing_is_read(folder, tmp_path):
    adapters, frozen = tmp_path / "adapters", newest_checkpoint(folder / "gpt2")
    shutil.copytree(folder / "gpt2_adapters", adapters)
    note = newest_checkpoint(adapters) / "lora.json"
    moved = json.loads(note.read_text()) | {"base": str(tmp_path / "moved")}
    note.write_text(json.dumps(moved))
    said = yuan("inspect", adapters, code=1)
    assert f"the weights of {tmp_path / 'moved'}, which is not there" in said
    shutil.copytree(frozen, tmp_path / "moved")
    yuan("inspect", adapters)
    changed = next((tmp_path / "moved").glob("*.distcp"))
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    assert "has other weights now" in yuan("inspect", adapters, code=1)
