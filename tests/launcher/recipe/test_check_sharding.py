"""What ZeRO's stages, the host's memory and torch.compile need, said before a launch."""

import pytest

from launcher.recipe import load
from launcher.recipe.check import check
from launcher.recipe.estimate.memory import BAND, stage_memory
from launcher.recipe.problem import Problem

BASE = """
model: {num_layers: 8, hidden_size: 96, num_attention_heads: 4}
training: {seq_length: 16, micro_batch_size: 2, global_batch_size: 16, train_iters: 100}
optimizer: {lr: 1.0e-3}
tokenizer: {type: NullTokenizer, vocab_size: 50}
data: {data_path: data_text_document, split: '8,1,1'}
launch: {device: cpu, nproc_per_node: 4}
"""
OFFLOAD = "optimizer.optimizer_cpu_offload=true"
HOLLOW = "parallel.pipeline_model_parallel_size=4 parallel.pipeline_model_parallel_layout=Et*4|||t*4L"
ACTIVATIONS = "parallel.cpu_offloading_num_layers=7"


@pytest.fixture
def problems(write_recipe, write_data):
    write_recipe("base", BASE)
    write_data("data_text_document", [20] * 200)

    def ask(words: str, verb: str = "pretrain") -> list[Problem]:
        loaded = load(["recipe=base", *words.split()])
        return [problem for problem in check(loaded.recipe, loaded.sources, verb) if "GPU" not in problem.what or "this is a CPU" in problem.what]

    return ask


@pytest.mark.parametrize("words", [
    "parallel.zero=1", "parallel.zero=2", "parallel.zero=3 training.precision=bf16",
    "parallel.zero=3 parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true",
    f"launch.device=cuda training.precision=bf16 parallel.use_distributed_optimizer=true {OFFLOAD} optimizer.optimizer_offload_fraction=0.5",
    f"launch.device=cuda training.precision=bf16 {ACTIVATIONS}",
])  # fmt: skip
def test_sound(problems, words):
    assert problems(words) == []


@pytest.mark.parametrize(("words", "what", "fix"), [
    ("parallel.zero=4", "no 4", "parallel.zero=1 or 2 or 3, or null"),
    ("parallel.zero=1 parallel.use_distributed_optimizer=false", "stage 1 is the distributed", "parallel.use_distributed_optimizer=true"),
    ("parallel.zero=3 parallel.use_distributed_optimizer=true", "stage 3 shares out", "parallel.use_distributed_optimizer=false, or parallel.zero=1"),
    ("parallel.zero=2 parallel.pipeline_model_parallel_size=2", "every micro-batch", "parallel.pipeline_model_parallel_size=1, or parallel.zero=1"),
    ("parallel.zero=2 parallel.overlap_grad_reduce=true", "overlaps by itself", "parallel.overlap_grad_reduce=false"),
    ("parallel.zero=3 training.precision=fp16", "loss scale", "training.precision=bf16, or parallel.zero=1"),
    ("parallel.zero=3 checkpoint.format=torch", "none holds a whole tensor", "checkpoint.format=torch_dist"),
    ("parallel.zero=3 lora.rank=4 checkpoint.load=nowhere", "of adapters", "parallel.zero=1, or lora.rank=null"),
    (f"parallel.use_distributed_optimizer=true {HOLLOW}", "pipeline rank 1 and 2 would train nothing, and", "a layout with a t on each rank"),
    (f"training.precision=bf16 {HOLLOW}", "pipeline rank 1 and 2 would train nothing, and", "a layout with a t on each rank"),
    (f"parallel.use_distributed_optimizer=true {OFFLOAD}", "this is a CPU", "optimizer.optimizer_cpu_offload=false"),
    (ACTIVATIONS, "this is a CPU", "parallel.cpu_offloading_num_layers=0"),
    (f"launch.device=cuda training.precision=bf16 {OFFLOAD}", "distributed optimizer", "parallel.use_distributed_optimizer=true"),
    (f"launch.device=cuda parallel.zero=1 {OFFLOAD}", "of 16-bit weights alone", "training.precision=bf16"),
    ("launch.device=cuda parallel.cpu_offloading_num_layers=8", "of 8 layers", "parallel.cpu_offloading_num_layers=7"),
    (f"launch.device=cuda {ACTIVATIONS} parallel.recompute_granularity=selective", "not both", "parallel.recompute_granularity=null"),
    (f"launch.device=cuda {ACTIVATIONS} parallel.pipeline_model_parallel_size=2", "under a pipeline", "parallel.pipeline_model_parallel_size=1"),
    (f"launch.device=cuda {ACTIVATIONS} data.reset_attention_mask=true", "these are not they", "parallel.cpu_offloading_num_layers=0"),
    (f"launch.device=cuda {ACTIVATIONS} lora.rank=4 checkpoint.load=nowhere", "these are not they", "parallel.cpu_offloading_num_layers=0"),
    ("optimizer.optimizer_offload_fraction=1.5", "a share, not 1.5", "from 0 to 1"),
])  # fmt: skip
def test_refused_by_name_with_a_way_out(problems, words, what, fix):
    found = [problem for problem in problems(words) if what in problem.what]
    assert found and found[0].severity == "error" and fix in found[0].fix


def test_one_rank_has_nothing_to_share_out(problems):
    (found,) = problems("parallel.zero=3 launch.nproc_per_node=1")
    assert found.severity == "warning" and "there is one" in found.what


def test_a_missing_compiler_is_named(problems, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (found,) = problems("training.torch_compile=true")
    assert "no no-such-compiler here" in found.what and "training.torch_compile=false" in found.fix


def test_what_transformer_engine_leaves_nothing_of_is_compiled_in_vain(problems):
    compiled = "launch.device=cuda training.precision=bf16 training.torch_compile=true"
    (found,) = problems(compiled)
    assert found.severity == "warning" and "changes nothing where Transformer Engine" in found.what
    assert problems(f"{compiled} data.reset_attention_mask=true") == []


def test_stage_1_is_the_distributed_optimizer(problems):
    loaded = load(["recipe=base", "parallel.zero=1"])
    assert loaded.recipe.parallel.use_distributed_optimizer and loaded.sources["parallel.use_distributed_optimizer"] == "derived"


def test_a_stage_on_the_command_line_puts_a_recipes_distributed_optimizer_aside(write_recipe):
    write_recipe("sharing", BASE + "parallel: {use_distributed_optimizer: true}\n")
    for zero in (1, 2, 3):
        assert load(["recipe=sharing", f"parallel.zero={zero}"]).recipe.parallel.use_distributed_optimizer == (zero == 1)


# GiB of a process, measured on two ranks as tests/benchmarks/README.md says.
MEASURED = {("gpt", 2): 2.99, ("gpt", 3): 2.72}


@pytest.mark.parametrize(("name", "zero"), MEASURED)
def test_memory_is_what_was_measured(name, zero):
    from tests.benchmarks.memory import COMMON, FUSED, GPT, TWO

    recipe = load([*COMMON.split(), *GPT.split(), *FUSED.split(), *TWO.split(), f"parallel.zero={zero}"]).recipe
    assert stage_memory(recipe)[0].total / 2**30 == pytest.approx(MEASURED[name, zero], rel=BAND)
