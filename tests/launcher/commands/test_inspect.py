"""`yuan inspect` and `yuan convert --verify` as typed: what is told of every format, and what is found wrong."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from tests.checkpoints import mindspore_fixtures
from tests.checkpoints.folders import GPT2, LLAMA, gpt2_tensors, llama_tensors, write

torch = pytest.importorskip("torch")


def yuan(*words: object, code: int = 0) -> str:
    """What `yuan` said, its exit code being `code`."""
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same Llama in every format: hf (two files), torch_dist, torch at TP 2 x PP 2, mindspore on two ranks."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "hf", LLAMA, llama_tensors(), shards=2)
    yuan("convert", folder / "hf", folder / "torch_dist")
    yuan("convert", folder / "hf", folder / "torch", "--to", "torch", "--tp", 2, "--pp", 2)
    yuan("convert", folder / "hf", folder / "mindspore", "--to", "mindspore", "--tp", 2, "--fused-layout", "concat")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    def copied(name: str):
        shutil.copytree(made / name, tmp_path / name)
        return tmp_path / name

    return copied


PARAMETERS = sum(tensor.numel() for tensor in llama_tensors().values())


@pytest.mark.parametrize(
    "format, told",
    [
        ("hf", [r"checkpoint .*hf: hf, "]),
        ("torch_dist", ["torch_dist/release: torch_dist, ", r"besides .*117 rows that pad the vocabulary", "made of .*hf: hf"]),
        ("torch", ["torch/release: torch, 4 files", "layout +TP 2, PP 2"]),
        ("mindspore", ["mindspore: mindspore, 2 files", "made of"]),
    ],
)
def test_what_is_told(made, format, told):
    for words in ((), ("--deep",)):
        said = yuan("inspect", made / format, *words)
        for pattern in (*told, "model +llama: 2 layers, hidden 8, 4 heads in 2 groups, vocabulary 11", f"parameters {PARAMETERS:,}", "dtype +fp32", "tokenizer +none"):
            assert re.search(pattern, said), (pattern, said)
        assert re.search(r"problems   none$" if words else "problems   none in names, shapes and sizes; --deep reads every number", said, re.M)


def cut(path):
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("format, file", [
    ("hf", "model-00001-of-00002.safetensors"), ("torch", "release/mp_rank_01_001/model_optim_rng.pt"), ("mindspore", "rank_1/checkpoint_1.ckpt"),
    ("torch_dist", "release/__0_0.distcp"),
])  # fmt: skip
def test_a_file_that_is_cut_off_and_one_that_is_missing(copy, format, file):
    folder = copy(format)
    cut(folder / file)
    said = yuan("inspect", folder, code=1)
    assert re.search(rf"problem    .*{re.escape(file.rsplit('/', 1)[-1])}.*cut off", said), said
    assert "\n  fix      copy" in said
    (folder / file).unlink()
    said = yuan("inspect", folder, code=1)
    assert re.search("problem .*(which is not there|has no weights .* for mp_rank_01_001|has no .ckpt for rank_1)", said), said
    assert "\n  fix      copy" in said


def test_every_damaged_file_is_named(copy):
    folder = copy("hf")
    for number in (1, 2):
        cut(folder / f"model-0000{number}-of-00002.safetensors")
    said = yuan("inspect", folder, code=1)
    assert said.count("problem ") == 2 and "model-00001" in said and "model-00002" in said


def test_numbers_that_are_none_and_others_than_were_written(copy, tmp_path):
    tensors = gpt2_tensors()
    tensors["transformer.h.1.mlp.c_fc.weight"][2, 3:5] = float("nan")
    tensors["transformer.ln_f.bias"][0] = float("inf")
    write(tmp_path / "gpt2", GPT2, tensors)
    yuan("inspect", tmp_path / "gpt2")
    said = yuan("inspect", tmp_path / "gpt2", "--deep", code=1)
    assert "decoder.layers.1.mlp.linear_fc1.weight: 2 of its 256 numbers are NaN or infinite" in said
    assert "decoder.final_layernorm.bias: 1 of its 8 numbers" in said
    folder = copy("mindspore")
    path = folder / "rank_1" / "checkpoint_1.ckpt"
    content = bytearray(path.read_bytes())
    content[content.index(b"layers.1.feed_forward.w2.weight") + 60] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    yuan("inspect", folder)
    assert "decoder.layers.1.mlp.linear_fc2.weight is not what conversion.json says" in yuan("inspect", folder, "--deep", code=1)


def test_a_smaller_vocabulary_is_no_damage(made):
    assert "problems   none" in yuan("inspect", made / "mindspore", "--deep", "--vocab-size", 10)


def test_tensors_that_are_missing_or_of_another_shape(tmp_path):
    tensors = llama_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 3)
    said = yuan("inspect", write(tmp_path / "hf", LLAMA, tensors), code=1)
    assert "missing: model.norm.weight" in said and "model.layers.0.mlp.up_proj.weight is [3, 3], and [12, 8] was expected" in said


def test_files_that_say_nothing_of_the_model(tmp_path):
    whole = mindspore_fixtures.parts()
    folder = mindspore_fixtures.write(tmp_path / "ms", [mindspore_fixtures.rank(whole, "grouped", number, 2) for number in range(2)])
    assert re.search("model +not known: .*--hf-config DIR", yuan("inspect", folder))
    (tmp_path / "config.json").write_text(json.dumps(mindspore_fixtures.config(4, 4, 40)))
    assert re.search("model +not known: .*--source-fused-layout", yuan("inspect", folder, "--hf-config", tmp_path))
    assert "llama: 4 layers, hidden 32" in yuan("inspect", folder, "--hf-config", tmp_path, "--fused-layout", "grouped")


def test_no_checkpoint(tmp_path):
    assert "no whole checkpoint in" in yuan("inspect", tmp_path, code=1)


def test_all_formats_hold_the_same(made):
    for one, other in (("hf", "torch_dist"), ("torch_dist", "mindspore"), ("mindspore", "torch"), ("torch", "hf")):
        assert "tensors    15: 15 the same bit for bit, 0 differ" in yuan("convert", made / one, made / other, "--verify")


def test_verify_says_what_differs(made, tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.1.self_attn.v_proj.weight"][2, 3] += 0.5
    write(tmp_path / "hf", LLAMA | {"rms_norm_eps": 1e-6}, tensors)
    said = yuan("convert", made / "mindspore", tmp_path / "hf", "--verify", code=1)
    assert "differs    norm_epsilon: 1e-05 and 1e-06" in said
    assert re.search(r"differs    decoder.layers.1.self_attention.linear_qkv.weight: fp32: 1 of 128 numbers differ, by up to 0\.5, ", said)
    assert "14 the same bit for bit, 1 differ" in said
    yuan("convert", made / "hf", tmp_path / "bf16", "--dtype", "bf16")
    assert "15 but for rounding, 0 differ" in yuan("convert", made / "torch", tmp_path / "bf16", "--verify")
    write(tmp_path / "gpt2", GPT2, gpt2_tensors())
    said = yuan("convert", made / "hf", tmp_path / "gpt2", "--verify", code=1)
    assert "differs    family: llama and gpt2" in said and "only in" in said
