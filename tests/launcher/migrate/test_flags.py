"""Megatron-LM's flags: to a recipe and back they say the same, and nothing is left out without a word."""

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.migrate.emit import as_megatron
from launcher.migrate.read import migrate
from launcher.migrate.write import recipe_text
from launcher.recipe import load
from launcher.recipe.find import package_folder
from launcher.recipe.keys import table
from tests.launcher.migrate.megatron_arguments import CHOICES, parser

REQUIRED = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --max-position-embeddings 64 --lr 1e-4"


def recipe_of(command: str, folder: Path):
    """The recipe that a command becomes, loaded from the file that would be written."""
    [migration], _ = migrate([command])
    path = folder / "again.yaml"
    path.write_text(recipe_text(migration), encoding="utf-8")
    return load([f"recipe={path}"])


def as_the_shell_reads(text: str) -> list[str]:
    """The words that torchrun would get, by bash itself."""
    script = "torchrun() { printf '%s\\0' \"$@\"; }\n" + text
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def command_of(loaded) -> list[str]:
    """The words of the emitted command, from the program on."""
    words = as_the_shell_reads("\n".join(as_megatron(loaded)))
    return words[words.index("pretrain_gpt.py") + 1 :]


positive = st.integers(1, 10**6)
share = st.floats(0, 0.99, allow_nan=False).map(lambda x: round(x, 6))
rate = st.floats(1e-12, 1.0, allow_nan=False)
path = st.text("abc _-/.0$'\"", min_size=1, max_size=12).filter(
    lambda text: not text.startswith("-") and text.strip() == text and "$" not in text
)
OPTIONAL = {
    "ffn-hidden-size": positive, "kv-channels": positive, "rotary-base": positive, "make-vocab-size-divisible-by": positive,
    "num-layers-per-virtual-pipeline-stage": positive, "distributed-timeout-minutes": positive, "global-batch-size": positive,
    "seed": st.integers(0, 2**31), "hysteresis": positive, "eval-interval": positive, "eval-iters": st.integers(0, 99),
    "exit-duration-in-mins": positive, "exit-interval": positive, "num-workers": st.integers(0, 9),
    "log-interval": positive, "rotary-percent": rate, "rope-scaling-factor": rate, "norm-epsilon": rate, "init-method-std": rate, "attention-dropout": share,
    "hidden-dropout": share, "loss-scale": positive, "initial-loss-scale": positive, "min-loss-scale": share,
    "loss-scale-window": positive, "min-lr": share, "lr-warmup-init": share, "weight-decay": share, "start-weight-decay": share,
    "end-weight-decay": share, "clip-grad": share, "adam-beta1": share, "adam-beta2": share, "adam-eps": rate,
    "pipeline-model-parallel-layout": st.sampled_from(["Et*4|t*4L", "E|(t|)*8L"]), "data-cache-path": path,
    "tokenizer-model": path, "vocab-file": path, "merge-file": path, "lr-wsd-decay-iters": positive, "lr-wsd-decay-samples": positive,
    **{name: st.sampled_from([word for word in words if word]) for name, words in CHOICES.items()
       if name not in ("tokenizer-type", "recompute-granularity", "recompute-method", "optimizer", "position-embedding-type", "ckpt-format", "attention-backend")},
    "attention-backend": st.sampled_from(["auto", "flash", "fused", "unfused"]),
    "position-embedding-type": st.sampled_from(["learned_absolute", "rope", "none"]), "ckpt-format": st.sampled_from(["torch", "torch_dist"]),
}  # fmt: skip
SWITCHES = """add-qkv-bias untie-embeddings-and-output-weights attention-softmax-in-fp32 use-distributed-optimizer
    overlap-grad-reduce overlap-param-gather reset-position-ids reset-attention-mask eod-mask-loss no-load-optim no-load-rng
    use-rope-scaling""".split()
