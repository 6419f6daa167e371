"""int8 weights: the numbers, in which formats they lie and how, what is refused. What they answer: test_logits.py."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from checkpoints.convert import open_source  # noqa: E402
from checkpoints.files import mindspore  # noqa: E402
from checkpoints.folder import CheckpointError  # noqa: E402
from checkpoints.quantize import quantize  # noqa: E402
from checkpoints.recognise import recognise  # noqa: E402
from launcher.cli import app  # noqa: E402
from launcher.errors import UserError  # noqa: E402
from tests.checkpoints.folders import LLAMA, llama_tensors, write  # noqa: E402
from tests.checkpoints.mindspore_fixtures import encoded  # noqa: E402

MATRICES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def yuan(*words: object) -> str:
    """What `yuan` said; a mistake is raised as it would be printed."""
    done = CliRunner().invoke(app, list(map(str, words)))
    if isinstance(done.exception, Exception):
        raise done.exception
    return done.output


def read(path) -> dict[str, torch.Tensor]:
    found = open_source(recognise(path))
    return {tensor.name: found.read(tensor.name) for tensor in found.tensors}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hf") / "llama", LLAMA, llama_tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1 << 20, 100])
def test_numbers(monkeypatch, dtype, block):
    monkeypatch.setattr("checkpoints.quantize._BLOCK", block)
    weight = torch.randn(37, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[5], weight[6, 3] = 0, -9
    numbers, scale, error = quantize(weight)
    w = weight.float().numpy()
    steps = 2 * np.abs(w).max(1) / 255
    steps[5] = 1
    q = np.clip(np.rint(w / steps[:, None]), -128, 127)
    assert numbers.dtype == torch.int8 and scale.dtype == torch.float32
    assert np.array_equal(numbers.numpy(), q) and np.allclose(scale.numpy(), steps, rtol=1e-6)
    assert error == pytest.approx(np.linalg.norm(w - q * steps[:, None]) / np.linalg.norm(w), rel=1e-5) and 0.002 < error < 0.01
    assert numbers[6, 3] in (-127, -128) and not numbers[5].any()  # -127.5 steps


def test_nan_cannot_be_quantized():
    with pytest.raises(CheckpointError, match="w holds NaN or infinity"):
        quantize(torch.tensor([[1.0, float("nan")]]), "w")


def test_torch_dist_and_mindspore_hold_the_same_numbers(hf, tmp_path):
    said = yuan("convert", hf, tmp_path / "ours", "--quantize", "int8", "--dtype", "bf16")
    rows = [line.split() for line in said.splitlines() if line.startswith("    ")]
    assert [row[0] for row in rows] == ["0", "1"] and all(0.1 < float(one[:-1]) < 1 for row in rows for one in row[1:])
    found, whole = read(tmp_path / "ours"), llama_tensors()
    assert {name.split(".", 3)[3].removesuffix(".weight_scale") for name in found if name.endswith("_scale")} == set(MATRICES)
    numbers, scale, error = quantize(whole["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(found["decoder.layers.1.mlp.linear_fc2.weight"], numbers)
    assert torch.equal(found["decoder.layers.1.mlp.linear_fc2.weight_scale"], scale)
    assert torch.equal(found["output_layer.weight"], whole["lm_head.weight"].bfloat16())
    manifest = json.loads((tmp_path / "ours" / "release" / "conversion.json").read_text())
    assert manifest["errors"]["decoder.layers.1.mlp.linear_fc2.weight"] == error
    words = ("--to", "mindspore", "--tp", 2, "--fused-layout", "concat", "--dtype", "fp16")
    yuan("convert", tmp_path / "ours", tmp_path / "ms", *words)
    yuan("convert", hf, tmp_path / "direct", *words, "--quantize", "int8")
    again, direct = read(tmp_path / "ms"), read(tmp_path / "direct")
    assert again.keys() == direct.keys() == found.keys()
    for name, tensor in found.items():
        assert torch.equal(again[name], tensor if tensor.dtype == torch.int8 else tensor.half())
        assert torch.equal(direct[name], again[name]) or tensor.dtype == torch.bfloat16  # on its way by bf16 it was rounded


def test_verify_compares_what_int8_stands_for(hf, tmp_path):
    yuan("convert", hf, tmp_path / "ours", "--quantize", "int8")
    done = CliRunner().invoke(app, ["convert", str(hf), str(tmp_path / "ours"), "--verify"])
    assert done.exit_code == 1 and "tensors    15: 7 the same bit for bit, 8 differ" in done.output
    assert "mlp.linear_fc2.weight: fp32 and int8: 96 of 96 numbers differ, by up to 0.0" in done.output


def test_mindspores_names_are_golden_sticks(hf, tmp_path):
    yuan("convert", hf, tmp_path / "ms", "--to", "mindspore", "--tp", 2, "--fused-layout", "concat", "--dtype", "fp16", "--quantize", "int8")
    ranks = [mindspore.read(tmp_path / "ms" / f"rank_{number}" / f"checkpoint_{number}.ckpt") for number in range(2)]
    at = "model.layers.0."
    shapes = {
        f"{at}attention.w_qkv._layer.weight": (8, 8), f"{at}attention.w_qkv._layer.matmul.t_scale": (8,),
        f"{at}attention.wo._layer.weight": (8, 4), f"{at}attention.wo._layer.matmul.t_scale": (8,),
        f"{at}feed_forward.w_gate_hidden._layer.weight": (12, 8), f"{at}feed_forward.w_gate_hidden._layer.matmul.t_scale": (12,),
        f"{at}feed_forward.w2._layer.weight": (8, 6), f"{at}feed_forward.w2._layer.matmul.t_scale": (8,),
        f"{at}attention_norm.weight": (8,), f"{at}ffn_norm.weight": (8,),
    }  # fmt: skip
    for rank in ranks:
        assert {name: one.shape for name, one in rank.items() if name.startswith(at)} == shapes
        assert all(one.dtype == (torch.int8 if "_layer.weight" in name else torch.float16) for name, one in rank.items())
    name = f"{at}attention.wo._layer.matmul.t_scale"  # of all columns, not of a rank's
    assert torch.equal(ranks[0][name].read(), ranks[1][name].read())
    q = quantize(llama_tensors()["model.layers.0.self_attn.q_proj.weight"])[0]
    assert torch.equal(ranks[1][f"{at}attention.w_qkv._layer.weight"].read()[:4], q[4:])


def test_zero_points_may_be_there_and_must_be_zero(hf, tmp_path):
    yuan("convert", hf, tmp_path / "ms", "--to", "mindspore", "--fused-layout", "separate", "--dtype", "fp16", "--quantize", "int8")
    path = tmp_path / "ms" / "rank_0" / "checkpoint_0.ckpt"
    content, name = path.read_bytes(), "model.layers.0.attention.wo._layer.matmul.t_zp_neg"
    path.unlink()
    path.write_bytes(content + encoded({name: torch.zeros(8).half()}))
    assert open_source(recognise(tmp_path / "ms")).left_out[name] == "zero points of symmetric weights: zeros"
    path.write_bytes(content + encoded({name: torch.ones(8).half()}))
    with pytest.raises(CheckpointError, match="t_zp_neg has zero points other than 0"):
        open_source(recognise(tmp_path / "ms"))


def test_what_is_refused(hf, tmp_path):
    with pytest.raises(UserError, match="hf has no weights in int8"):
        yuan("convert", hf, tmp_path / "to", "--to", "hf", "--quantize", "int8")
    yuan("convert", hf, tmp_path / "ours", "--quantize", "int8")
    with pytest.raises(UserError, match="has weights in int8 already"):
        yuan("convert", tmp_path / "ours", tmp_path / "to", "--quantize", "int8")
    words = ("model.quantize=int8", "launch.device=cpu", "launch.nproc_per_node=1")
    assert "weights in int8 cannot be trained" in CliRunner().invoke(app, ["check", "recipe=345m_1dp", *words]).output
    found = CliRunner().invoke(app, ["check", "recipe=345m_1dp", "launch.device=cpu", f"checkpoint.load={tmp_path / 'ours'}"]).output
    assert "int8 weights are for answers alone" in found
