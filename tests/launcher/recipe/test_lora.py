"""LoRA in a recipe: what is refused and what instead, what follows by itself, and what the estimate takes off."""

import json

import pytest

from checkpoints.adapters import Adapters, fingerprint, note_of, write_note
from launcher.recipe import load
from launcher.recipe.check import check
from launcher.recipe.estimate.memory import stage_memory
from launcher.recipe.inference import inference_recipe
from launcher.recipe.frozen import write_frozen
from launcher.recipe.size import flops_per_token, parameters, trained_parameters
from launcher.run.changes import refusals
from tests.launcher.recipe.conftest import BASE

LLAMA = "tokenizer.type=NullTokenizer tokenizer.vocab_size=31999 tokenizer.tokenizer_model=null launch.gpu_memory_gib=80".split()

STAGES = ["parallel.pipeline_model_parallel_size=2", "launch.nproc_per_node=2"]


@pytest.fixture
def problems(write_recipe, write_data, workspace):
    """problems(*words) → what `check` says of BASE with lora.rank=4 beside the weights in `frozen` and these words."""
    write_recipe("base", BASE)
    write_data("data_text_document", [20] * 20)
    frozen = workspace / "frozen" / "iter_0000001"
    frozen.mkdir(parents=True)
    (frozen / "metadata.json").write_text("{}")
    (frozen / "__0_0.distcp").write_bytes(bytes(5000))
    (frozen.parent / "latest_checkpointed_iteration.txt").write_text("1")

    def ask(*words: str):
        loaded = load(["recipe=base", "checkpoint.load=frozen", "lora.rank=4", *words])
        return check(loaded.recipe, loaded.sources)

    assert ask() == []
    return ask


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["lora.target_modules=[q_proj]"], "a layer of gpt2 has no q_proj", "did you mean linear_qkv? the matrices are linear_qkv, linear_proj,"),
        (["lora.target_modules=[c_proj]"], "no c_proj", "did you mean linear_proj or linear_fc2?"),
        (["lora.target_modules=[model.layers.0.mlp.down_proj]"], "no model.layers.0.mlp.down_proj", "did you mean linear_fc2?"),
        (["lora.target_modules=[linear_qk]"], "no linear_qk", "did you mean linear_qkv?"),
        (["lora.target_modules=[embed_tokens]"], "no embed_tokens", "the matrices are linear_qkv"),
        (["lora.target_modules=[]"], "no matrix is to have adapters", "lora.target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2]"),
        (["lora.target_modules=[linear_fc1,linear_fc1]"], "linear_fc1 is named twice", "lora.target_modules=[linear_fc1]"),
        (["lora.rank=0"], "lora.rank must be at least 1", ""),
        (["lora.rank=900"], "adapters of rank 900 have more numbers than linear_proj itself", "or null to train all weights"),
        (["lora.dropout=1"], "lora.dropout must be below 1", ""),
        (["lora.alpha=0"], "lora.alpha must be above 0", ""),
        (["lora.alpha=inf"], "lora.alpha must be above 0, and finite", ""),
        (["lora.rank=null", "lora.alpha=8", "lora.dropout=0.1"], "lora.alpha and lora.dropout say nothing without lora.rank", "lora.rank=16"),
        (["checkpoint.format=torch"], "adapters are saved in torch_dist", "checkpoint.format=torch_dist"),
        (["checkpoint.load=null"], "adapters stand beside trained weights, and none are named", "checkpoint.load=RUN_OR_CHECKPOINT"),
        (["checkpoint.finetune=false"], "adapters begin at step 0", "checkpoint.finetune=true"),
        ([*STAGES, "parallel.pipeline_model_parallel_layout=E|t*8L"], "pipeline rank 0 would train nothing, without layers", "a t on each rank"),
        ([*STAGES, "parallel.pipeline_model_parallel_layout=Et*8|L"], "pipeline rank 1 would train nothing, without layers", "or lora.rank=null"),
    ],
)
def test_refused_with_the_way_out(problems, words, what, fix):
    found = [problem for problem in problems(*words) if what in problem.what]
    assert len(found) == 1 and found[0].severity == "error" and fix in found[0].fix, problems(*words)


@pytest.mark.parametrize("layout", ["Et*4|t*4L", "E|t*4|t*4|L"])  # interleaved, each rank has a layer
def test_stages_that_train_something_are_sound(problems, layout):
    assert problems(*STAGES, "training.micro_batch_size=1", f"parallel.pipeline_model_parallel_layout={layout}") == []


def test_one_fault_is_told_once(problems):
    assert len([one for one in problems("parallel.zero=2", *STAGES[1:]) if "ZeRO" in one.what]) == 1
    loaded = load(["recipe=base", "checkpoint.load=frozen", "lora.rank=4", "checkpoint.finetune=false", "data.train=rows.json"])
    assert len([one for one in check(loaded.recipe, loaded.sources, "sft") if "checkpoint.finetune" in one.where]) == 1


def test_yuans_matrices_are_named_as_yuan_has_them(problems):
    words = ["recipe=yuan2_2b_sft", "lora.rank=8", "checkpoint.load=frozen", *LLAMA]
    assert load(words).recipe.lora.target_modules == ["linear_qk", "linear_v", "linear_proj", "linear_fc1", "linear_fc2"]
    loaded = load([*words, "lora.target_modules=[linear_qkv,v_proj]"])
    fixes = [one.fix for one in check(loaded.recipe, loaded.sources, "sft") if "a layer of yuan2 has no" in one.what]
    assert ["did you mean linear_qk,linear_v?" in fixes[0], "did you mean linear_v?" in fixes[1]] == [True, True]


