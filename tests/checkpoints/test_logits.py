"""Imported models answer as `transformers` does, at every layout, and come back bit for bit."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.checkpoints import published
from tests.checkpoints.folders import YUAN, write, yuan_tensors
from tests.checkpoints.published import LAYOUTS, VARIANTS
from tests.launcher.engine.sft_worker import write_rows

INT8 = ("gpt2", "llama_grouped_tied")  # such that are quantized too
RANK_FILES = ("gpt2", "llama_grouped_tied", "llama2")  # such that are converted into a file per rank too
OTHERS = {  # formats, of which models
    "pai": ("llama2", "--pp", 2), "mindspore": ("llama2", "--tp", 2, "--fused-layout", "grouped"), "yuan": ("yuan2", "--tp", 2, "--pp", 2),
}  # fmt: skip
FUSED = "llama_grouped_tied"  # with the names of Transformer Engine's modules
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def convert(*words: object) -> str:
    """`yuan convert` in this process; what it said."""
    from launcher.cli import app

    done = CliRunner().invoke(app, ["convert", *map(str, words)])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def rounded_to_int8(path):
    """The published model with every matrix of its layers replaced by what int8 and a scale for each output leave of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    for name, weight in model.named_parameters():
        if ".layers." in name and "_proj" in name or ".h." in name and ".c_" in name and weight.dim() == 2:
            outputs = weight.data if ".layers." in name else weight.data.t()  # GPT-2 has its matrices transposed
            scale = (2 * outputs.abs().max(1).values / 255)[:, None]
            outputs.copy_((outputs / scale).round().clamp(-128, 127) * scale)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """hf/NAME, ours/NAME converted from it, reference logits, and what the ranks of every layout found."""
    folder = tmp_path_factory.mktemp("logits")
    (folder / "ours").mkdir()
    ids = torch.randint(0, published.VOCABULARY, (48,), generator=torch.Generator().manual_seed(1))
    torch.save(ids, folder / "ours" / "ids.pt")
    references = {}
    for name in published.NAMES:
        model = published.make(folder / "hf", name)
        with torch.no_grad():
            references[name] = model(ids[None]).logits[0]
        convert(folder / "hf" / name, folder / "ours" / name)
    for name in INT8:
        said = convert(folder / "hf" / name, folder / "ours" / f"{name}_int8", "--quantize", "int8")
        assert "weights in int8" in said and "|w - scale q| / |w|" in said
        references[f"{name}_int8"] = rounded_to_int8(folder / "hf" / name)(ids[None]).logits[0].detach()
    for name in RANK_FILES:  # stages of 1 and 3 layers
        words = ["--to", "torch", "--tp", 2, "--pp", 2, "--layout", "Et|tttL"]
        impl = "transformer_engine" if name == FUSED else "local"  # loaded all the same
        convert(folder / "hf" / name, folder / "ours" / "torch" / name, *words, "--transformer-impl", impl)
    write(folder / "hf" / "yuan2", YUAN, yuan_tensors())
    convert(folder / "hf" / "yuan2", folder / "ours" / "yuan2")
    for name, (of, *words) in OTHERS.items():
        convert(folder / "hf" / of, folder / "others" / name, "--to", name, *words)
    write_rows(folder / "ours" / "rows")
    torch.save(references, folder / "references.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = "import sys; from tests.checkpoints.ranks import main; main(sys.argv[1])"
    with open(folder / "log", "w") as log:
        done = subprocess.run([sys.executable, "-c", run, folder / "ours"], stdout=log, stderr=log, env=environment, timeout=300)
    assert done.returncode == 0, (folder / "log").read_text()[-6000:]
    return folder


@pytest.mark.parametrize("name", [*published.NAMES, *(f"{name}_int8" for name in INT8)])
def test_logits_are_those_of_transformers_at_every_layout(folder, name):
    reference = torch.load(folder / "references.pt")[name]
    assert reference.std() > 0.5  # answers that vary
    for tp, pp in LAYOUTS:
        logits = torch.load(folder / "ours" / f"{tp}x{pp}.pt")["logits"][name]
        assert logits.shape == reference.shape
        assert (logits - reference).abs().max() < 1e-4, f"TP {tp}, PP {pp}"


@pytest.mark.parametrize("name", RANK_FILES)
def test_logits_of_files_per_rank_at_their_own_layout_and_at_others(folder, name):
    found = torch.load(folder / "ours" / "2x2.pt")["logits"]
    assert torch.equal(found[f"torch/{name}"], found[name])
    for layout in ("2x1", "1x2"):
        found = torch.load(folder / "ours" / f"{layout}.pt")
        assert torch.equal(found["files"][name], found["logits"][name])


@pytest.mark.parametrize("name", [*published.NAMES, "yuan2", *OTHERS])
def test_a_folder_of_another_format_is_loaded_as_it_is(folder, name):
    for layout in ("1x1", "2x2"):
        found = torch.load(folder / "ours" / f"{layout}.pt")
        converted = found["logits"][OTHERS[name][0] if name in OTHERS else name]
        assert converted.std() > 0.1 and torch.equal(found["direct"][name], converted)


def test_fine_tuning_begins_alike_from_every_format_whatever_the_layout(folder):
    first = torch.load(folder / "ours" / "1x1.pt")["losses"][str(folder / "hf")]
    assert first[0] > first[1]
    for layout in ("1x1", "2x1", "1x2"):
        found = torch.load(folder / "ours" / f"{layout}.pt")["losses"]
        of_layout = found.pop(str(folder / "hf"))
        assert of_layout == pytest.approx(first, rel=5e-3)  # bf16
        assert found.pop("interleaved", of_layout) == pytest.approx(of_layout, rel=1e-6)
        assert list(found.values()) == [of_layout, of_layout]  # converted first, and files per rank of another layout


@pytest.mark.parametrize("name", RANK_FILES)
def test_files_per_rank_that_a_training_saved_are_read(folder, tmp_path, name):
    """Those of TP 2 x PP 2 with stages of 1 and 3 layers; what they hold is what a conversion had written, no more, no less."""
    said = convert(folder / "ours" / "torch" / f"{name}-run", tmp_path / "back", "--to", "hf")
    assert "weights alone" in said and "TP 2, PP 2, layers 1, 3" in said
    first, again = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder / "hf" / name, tmp_path / "back"))
    assert all(torch.equal(tensor, first[key]) for key, tensor in again.items()) and first.keys() == again.keys()
    ours, saved = (sorted((folder / "ours" / "torch").glob(f"{one}/**/model_optim_rng.pt")) for one in (name, f"{name}-run"))
    assert len(ours) == len(saved) == 4
    if name == FUSED:
        return
    for one, other in zip(ours, saved, strict=True):
        written, trained = (torch.load(path, weights_only=False) for path in (one, other))
        assert written["model"].keys() == trained["model"].keys()
        assert all(tensor is None or torch.equal(tensor, trained["model"][key]) for key, tensor in written["model"].items())


