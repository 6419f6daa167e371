"""A training goes on from another format and layout, with what Adam remembers, and the files are those that a run saves."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from checkpoints.convert import open_source  # noqa: E402
from checkpoints.folder import newest_checkpoint  # noqa: E402
from checkpoints.recognise import recognise  # noqa: E402
from checkpoints.verify import compare  # noqa: E402
from launcher.cli import app  # noqa: E402
from launcher.recipe.converted import model_of  # noqa: E402
from launcher.recipe.frozen import own_recipe  # noqa: E402

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


def command(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


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


def test_what_lies_behind_a_padded_bucket_is_saved_where_it_belongs(trained):
    """megatron-core 0.16 itself would go on from another loss: it saves a tied table's fp32 weights and moments shifted."""
    losses = json.loads((trained / "found.json").read_text())["losses"]["padded"]
    assert losses[:2] == losses[2:]
    assert command(trained / "padded", trained / "padded_torch", "--to", "torch", "--pp", "2", "--optimizer", "keep").exit_code == 0
    assert same(trained / "padded", trained / "padded_torch")


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


def rank_file(folder):
    return newest_checkpoint(folder) / "mp_rank_00" / "model_optim_rng.pt"


def test_at_the_same_layout_the_files_come_back_as_they_were(trained):
    """By way of torch_dist, random numbers' states too: only what other programs look for is there besides."""
    assert command(trained / "gpt2", trained / "there", "--optimizer", "keep").exit_code == 0
    assert command(trained / "there", trained / "back", "--to", "torch", "--tp", 2, "--optimizer", "keep").exit_code == 0
    for one, other in zip(*(sorted(newest_checkpoint(trained / name).glob("*/*.pt")) for name in ("gpt2", "back")), strict=True):
        first, again = (torch.load(path, weights_only=False) for path in (one, other))
        for state in (first["rng_state"][0], again["rng_state"][0]):
            state["np_rng_state"] = [part.tolist() if hasattr(part, "tolist") else part for part in state["np_rng_state"]]
        for group in again["optimizer"]["param_groups"]:
            assert group.pop("step") == 2
        assert first.keys() == again.keys() and all(alike(first[key], again[key]) for key in first if key != "args")
    assert "rng_state" not in json.loads((newest_checkpoint(trained / "back") / "conversion.json").read_text())["left_out"]


def test_verify_tells_trainings_apart(trained):
    done = command(trained / "gpt2", trained / "gpt2_zero", "--verify")
    assert done.exit_code == 0 and "training   step 2: with Adam's tensors" in done.output and "208 the same bit for bit" in done.output
    other = trained / "other"
    write_changed(trained / "llama_fp16", other, lambda content: content["optimizer"]["grad_scaler"].update(growth_tracker=7))
    done = command(trained / "llama_fp16", other, "--verify")
    assert done.exit_code == 1 and "differs    grad_scaler" in done.output and ", 0 differ" in done.output


def write_changed(folder, other, change):
    """A copy of a checkpoint of one rank whose file `change` has changed."""
    shutil.copytree(folder, other)
    content = torch.load(rank_file(other), weights_only=False)
    change(content)
    torch.save(content, rank_file(other))


def first_state(content):
    return content["optimizer"]["optimizer"]["state"][0]


@pytest.mark.parametrize("change, fault", [
    (lambda content: content["optimizer"]["fp32_from_fp16_params"][0][1].mul_(2), "what should be the fp32 weights of"),
    (lambda content: first_state(content).pop("exp_avg"), "exp_avg of embedding.word_embeddings.weight [128, 32] is missing"),
    (lambda content: first_state(content).update(exp_avg_sq=torch.zeros(3)), "exp_avg_sq of embedding.word_embeddings.weight [128, 32] is [3]"),
    (lambda content: content["optimizer"]["optimizer"].update(state={}), "holds no moments"),
    (lambda content: content["optimizer"]["optimizer"]["param_groups"].append(content["optimizer"]["optimizer"]["param_groups"][0]), "parameter groups that are not carried"),
    (lambda content: content["optimizer"]["optimizer"]["param_groups"][0]["params"].pop(), "its optimizer's parameters are not the model's"),
    (lambda content: content.pop("opt_param_scheduler"), "no optimizer's state with its schedule"),
    (lambda content: content.pop("optimizer"), "holds no optimizer's state"),
])  # fmt: skip
def test_damaged_states_are_refused(trained, tmp_path, change, fault):
    write_changed(trained / "llama_fp16", tmp_path / "changed", change)
    done = command(tmp_path / "changed", tmp_path / "target", "--optimizer", "keep")
    assert done.exit_code and fault in str(done.exception) and not (tmp_path / "target").exists()


