"""Yuan 2.0 at every layout against a reference in plain PyTorch: logits, loss, gradients, and going on from a checkpoint."""

import json

import pytest

from tests.launcher.engine import yuan2_worker as worker
from tests.launcher.engine.runs import executed, losses, yuan

TINY = """model.num_layers=2 model.hidden_size=32 model.ffn_hidden_size=128 model.num_attention_heads=4
model.make_vocab_size_divisible_by=64 training.seq_length=32 training.micro_batch_size=4 training.global_batch_size=8
training.train_iters=8 optimizer.lr=1e-2 optimizer.lr_warmup_iters=2 data.data_path=ids tokenizer.type=NullTokenizer
tokenizer.tokenizer_model=null tokenizer.vocab_size=255 logging.log_interval=1 logging.tensorboard=false launch.device=cpu
launch.nproc_per_node=1 launch.cpu_threads=1"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What four ranks found: for each layout the largest differences from the reference."""
    folder = tmp_path_factory.mktemp("yuan2")
    (folder / "tokenizer").mkdir()
    executed(worker.__file__, folder)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", worker.LAYOUTS)
def test_logits_loss_and_every_gradient_are_the_references(found, name):
    differences = dict(found[name])
    assert differences.pop("logits") < 1e-4 and differences.pop("loss") < 1e-5
    differences.pop("next", None)
    gradients = [key for key in differences if key.startswith("gradient")]
    assert len(gradients) == (0 if "zero1" in name else 4 * 12 + 2)  # ZeRO-1 has shares of them, and their norm
    assert max(differences.values()) < 1e-4, differences


def test_a_run_goes_on_at_another_layout(found):
    assert found[worker.LOADED]["next"] == pytest.approx(found[worker.SAVED]["next"], abs=1e-4)


def test_its_size_is_the_one_that_check_tells(found):
    built, told = found["parameters"]
    assert built == told


def test_the_filter_begins_as_torchs_convolutions_do(found):
    """Uniform in ± 1 / sqrt(2 x inputs), 32 and 16 of them; the standard deviation of that is its bound / sqrt(3)."""
    for name, inputs in (("conv1", 32), ("conv2", 16)):
        bound = (2 * inputs) ** -0.5
        largest, deviation = found["initial"][f"{name}.weight"]
        assert 0.98 * bound < largest <= bound and deviation == pytest.approx(bound / 3**0.5, rel=0.1)
        assert 0 < found["initial"][f"{name}.bias"][0] <= bound


def test_the_released_weights_angles_have_the_values_of_bf16(found):
    assert found["angles"] == [769, 897, "torch.bfloat16"]  # of 4,096 and of 8,192 positions, measured in Yuan 2.0's code


def test_the_recipe_of_the_smallest_trains_at_a_tiny_size(small):
    yuan(small, "pretrain", "recipe=yuan2_2b", "run.name=yuan2", *TINY.split())
    curve = losses(small, "yuan2")
    assert len(curve) == 8 and curve[8] < curve[1] - 0.5  # in bf16, recomputed, with RoPE by position id, as the recipe says
