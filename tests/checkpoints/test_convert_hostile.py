"""What a conversion must not do: remove another's files, read what a crafted file points at, lose numbers without a word."""

import json
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import metadata

from checkpoints.files import pickled
from checkpoints.files.stored import Stored
from checkpoints.folder import CheckpointError
from checkpoints.formats import hf, shares, torch_dist
from checkpoints.models import megatron
from checkpoints.part import Part, expect_free
from checkpoints.verify import compare
from launcher.errors import UserError
from tests.checkpoints.folders import GPT2, LLAMA, YUAN, llama_tensors, write
from tests.checkpoints.test_convert import convert

Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


def test_nothing_but_a_dead_conversions_folder_is_removed(tmp_path):
    source = write(tmp_path / "q.part", LLAMA, llama_tensors())
    with pytest.raises(UserError, match="is what is read") as told:
        convert(source, tmp_path / "q")
    assert told.value.fix == "give another target" and len(list(source.iterdir())) == 2
    source = source.rename(tmp_path / "hf")
    (tmp_path / "q.part").mkdir()
    (tmp_path / "q.part" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="q.part is in the way, and no conversion left it"):
        convert(source, tmp_path / "q")
    assert (tmp_path / "q.part" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "q.part" / ".conversion").write_text("pid 1\n")  # as a conversion of before leaves it
    with Part(tmp_path / "q").begun({"source": {}, "options": {}, "files": {}}, lambda what, text: None):
        assert sorted(path.name for path in (tmp_path / "q.part").iterdir()) == [".conversion", "checkpoint", "thesis.tex"]
        with pytest.raises(UserError, match="another process is writing this output: pid"):
            convert(source, tmp_path / "q")
    convert(source, tmp_path / "q")
    assert [path.name for path in (tmp_path / "q.part").iterdir()] == ["thesis.tex"]


def test_targets_that_are_no_folder_of_their_own(tmp_path):
    source = write(tmp_path / "hf", LLAMA, llama_tensors())
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for target in (tmp_path / "dangling", tmp_path / "link", Path("."), tmp_path / "empty" / "..", source, source / "x", tmp_path):
        with pytest.raises(CheckpointError):
            expect_free(target, [source])
    assert len(list(tmp_path.iterdir())) == 4


