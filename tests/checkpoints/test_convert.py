"""`yuan convert` as typed: every form of Hugging Face's folder, what is left out, what is refused and why."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from checkpoints.files import pickled
from checkpoints.folder import CheckpointError
from checkpoints.formats import hf
from launcher.cli import app
from launcher.errors import UserError
from tests.checkpoints.folders import GPT2, LLAMA, YUAN, gpt2_tensors, llama_tensors, write, yuan_tensors


def convert(*words: object) -> str:
    """What it said; a mistake is raised as it would be printed."""
    done = CliRunner().invoke(app, ["convert", *map(str, words)])
    if isinstance(done.exception, Exception):
        raise done.exception
    return done.output


def back(folder, *words: object) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of `folder` after its way through torch_dist, and what was said on the way there."""
    said = convert(folder, folder.parent / "ours", *words)
    convert(folder.parent / "ours", folder.parent / "back", "--to", "hf")
    return load_file(folder.parent / "back" / "model.safetensors"), said


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("shards, kind", [(1, "safetensors"), (3, "safetensors"), (1, "bin"), (2, "bin")])
def test_llama_in_every_kind_of_file(tmp_path, shards, kind):
    again, said = back(write(tmp_path / "hf", LLAMA, llama_tensors(), shards, kind))
    assert same(again, llama_tensors())
    assert "llama: 2 layers, hidden 8, 4 heads in 2 groups, vocabulary 11" in said and "hf" in said