def test_llama_3_turns_otherwise_than_without_its_scaling(folder):
    config = transformers.AutoConfig.from_pretrained(folder / "hf" / "llama3")
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    plain = transformers.LlamaForCausalLM.from_pretrained(folder / "hf" / "llama3", config=config)
    with torch.no_grad():
        logits = plain(torch.load(folder / "ours" / "ids.pt")[None]).logits[0]
    assert (logits - torch.load(folder / "references.pt")["llama3"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name, way",
    [(name, "converted") for name in published.NAMES] + [(name, "trained at TP 2 x PP 2 and saved") for name in published.SAVED],
)
def test_back_again_every_tensor_is_the_same_bit_for_bit(folder, tmp_path, name, way):
    ours = folder / "ours" / (name if way == "converted" else f"{name}-run")
    said = convert(ours, tmp_path / "back", "--to", "hf")
    assert ("the optimizer's" in said) is (way != "converted")
    assert "rows that pad the vocabulary" in said
    first = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf" / name).state_dict()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.state_dict().keys() == first.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == first[key].dtype and torch.equal(tensor, first[key]), key
    with torch.no_grad():
        logits = again(torch.load(folder / "ours" / "ids.pt")[None]).logits[0]
    assert torch.equal(logits, torch.load(folder / "references.pt")[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_description_is_that_of_the_model_that_is_built(folder, variant):
    found = torch.load(folder / "ours" / "2x1.pt")["parameters"][variant]
    assert found["described"] == found["built"]
    assert found["stacked"] == found["sharded"]