def test_weights_that_are_gone_or_changed_are_missed_before_a_process_starts(problems, workspace):
    frozen, run = workspace / "frozen", workspace / "runs" / "base" / "checkpoints" / "iter_0000002"
    run.mkdir(parents=True)
    (run / "metadata.json").write_text("{}")
    (run.parent / "latest_checkpointed_iteration.txt").write_text("2")
    write_note(run, note_of(frozen, 4, 8.0, ["linear_qkv"]))
    write_frozen(load(["recipe=base", "checkpoint.load=frozen", "lora.rank=4"]).recipe, run / "recipe.yaml")
    assert problems() == []
    moved = frozen.rename(workspace / "moved")
    (gone,) = [one for one in problems() if "which is not there" in one.what]
    assert str(frozen.resolve()) in gone.what and "lora.json" in gone.fix
    assert problems("checkpoint.load=moved") == []  # found where checkpoint.load says
    (moved / "iter_0000001" / "__0_0.distcp").write_bytes(bytes(4999) + b"1")
    (changed,) = [one for one in problems("checkpoint.load=moved") if "has other weights now" in one.what]
    assert str(moved) in changed.what
    (moved / "iter_0000001" / "__0_0.distcp").unlink()
    (moved / "iter_0000001" / "__0_0.distcp").symlink_to("/proc/self/mem")  # a file whose content cannot be read
    (unread,) = [one for one in problems("checkpoint.load=moved") if "cannot be read" in one.what]
    assert str(moved) in unread.what and "bring another copy" in unread.fix
    (run / "lora.json").write_text(json.dumps({"base": str(moved)}))
    assert any("lora.json cannot be read" in one.what and "lora.json of another checkpoint" in one.fix for one in problems())


def test_the_fingerprint_stays_where_files_are_copied_and_not_where_they_are_changed(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(3 << 20))
        (folder / "recipe.yaml").write_text(folder.name)  # no weights
        for other in (".cache/huggingface/download/model.safetensors.metadata", "tuned/model.safetensors", ".model.safetensors", "a.metadata"):
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_text(folder.name)  # none of this checkpoint
    assert fingerprint(folders[0]) == fingerprint(folders[1])
    for name in ("more.bin", ".metadata", "mp_rank_00/model_optim_rng.pt", "mp_rank_00_001/model_optim_rng.pt", "rank_0/model.ckpt"):
        before = fingerprint(folders[1])
        (folders[1] / name).parent.mkdir(exist_ok=True)
        (folders[1] / name).write_bytes(b"")
        assert fingerprint(folders[1]) not in (before, fingerprint(folders[0])), name


def test_what_answers_has_its_adapters_merged(problems, workspace):
    checkpoint = workspace / "frozen" / "iter_0000001"
    write_frozen(load(["recipe=base", "checkpoint.load=frozen", "lora.rank=4"]).recipe, checkpoint / "recipe.yaml")
    recipe, _ = inference_recipe(load(["generate.load=frozen"], default="generate"), checkpoint)
    assert recipe.lora.rank is None and recipe.model.num_layers


def test_a_run_keeps_its_adapters_size():
    old, new = (load(["recipe=llama2_7b_lora", f"lora.rank={rank}", *LLAMA]).recipe for rank in (16, 8))
    assert "another rank" in refusals(old, new)["lora.rank"] and "lora.rank" not in refusals(old, new, with_optimizer=False)
    whole = load(["recipe=llama2_7b_sft", *LLAMA]).recipe
    assert "adapters alone" in refusals(old, whole)["lora.rank"] and "all weights" in refusals(whole, old)["lora.rank"]
    other = load(["recipe=llama2_7b_lora", "lora.target_modules=[linear_qkv]", *LLAMA]).recipe
    assert list(refusals(old, other)) == ["lora.target_modules"]


def test_sizes_memory_and_arithmetic_are_those_of_adapters():
    adapted, whole = (load([f"recipe={name}", "launch.nproc_per_node=1", *LLAMA]).recipe for name in ("llama2_7b_lora", "llama2_7b_sft"))
    # by hand: 16 x (in + out) of 4096 x 12288, 4096 x 4096, 4096 x 22016, 11008 x 4096, in 32 layers
    assert trained_parameters(adapted) == 32 * 16 * (16384 + 8192 + 26112 + 15104) and trained_parameters(whole) == parameters(whole)
    (little,), (much,) = stage_memory(adapted), stage_memory(whole)
    assert little.weights == 2 * (parameters(adapted) + trained_parameters(adapted))
    assert little.gradients == 4 * trained_parameters(adapted) and little.optimizer == 12 * trained_parameters(adapted)
    assert much.gradients + much.optimizer > 100 * (little.gradients + little.optimizer)
    assert 0.66 < flops_per_token(adapted) / flops_per_token(whole) < 0.71
    wide = load(["recipe=llama2_7b_lora", "parallel.tensor_model_parallel_size=2", "launch.nproc_per_node=2", *LLAMA]).recipe
    # half of what is shared out, all of what is not: A of the first and third, B of the others
    assert stage_memory(wide)[0].gradients == 4 * 32 * 16 * ((12288 + 4096 + 22016 + 11008) // 2 + 4 * 4096)


def test_the_note_tells_itself(tmp_path):
    assert str(Adapters("/w", "0", 16, 32.0, ("linear_qkv", "linear_proj"))) == "LoRA of rank 16, alpha 32, in linear_qkv, linear_proj"