def test_a_bin_of_torch_before_1_6(tmp_path):
    write(tmp_path / "hf", LLAMA, {"x": torch.ones(1)}, kind="bin")
    torch.save(llama_tensors(), tmp_path / "hf" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(back(tmp_path / "hf")[0], llama_tensors())


def test_gpt2_as_openai_names_it_with_its_masks(tmp_path):
    again, said = back(write(tmp_path / "hf", GPT2, gpt2_tensors(prefix="")))
    assert same(again, {name: tensor for name, tensor in gpt2_tensors().items() if not name.endswith(".attn.bias")})
    assert "the causal mask: 2 tensors" in said


def test_yuan_with_its_copy_of_the_embedding(tmp_path):
    folder = write(tmp_path / "hf", YUAN, yuan_tensors())
    again, said = back(folder)
    left_out = ("lm_head.weight", "inv_freq")
    assert same(again, {name: tensor for name, tensor in yuan_tensors().items() if not name.endswith(left_out)})
    assert "a copy of model.embed_tokens.weight" in said and "RoPE's frequencies: 2 tensors" in said
    source, tensors = hf.open_source(folder), yuan_tensors()
    # Its names mislead: the first head's query and key are both in q_proj, and SiLU's half is up_proj.
    qk, at = source.read("decoder.layers.1.self_attention.linear_qk.weight"), "model.layers.1."
    assert torch.equal(qk[:4], tensors[f"{at}self_attn.q_proj.weight"][:4]) and torch.equal(qk[8:], tensors[f"{at}self_attn.k_proj.weight"])
    assert torch.equal(source.read("decoder.layers.1.mlp.linear_fc1.weight")[:16], tensors[f"{at}mlp.up_proj.weight"])


def test_what_goes_with_the_weights(tmp_path):
    """Padding, precision, the manifest, and a config.json that comes back with what we do not read."""
    folder = write(tmp_path / "hf", LLAMA | {"rope_theta": 5e5, "bos_token_id": 3, "note": "kept"}, llama_tensors())
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    again, _ = back(folder, "--dtype", "bf16")
    assert same(again, {name: tensor.bfloat16() for name, tensor in llama_tensors().items()})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == LLAMA | {"rope_theta": 5e5, "bos_token_id": 3, "note": "kept", "torch_dtype": "bfloat16"}
    assert (tmp_path / "back" / "generation_config.json").read_text() == '{"top_k": 7}'
    assert (tmp_path / "ours" / "latest_checkpointed_iteration.txt").read_text() == "release"
    there, here = (json.loads((tmp_path / place / "conversion.json").read_text()) for place in ("ours/release", "back"))
    assert there["tensors"] == here["tensors"] and len(there["tensors"]) == 2 * 6 + 3
    assert here["left_out"]["output_layer.weight[11:]"] == "117 rows that pad the vocabulary"


def test_two_models_in_one_folder_are_told_apart_by_the_recipe(tmp_path):
    folder = write(tmp_path / "hf", LLAMA, llama_tensors())
    with pytest.raises(UserError, match="model.num_layers is 3, and the source's is 2"):
        (tmp_path / "three.yaml").write_text("model: {family: llama, num_layers: 3}\n")
        convert(folder, tmp_path / "out", f"recipe={tmp_path}/three.yaml")
    assert not [*tmp_path.glob("out*")]


class Evil:
    def __reduce__(self):
        return eval, ("open('owned', 'w')",)


def cut(path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def header(path, change) -> None:
    """Rewrite a safetensors header; its length stays what it was."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    content = json.loads(raw[8 : 8 + size])
    change(content)
    path.write_bytes(raw[:8] + json.dumps(content, separators=(",", ":")).encode().ljust(size)[:size] + raw[8 + size :])


def endless(path) -> None:
    """A header that begins lists and ends none."""
    raw = b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)


def move(name: str, by: int):
    def change(content: dict) -> None:
        content[name]["data_offsets"] = [place + by for place in content[name]["data_offsets"]]

    return change


def index(folder, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))


def without(name: str) -> dict:
    return {key: tensor for key, tensor in llama_tensors().items() if key != name}


Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN = {
    "a tensor is missing": (lambda f: write(f, LLAMA, without(Q)), f"missing: {Q}"),
    "one too many": (lambda f: write(f, LLAMA, llama_tensors() | {"model.layers.2.x": torch.ones(1)}), "not known: model.layers.2.x"),
    "another shape": (lambda f: write(f, LLAMA, llama_tensors() | {Q: torch.ones(8, 9)}), rf"{Q} is \[8, 9\], and \[8, 8\]"),
    "not a number": (lambda f: write(f, LLAMA, llama_tensors() | {Q: torch.full((8, 8), torch.nan)}), "layers.1.*NaN or infinity"),
    "another head": (lambda f: write(f, LLAMA | {"tie_word_embeddings": True}, llama_tensors()), "lm_head.weight .* differ"),
    "another family": (lambda f: write(f, LLAMA | {"model_type": "bloom"}, llama_tensors()), "model_type 'bloom'"),
    "another activation": (lambda f: write(f, LLAMA | {"hidden_act": "gelu"}, llama_tensors()), "no hidden_act='gelu'"),
    "another scaling": (lambda f: write(f, LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, llama_tensors()), "no rope_type='yarn'"),
    "no config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "a config without an end": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json cannot be read"),
    "a header without an end": (lambda f: endless(f / "model.safetensors"), "the header cannot be read"),
    "a program": (lambda f: torch.save({"x": Evil()}, f / "pytorch_model.bin"), "eval, which .*nothing of it was run"),
    "cut off": (lambda f: cut(f / "model.safetensors", 5000), "model.safetensors is cut off"),
    "a header cut off": (lambda f: cut(f / "model.safetensors", 500), "header does not fit"),
    "tensors that overlap": (lambda f: header(f / "model.safetensors", move(Q, -4)), "overlaps"),
    "a gap": (lambda f: header(f / "model.safetensors", move(Q, 4)), "gap|overlaps"),
    "an index that leads out": (lambda f: index(f, "../hf2/model.safetensors"), "leads out of its folder"),
    "an index from the root": (lambda f: index(f, "/etc/passwd"), "leads out of its folder"),
    "an index of what is not there": (lambda f: index(f, "model-2.safetensors"), "model-2.safetensors, which is not there"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_and_hostile_folders_are_refused_with_the_reason(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    change, reason = BROKEN[case]
    folder = write(tmp_path / "hf", LLAMA, llama_tensors())
    if "program" in case:
        (folder / "model.safetensors").unlink()
    change(folder)
    with pytest.raises(UserError, match=reason):
        convert(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_numbers_too_large_for_the_new_type(tmp_path):
    folder = write(tmp_path / "hf", LLAMA, llama_tensors() | {Q: torch.full((8, 8), 1e6)})
    with pytest.raises(UserError, match="numbers up to 1e.06, which fp16 cannot"):
        convert(folder, tmp_path / "out", "--dtype", "fp16")
    with pytest.raises(UserError, match="hf is there already"):
        convert(tmp_path / "out", folder)


def test_numbers_of_64_bits_need_a_type_to_train_in(tmp_path):
    source = write(tmp_path / "hf", LLAMA | {"dtype": "float64", "torch_dtype": "float64"}, {name: one.double() for name, one in llama_tensors().items()})
    with pytest.raises(UserError, match="weights of torch.float64, and torch_dist is for") as told:
        convert(source, tmp_path / "ours")
    assert told.value.fix == "--dtype fp32 or bf16 or fp16"
    convert(source, tmp_path / "ours", "--dtype", "fp32")
    convert(source, tmp_path / "back", "--to", "hf", "--dtype", "bf16")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_damage_in_torch_dist_is_told(tmp_path):
    convert(write(tmp_path / "hf", LLAMA, llama_tensors()), tmp_path / "ours")
    weights = tmp_path / "ours" / "release"
    whole = {path: path.read_bytes() for path in (weights / name for name in (".metadata", "metadata.json", "common.pt", "__0_0.distcp"))}

    def refused(reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
        assert not [*tmp_path.glob("back*")]
        for path, content in whole.items():
            path.write_bytes(content)

    cut(weights / "__0_0.distcp", 4000)
    refused("cut off|damaged")
    (weights / ".metadata").write_bytes(pickle.dumps(Evil()))
    refused("eval, which .*nothing of it was run")
    (weights / ".metadata").unlink()
    refused("has no .metadata")
    (weights / "metadata.json").write_text("{")
    refused("metadata.json cannot be read")
    (weights / ".metadata").write_bytes(whole[weights / ".metadata"].replace(b"__0_0.distcp", b"../../distcp"))
    refused("leads out of its folder")
    torch.save({"args": Evil()}, weights / "common.pt")
    refused("eval, which .*nothing of it was run")


def test_a_storage_that_claims_more_than_it_has(tmp_path):
    torch.save({"x": torch.zeros(4)}, tmp_path / "x.bin")
    assert pickled.read(tmp_path / "x.bin")["x"].read().tolist() == [0.0] * 4
    raw = (tmp_path / "x.bin").read_bytes()
    place = raw.index(b"K\x04\x85q")  # the shape (4,) in the pickle
    (tmp_path / "x.bin").write_bytes(raw[:place] + b"K\x40" + raw[place + 2 :])
    with pytest.raises(CheckpointError, match="damaged"):
        pickled.read(tmp_path / "x.bin")