def test_flat_buffers_of_another_model_are_refused(trained, tmp_path):
    shutil.copytree(trained / "gpt2_bf16", tmp_path / "changed")
    path = rank_file(tmp_path / "changed").with_name("distrib_optim.pt")
    content = torch.load(path, weights_only=False)
    (buffer,) = content[0].values()
    for key in ("param", "exp_avg", "exp_avg_sq"):
        buffer[key] = buffer[key][64:].clone()
    torch.save(content, path)
    done = command(tmp_path / "changed", tmp_path / "target", "--optimizer", "keep")
    assert done.exit_code and "numbers for each of Adam's tensors, and the model's" in str(done.exception)
    path.unlink()
    done = command(tmp_path / "changed", tmp_path / "target", "--optimizer", "keep")
    assert done.exit_code and "distrib_optim.pt is missing beside it" in str(done.exception)


def test_a_state_that_its_data_parallel_ranks_cut_up_is_refused(trained, tmp_path):
    shutil.copytree(trained / "gpt2_zero", tmp_path / "changed")
    path = newest_checkpoint(tmp_path / "changed") / "common.pt"
    content = torch.load(path, weights_only=False)
    content["optimizer"]["param_state_sharding_type"] = "dp_reshardable"
    torch.save(content, path)
    done = command(tmp_path / "changed", tmp_path / "target", "--optimizer", "keep")
    assert done.exit_code and "cut up by the data-parallel ranks that saved it (dp_reshardable)" in str(done.exception)


@pytest.mark.parametrize("words, fault", [
    (["--to", "hf"], "hf holds no optimizer's state"), (["--dtype", "bf16"], "in the precision that it has"),
    (["--to", "torch", "--tp", 3], "cannot be shared out over TP 3"), (["--to", "torch", "--pp", 2, "--num-layers-per-virtual-pipeline-stage", 3], "stages of 3 layers, and the model has 4"),
])  # fmt: skip
def test_what_cannot_be_carried_is_refused(trained, tmp_path, words, fault):
    done = command(trained / "gpt2", tmp_path / "target", "--optimizer", "keep", *words)
    assert done.exit_code and fault in str(done.exception) and not (tmp_path / "target").exists()


def test_weights_alone_have_no_state(trained, tmp_path):
    said = command(trained / "gpt2", tmp_path / "weights").output
    assert "weights alone are converted, unless --optimizer keep" in said
    done = command(tmp_path / "weights", tmp_path / "target", "--optimizer", "keep")
    assert done.exit_code and "holds weights alone" in str(done.exception)


def test_names_of_transformer_engine_come_in_its_order(trained, tmp_path):
    """Its layers have the norm as their first parameters, and register the projection before them."""
    assert command(trained / "gpt2", tmp_path / "fused", "--to", "torch", "--optimizer", "distributed", "--transformer-impl", "transformer_engine").exit_code == 0
    names = [name for name, one in torch.load(rank_file(tmp_path / "fused"), weights_only=False)["model"].items() if one is not None and ".0." in name]
    at = "decoder.layers.0."
    assert names == [
        f"{at}self_attention.linear_proj.weight", f"{at}self_attention.linear_proj.bias",
        *(f"{at}{module}.{name}" for module in ("self_attention.linear_qkv", "mlp.linear_fc1") for name in ("layer_norm_weight", "layer_norm_bias", "weight", "bias")),
        f"{at}mlp.linear_fc2.weight", f"{at}mlp.linear_fc2.bias",
    ]  # fmt: skip
    assert same(trained / "gpt2", tmp_path / "fused")