TOGETHER = {
    "length": ["--train-iters 50", "--train-samples 500", "--train-samples 9 --rampup-batch-size 2 2 8", "--train-iters 7 --lr-decay-iters 9",
               "--train-samples 7 --lr-decay-samples 5 --lr-warmup-samples 2", "--train-iters 70 --lr-warmup-iters 3",
               "--train-iters 70 --lr-warmup-fraction 0.01"],
    "precision": ["", "--bf16", "--fp16"],
    "activation": ["", "--swiglu", "--no-bias-gelu-fusion", "--swiglu --disable-bias-linear", "--no-bias-gelu-fusion --disable-bias-linear"],
    "queries": ["", "--group-query-attention --num-query-groups 2", "--group-query-attention --num-query-groups 4"],
    "parallel": ["", "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 4", "--tensor-model-parallel-size 4"],
    "recompute": ["", "--recompute-granularity selective",
                  "--recompute-granularity full --recompute-method block --recompute-num-layers 3"],
    "tokenizer": ["--tokenizer-type GPT2BPETokenizer", "--tokenizer-type NullTokenizer --vocab-size 99",
                  "--tokenizer-type SentencePieceTokenizer", "--tokenizer-type HuggingFaceTokenizer --tokenizer-hf-include-special-tokens",
                  "--tokenizer-type TikTokenizer --tiktoken-pattern v1 --tiktoken-num-special-tokens 9"],
    "folders": ["--save-interval 7 --save out --load out", "--save-interval 9 --save out --load other",
                "--save-interval 7 --save out --load other --finetune", "--save-interval 4 --save 'o u t' --load 'o u t'"],
    "data": ["", "--data-path a_text_document", "--data-path 0.7 'a b' 0.3 b --split 90,10,0", "--data-path a b c",
             "--train-data-path 1 a --valid-data-path b --test-data-path c"],
}  # fmt: skip


@st.composite
def flag_sets(draw) -> str:
    """A command with random flags, whose order is random too."""
    names = draw(st.lists(st.sampled_from(sorted(OPTIONAL)), unique=True, max_size=12))
    parts = [f"--{name} {shlex.quote(str(draw(OPTIONAL[name])))}" for name in names]
    parts += [f"--{name}" for name in draw(st.lists(st.sampled_from(SWITCHES), unique=True, max_size=5))]
    parts += [draw(st.sampled_from(choices)) for choices in TOGETHER.values()]
    return f"torchrun --nproc_per_node 4 pretrain_gpt.py {REQUIRED} {' '.join(draw(st.permutations(parts)))}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flags")


@settings(max_examples=80, deadline=None)
@given(command=flag_sets())
def test_flags_to_a_recipe_and_back_say_the_same_to_megatron(command, folder):
    words = shlex.split(command)
    before = parser().parse_args(words[words.index("pretrain_gpt.py") + 1 :])
    after = parser().parse_args(command_of(recipe_of(command, folder)))
    assert after == before


def shipped() -> list[str]:
    """The recipes for pretraining that come with yuan."""
    found = []
    for file in sorted(package_folder().glob("*.yaml")):
        recipe = load([f"recipe={file.stem}"]).recipe
        if recipe.model.num_layers and recipe.optimizer.lr and recipe.data.train is None:
            found.append(file.stem)
    return found


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_comes_back_from_its_command(name, folder):
    first = load([f"recipe={name}", "launch.device=cuda"])
    emitted = "\n".join(as_megatron(first))
    again = recipe_of(emitted, folder)
    lines = as_megatron(again)
    assert [line for line in "\n".join(lines).splitlines() if not line.startswith("#")] == [
        line for line in emitted.splitlines() if not line.startswith("#")
    ]
    unsaid = {"training.train_tokens", "training.train_samples", "checkpoint.keep_last", "data.num_workers", "model.num_query_groups",
              "tokenizer.vocab_size"}  # fmt: skip
    unsaid |= {key for key in table() if key.startswith("optimizer.") and key.endswith(("_tokens", "_samples", "_iters"))}
    for key in set(table()) - unsaid:
        group, leaf = key.split(".")
        if group in ("model", "parallel", "training", "optimizer", "data", "tokenizer", "checkpoint"):
            one, two = (getattr(getattr(each.recipe, group), leaf) for each in (first, again))
            assert one == two or key == "parallel.pipeline_model_parallel_layout", key
    assert again.recipe.derived.train_iters == first.recipe.derived.train_iters


def test_the_command_is_one_that_megatron_takes(yuan):
    """It refuses TP > 1 without CUDA_DEVICE_MAX_CONNECTIONS=1, and --save without --save-interval."""
    words = ["recipes", "show", "345m_4dp", "--as", "megatron", "launch.device=cuda", "checkpoint.save_interval=null"]
    alone, split = yuan(*words), yuan(*words, "parallel.tensor_model_parallel_size=2")
    assert "CUDA_DEVICE" not in alone and "\nCUDA_DEVICE_MAX_CONNECTIONS=1 torchrun " in split
    assert "--save-interval 3000 " in split
    assert migrate([split])[0][0].values["launch.nproc_per_node"] == 4