def archive(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", program)
        file.writestr("x/data/0", bytes(64))
    return path


def shared(count: int) -> dict:
    """Each dictionary holds the one before twice: 2^count parts."""
    value: dict = {}
    for _ in range(count):
        value = {"a": value, "b": value}
    return value


def deep(count: int) -> list:
    """Each list holds the one before, which is read first."""
    found: list[list] = [[]]
    for _ in range(count):
        found.append([found[-1]])
    return found


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nByteStorage\nS'0'\nS'cpu'\nI16\ntQI0\n(I16\nt(I1\ntI00\nNtR"


@pytest.mark.parametrize(
    "program, reason",
    [
        (TENSOR + b"(dS'path'\nS'/etc/passwd'\nsb.", "changes where a tensor lies"),
        (TENSOR + b"(N(dS'path'\nS'/etc/passwd'\nstb.", "changes where a tensor lies"),
        (b"cargparse\nNamespace\n(N(dS'__contains__'\nI1\nstb.", "damaged"),
        (b"ccollections\nOrderedDict\n(N(dS'items'\nI1\nstb.", "damaged"),
        (b"(dp0\nS'a'\ng0\ns.", "holds itself"),
        (pickle.dumps(shared(40)), "more than 10,000,000 parts"),  # of 40 dictionaries
        (b"}r\xff\xff\xff\x0f.", "a note of the number 268,435,455"),
        (pickle.dumps(deep(100)), "more than 64 deep"),
        (TENSOR.replace(b"(I16\nt(I1", b"(F16.0\nt(I1") + b".", "no number"),
    ],
)
def test_pickles_that_change_what_they_were_given(tmp_path, program, reason):
    before = dict(vars(Namespace))
    with pytest.raises(CheckpointError, match=reason):
        pickled.read(archive(tmp_path / "x.pt", program))
    assert dict(vars(Namespace)) == before


@pytest.mark.parametrize("change", [
    lambda content, at: content[: at + 20] + b"\xff\xff\xff\0" * 2 + content[at + 28 :],  # its size: 16 MB
    lambda content, at: content[: at + 8] + b"\1" + content[at + 9 :],  # encrypted
    lambda content, at: content[: at + 9] + b"\x08" + content[at + 10 : at + 46] + b"\xff" + content[at + 47 :],  # a name that is no UTF-8
])
def test_an_archive_whose_list_lies(tmp_path, change):
    path = archive(tmp_path / "x.pt", TENSOR + b".")
    content = path.read_bytes()
    path.write_bytes(change(content, content.index(b"PK\1\2")))
    with pytest.raises(CheckpointError, match="x.pt is (damaged|cut off)"):
        pickled.read(path)


def test_a_storage_that_does_not_lie_where_the_list_says(tmp_path):
    path = archive(tmp_path / "x.pt", TENSOR + b".")
    content = path.read_bytes()
    at = content.index(b"PK\1\2", content.index(b"PK\1\2") + 4) + 42  # where the second entry's place stands
    path.write_bytes(content[:at] + (content[at] + 8).to_bytes(1, "little") + content[at + 1 :])
    with pytest.raises(CheckpointError, match="x/data/0 does not lie where its list says"):
        pickled.read(path)


def test_a_tensor_of_that_form_is_read_where_it_lies(tmp_path):
    found = pickled.read(archive(tmp_path / "x.pt", TENSOR + b"."))
    assert isinstance(found, Stored) and found.path == tmp_path / "x.pt" and found.read().tolist() == [0] * 16
    with pytest.raises(CheckpointError, match="is compressed"):
        pickled.read(archive(tmp_path / "y.pt", TENSOR + b".", zipfile.ZIP_DEFLATED))


def test_copies_are_compared_however_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "_BLOCK", 16)
    one = torch.arange(40.0).view(8, 5)
    torch.save({"rows": one, "columns": one.t().contiguous().t(), "other": one + 1}, tmp_path / "x.pt")
    found = pickled.read(tmp_path / "x.pt")
    assert shares.same(found["rows"], found["columns"]) and not shares.same(found["other"], found["columns"])


def test_an_old_file_with_more_than_tensors_is_told_in_our_words(tmp_path):
    torch.save({"args": Namespace(a=1), "x": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="asks for argparse.Namespace") as told:
        pickled.read(tmp_path / "x.pt")
    assert "weights_only" not in str(told.value) + told.value.fix and told.value.fix


def test_parts_of_several_types_keep_the_widest(tmp_path):
    tensors = {name: tensor + 1e-3 for name, tensor in llama_tensors().items()} | {Q: llama_tensors()[Q].bfloat16()}
    source = hf.open_source(write(tmp_path / "hf", LLAMA, tensors))
    assert source.dtype(QKV) == torch.float32 == source.read(QKV).dtype
    convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")[K], tensors[K])


def test_numbers_that_a_type_cannot_hold_are_told(tmp_path):
    name, value = "model.norm.weight", llama_tensors()["model.norm.weight"].clone()
    value[:3] = 1e-9
    convert_from = write(tmp_path / "hf", LLAMA, llama_tensors() | {name: value})
    assert "3 numbers in 1 tensors, such as decoder.final_layernorm.weight, are too small for fp16" in convert(
        convert_from, tmp_path / "half", "--to", "hf", "--dtype", "fp16"
    )
    value[0] = 1e6
    halves = {key: one.half() for key, one in (llama_tensors() | {name: value}).items()}
    large = hf.open_source(write(tmp_path / "large", LLAMA, llama_tensors() | {name: value}))
    found = {one.name: one for one in compare(large, hf.open_source(write(tmp_path / "infinite", LLAMA, halves)))}
    assert found["decoder.final_layernorm.weight"].kind == "different"
    found = {one.name: one for one in compare(hf.open_source(convert_from), hf.open_source(tmp_path / "half"))}
    assert (found["decoder.final_layernorm.weight"].kind, found["decoder.final_layernorm.weight"].zeroed) == ("rounded", 3)


def test_layers_beyond_the_models_and_chunks_that_overlap(tmp_path):
    convert(write(tmp_path / "hf", LLAMA, llama_tensors()), tmp_path / "ours")
    weights = tmp_path / "ours" / "release"
    args = torch_dist.settings(weights)
    model = megatron.model_with_ids(vars(args) | {"num_layers": 1}, "args", None)
    with pytest.raises(CheckpointError, match="is of 2 layers, and the model has 1"):
        torch_dist.open_source(weights, model)
    known = pickle.loads((weights / ".metadata").read_bytes())
    entry = known.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    entry.chunks[1] = entry.chunks[0]
    (weights / ".metadata").write_bytes(pickle.dumps(known))
    with pytest.raises(UserError, match="chunks of decoder.layers.mlp.linear_fc2.weight do not make up"):
        convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    (weights / ".metadata").write_bytes(pickle.dumps([known]))
    with pytest.raises(UserError, match="metadata is damaged") as told:
        convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    assert told.value.fix


def test_layers_that_are_not_stacked(tmp_path):
    """As megatron-core saves a model whose layers differ: a tensor for each."""
    convert(write(tmp_path / "hf", LLAMA, llama_tensors()), tmp_path / "ours")
    place = tmp_path / "ours" / "release" / ".metadata"
    known = pickle.loads(place.read_bytes())
    stacked = {key: one for key, one in known.state_dict_metadata.items() if key.startswith("decoder.layers.") and hasattr(one, "chunks")}
    for key, one in stacked.items():
        for number, chunk in enumerate(one.chunks):
            apart = key.replace("layers.", f"layers.{number}.")
            first = torch.Size(chunk.offsets[1:])
            chunks = [metadata.ChunkStorageMetadata(first, torch.Size(chunk.sizes[1:]))]
            known.state_dict_metadata[apart] = metadata.TensorStorageMetadata(one.properties, torch.Size(one.size[1:]), chunks)
            known.storage_data[metadata.MetadataIndex(apart, first)] = known.storage_data[metadata.MetadataIndex(key, chunk.offsets)]
    place.write_bytes(pickle.dumps(known))
    with pytest.raises(UserError, match="not known: .*decoder.layers.0.self_attention.linear_qkv.weight, besides the stacked one"):
        convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    for key in stacked:
        del known.state_dict_metadata[key]
    place.write_bytes(pickle.dumps(known))
    convert(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert len(stacked) == 6 and all(torch.equal(back[name], one) for name, one in llama_tensors().items())


@pytest.mark.parametrize(
    "config, change, reason",
    [
        (LLAMA, {"hidden_size": "8"}, "hidden_size is '8', and a whole number"),
        (LLAMA, {"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        (LLAMA, {"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size and num_attention_heads are 8 and 3"),
        (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads and num_key_value_heads are 4 and 3"),
        (LLAMA, {"max_position_embeddings": "16"}, "max_position_embeddings is '16'"),
        (LLAMA, {"vocab_size": -1}, "vocab_size is -1"),
        (LLAMA, {"vocab_size": 1 << 70}, "vocab_size is 1180591620717411303424, a whole number"),
        (LLAMA, {"num_hidden_layers": 1_000_000_000}, "num_layers is 1000000000, a whole number"),
        (LLAMA, {"head_dim": 1 << 23}, "4 attention heads of 8388608 are more than a model has"),
        (LLAMA, {"model_type": {}}, "model_type {} is none of"),
        (LLAMA, {"rope_theta": "x"}, "rope_theta is 'x', and a number"),
        (LLAMA, {"rope_scaling": [1]}, r"rope_scaling is \[1\], and an object"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "the engine has no partial_rotary_factor=0.5"),
        (LLAMA, {"rms_norm_eps": "small"}, "norm_epsilon is 'small', a number is wanted"),
        (GPT2, {"n_head": 3}, "n_embd and n_head are 8 and 3"),
        (YUAN, {"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    ],
)
def test_values_of_config_json_that_are_none(config, change, reason):
    with pytest.raises(CheckpointError, match=f"the/config.json: {reason}"):
        hf.model_of({key: value for key, value in config.items() if key != "head_dim"} | change, "the/config.json")


def test_indexes_that_name_no_files_or_not_all(tmp_path):
    folder = write(tmp_path / "hf", LLAMA, llama_tensors(), 3)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for name in (3, "a\0b", ["x"]):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(UserError, match="no name of a file|cannot be read"):
            convert(folder, folder, "--verify")
    index.write_text(json.dumps(whole))
    first = sorted(set(whole["weight_map"].values()))[0]
    (folder / "model-9.safetensors").write_bytes((folder / first).read_bytes())
    assert hf.open_source(folder).left_out == {"model-9.safetensors": "a file that the index does not name"}
    (folder / "model-9.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="both model.safetensors and model.safetensors.index.json"):
        hf.open_source(folder)