def test_a_flag_that_was_given_at_its_default_comes_back(folder):
    flags = ["--eval-interval", "1000", "--clip-grad", "1", "--log-interval", "100", "--seed", "1234"]
    again = command_of(recipe_of(f"python pretrain_gpt.py {REQUIRED} --train-iters 5 {' '.join(flags)}", folder))
    assert [again[again.index(name) + 1] for name in flags[::2]] == flags[1::2]
    assert "--hidden-dropout" not in again


def test_llamas_tokenizer_comes_back_as_what_loads_the_same_file(folder):
    """Megatron-LM 0.16 makes one tokenizer of both names; before, SentencePieceTokenizer had five ids more."""
    given = f"python pretrain_gpt.py {REQUIRED} --train-iters 5 --tokenizer-type Llama2Tokenizer --tokenizer-model t.model"
    again = command_of(recipe_of(given, folder))
    assert again[again.index("--tokenizer-type") + 1] == "SentencePieceTokenizer"
    assert "five ids more" in lines_of("--tokenizer-type Llama2Tokenizer")["--tokenizer-type"].note


def test_yuans_command_has_the_forks_own_flags(yuan):
    text = yuan("recipes", "show", "yuan2_51b", "--as", "megatron")
    assert "# Megatron-LM has no filtered attention" in text
    words = as_the_shell_reads(text)
    assert words[words.index("--pipeline-model-parallel-blocks") + 1] == "2,2,2,2,2,3,3,3,3,3,3,3,3,3,3,2"
    assert {"pretrain_yuan.py", "--use-lf-gate", "--norm-dtype", "--flash-attn-drop"} <= set(words)


def lines_of(flags: str) -> dict:
    """Flag → its line."""
    [migration], _ = migrate([f"python pretrain_gpt.py {REQUIRED} --train-iters 5 {flags}"])
    return {line.name: line for line in migration.lines}


@pytest.mark.parametrize(("flags", "keys"), [
    ("--recompute-activations", {"parallel.recompute_granularity": "selective"}),
    ("--checkpoint-activations", {"parallel.recompute_granularity": "full", "parallel.recompute_method": "uniform", "parallel.recompute_num_layers": 1}),
    ("--recompute-method block", {"parallel.recompute_granularity": "full", "parallel.recompute_method": "block", "parallel.recompute_num_layers": 1}),
    ("--num-virtual-stages-per-pipeline-rank 2 --pipeline-model-parallel-size 2", {"parallel.num_layers_per_virtual_pipeline_stage": 2}),
    ("--use-rotary-position-embeddings --no-position-embedding", {"model.position_embedding_type": "rope"}),
    ("--no-position-embedding", {"model.position_embedding_type": "none"}),
    ("--layernorm-epsilon 1e-6", {"model.norm_epsilon": 1e-6}),
    ("--n-head-kv 2 --group-query-attention", {"model.num_query_groups": 2}),
    ("--tokenizer-type Llama2Tokenizer", {"tokenizer.type": "SentencePieceTokenizer"}),
    ("--disable-bias-linear", {"model.add_bias_linear": False}),
    ("--normalization RMSNorm --swiglu --position-embedding-type rope", {"model.family": "llama"}),
    ("--lr-warmup-tokens 1000", {"optimizer.lr_warmup_tokens": 1000}),
    ("--lr=3e-4", {"optimizer.lr": 3e-4}),
    ("--pretrained-no --seed 1 --seed 2", {"training.seed": 2}),
    ("--recompute-activations --recompute-granularity full", {"parallel.recompute_granularity": "selective"}),
    ("--recompute-granularity full --recompute-activations", {"parallel.recompute_granularity": "selective"}),
    ("--use-rotary-position-embeddings --position-embedding-type none", {"model.position_embedding_type": "rope"}),
])  # fmt: skip
def test_other_spellings_and_what_flags_mean_together(flags, keys):
    [migration], _ = migrate([f"python pretrain_gpt.py {REQUIRED} --train-iters 5 {flags}"])
    assert {key: migration.values.get(key) for key in keys} == keys


@pytest.mark.parametrize("flags", [
    "--context-parallel-size 2", "--num-experts 8", "--fim-rate 0.5", "--optimizer sgd", "--ckpt-format zarr", "--mock-data",
    "--position-embedding-type relative", "--moe-router-topk 2", "--fp8-format hybrid", "--a-flag-of-tomorrow 3",
    "--dataloader-type cyclic", "--save-retain-interval 10", "--distribute-saved-activations", "--deterministic-mode",
    "--no-check-for-nan-in-loss-and-grad", "--spec my.module layers", "--legacy-tokenizer", "--recompute-modules mlp",
    "--tokenizer-type BertWordPieceCase", "--num-virtual-stages-per-pipeline-rank 3", "--data-path $DATA",
])  # fmt: skip
def test_what_changes_the_result_and_has_no_key_is_said_loudly(yuan, flags):
    report = yuan("migrate", "--dry-run", f"python pretrain_gpt.py {REQUIRED} --train-iters 5 {flags}")
    assert f"1 argument could not be carried over:\n  {len(REQUIRED.split()) // 2 + 2} {flags}: " in report
    assert f"#   missing: {flags}" in report


def test_the_attention_of_megatrons_own_is_the_unfused_one():
    line = lines_of("--attention-backend local")["--attention-backend"]
    assert line.became == {"model.attention_backend": "unfused"} and "local" in line.note and not line.lost


@pytest.mark.parametrize("flags", [
    "--context-parallel-size 1", "--fim-rate 0.0", "--use-mcore-models", "--no-masked-softmax-fusion", "--tensorboard-dir x",
    "--dataloader-type single", "--spec local", "--exit-signal-handler", "--recompute-modules core_attn",
    "--wandb-project x", "--cuda-graph-scope full", "--distributed-backend nccl",
])  # fmt: skip
def test_what_has_no_bearing_is_dropped_with_the_reason(flags):
    line = lines_of(flags)[flags.split()[0]]
    assert not line.lost and not line.became
    assert line.note


@pytest.mark.parametrize(("precision", "lost"), [("", False), ("--bf16", False), ("--fp16", True)])
def test_gradients_in_fp32_are_lost_in_fp16_alone(precision, lost):
    line = lines_of(f"{precision} --accumulate-allreduce-grads-in-fp32")["--accumulate-allreduce-grads-in-fp32"]
    assert bool(line.lost) is lost and bool(line.note) is not lost


@pytest.mark.parametrize(("flag", "words"), [
    ("--exit-signal-handler", "saves and ends on SIGTERM"), ("--wandb-project x", "records no such"), ("--manual-gc", "garbage"),
    ("--async-save", "how checkpoints are written"), ("--chunk-size 9", "shares out its work"), ("--trust-remote-code", "runs no code"),
])  # fmt: skip
def test_the_reason_is_that_flags_own(flag, words):
    assert words in lines_of(flag)[flag.split()[0]].note


def test_query_groups_without_their_switch_are_left_out_as_megatron_does():
    line = lines_of("--num-query-groups 2")["--num-query-groups"]
    assert not line.became
    assert "model.num_query_groups=2" in line.trap


@pytest.mark.parametrize(("flags", "words"), [
    ("--seed x", ["--seed", "a whole number", "'x'"]),
    ("--seed 1.5", ["--seed", "a whole number", "'1.5'"]),
    ("--seed", ["--seed has no value"]),
    ("--bf16 --fp16", ["--fp16 and --bf16 are both given", "pretrain_gpt.py, line 1"]),
    ("--bf16 yes", ["--bf16 takes no value", "'yes'"]),
    ("--split 9 1", ["--split takes one value"]),
    ("--pipeline-model-parallel-blocks 2,x", ["whole numbers with commas"]),
])  # fmt: skip
def test_a_value_that_a_flag_cannot_have_is_an_error_that_names_it(flags, words):
    with pytest.raises(UserError) as caught:
        lines_of(flags)
    assert all(word in str(caught.value) for word in words)


def test_all_values_that_cannot_be_are_named_at_once():
    with pytest.raises(UserError) as caught:
        lines_of("--seed x --min-lr y")
    assert [error.what.split()[0] for error in caught.value.each] == ["--seed", "--min-lr"]


def test_yuans_fine_tuning_script_starts_from_the_checkpoint_and_saves_elsewhere():
    flags = "--sft-stage --train-reset --finetune --save ckpt --load ckpt --data-path 1 /d/train_text_document --split 10,0,0 --use-lf-gate"
    [migration], _ = migrate([f"python pretrain_yuan.py {REQUIRED} --train-iters 5 {flags}"])
    values = migration.values
    assert migration.verb == "sft"
    assert (values["checkpoint.load"], values["checkpoint.finetune"]) == ("ckpt", True)
    assert not {"run.dir", "data.data_path", "data.split"} & values.keys()
    assert [line.name for line in migration.traps] == ["--sft-stage", "--save"]
    assert [line.name for line in migration.lost] == ["--data-path"]


@pytest.mark.parametrize("program", ["pretrain_gpt.py", "examples/gpt3/pretrain_gpt3.py", "pretrain_mcore_llama.py"])
def test_trainers_under_other_names(program):
    [migration], _ = migrate([f"python {program} {REQUIRED} --train-iters 5"])
    assert migration.values["model.num_layers"] == 8
