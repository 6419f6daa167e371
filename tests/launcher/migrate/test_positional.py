"""Scripts with arguments by position: both orders, told apart by their values, and every way of getting one wrong."""

import re

import pytest

from launcher.errors import UserError
from launcher.migrate.read import migrate

OLD = {
    "pretrain": "sh run_pretrain_megatron_llama.sh dsw /m /p 13B 1 16 1e-5 1e-6 2048 2048 0 bf16 2 1 full false true true 100 "
                "/data/text_document /ckpt 1000000000 20000000 /out",
    "sft": "sh run_finetune_megatron_llama.sh dsw /m /p 13B 1 1e-5 1e-6 2048 2048 0 bf16 2 1 full false true true /train.json /valid.json "
           "/ckpt 3 /out",
    "generate": "bash run_text_generation_megatron_llama.sh dsw /m /p /ckpt 13B 2 4 1024 1024 0 bf16 0 512 256 /in.jsonl /out.txt 0.9 0.7 1",
}  # fmt: skip
NEW = {
    "pretrain": "sh run_pretrain_megatron_llama.sh dsw /p 13B 1 16 1e-5 1e-6 2048 2048 0 bf16 2 1 full false true true true 100 "
                "/data/text_document /ckpt 1000000000 20000000 /out",
    "sft": "sh run_finetune_megatron_llama.sh dsw /p 13B 1 1e-5 1e-6 2048 2048 0 bf16 2 1 full false true true true /train.json /valid.json "
           "/ckpt 3 /out",
    "generate": "bash run_text_generation_megatron_llama.sh dsw /p /ckpt 13B 2 4 1024 1024 0 bf16 0 512 256 /in.jsonl /out.txt 0.9 0.7 1",
}  # fmt: skip
DEEPSPEED = "bash run_ds_train_huggingface_llama.sh dsw 70B 1 2 1e-5 2048 bf16 3 true {}/train.json /valid.json /hf 2 /out"


def values_of(command: str, **variables: str) -> dict:
    [migration], _ = migrate([f"{name}={value}" for name, value in variables.items()] + command.split())
    return migration.values


def fault_of(words: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        migrate(words)
    return str(caught.value)


def replaced(command: str, at: int, value: str) -> list[str]:
    """The command with its argument number `at` replaced."""
    words = command.split()
    words[at + 1] = value
    return words


@pytest.mark.parametrize("story", OLD)
def test_both_orders_say_the_same_and_the_release_is_named(story):
    [old], _ = migrate(OLD[story].split())
    [new], _ = migrate(NEW[story].split())
    assert (old.origin.split("order of ")[1], new.origin.split("order of ")[1]) == (
        "Pai-Megatron-Patch 0.5",
        "Pai-Megatron-Patch 0.6 and later",
    )
    differ = {key for key in old.values.keys() | new.values.keys() if old.values.get(key) != new.values.get(key)}
    assert differ <= {"training.eval_interval"}


def test_the_values_are_what_the_command_says():
    values = values_of(OLD["pretrain"])
    expected = {
        "model.num_layers": 40, "model.hidden_size": 5120, "model.ffn_hidden_size": 13824, "training.global_batch_size": 16,
        "parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True, "parallel.use_distributed_optimizer": False,
        "parallel.recompute_granularity": "full", "parallel.recompute_method": "uniform", "training.train_tokens": 10**9,
        "optimizer.lr_warmup_tokens": 20_000_000, "training.seq_length": 2048,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    sft = values_of(OLD["sft"])
    assert (sft["training.epochs"], sft["training.global_batch_size"], sft["data.train"]) == (3, 4, "/train.json")
    answers = values_of(OLD["generate"])
    assert (answers["generate.top_p"], answers["generate.temperature"], answers["launch.nproc_per_node"]) == (0.9, 0.7, 2)


@pytest.mark.parametrize("release", [OLD, NEW])
@pytest.mark.parametrize("story", OLD)
def test_any_one_argument_missing_is_named(release, story):
    """Neighbours of one kind cannot be told apart, so several may be named; the missing one is always among them."""
    words = release[story].split()
    [whole], _ = migrate(words)
    names = {int(line.place): line.name for line in whole.lines if line.place.isdigit()}
    for at in range(1, len(names) + 1):
        rest = words[: at + 1] + words[at + 2 :]
        if (release, story) == (OLD, "generate") and at in (2, 3, 4):
            continue  # what is left is a whole command of the newer release: the test below
        fault = fault_of(rest)
        assert re.search(rf"\b{at} {names[at]}\b", fault), (names[at], fault)
        assert re.search(rf"takes [\d or]*{len(names)}[\d or]* arguments, and this has {len(names) - 1}", fault)


def test_an_old_command_without_its_first_path_is_a_whole_one_of_the_newer_release():
    words = OLD["generate"].split()
    [migration], _ = migrate(words[:3] + words[4:])
    assert migration.origin.endswith("0.6 and later")


def test_one_argument_too_many_is_named():
    fault = fault_of([*OLD["pretrain"].split()[:20], "surplus", *OLD["pretrain"].split()[20:]])
    assert "takes 24 arguments, and this has 25" in fault
    assert "19 'surplus'" in fault


@pytest.mark.parametrize(("at", "value", "words"), [
    (1, "local", ["argument 1 (ENV) is 'local'", "dsw or dlc"]),
    (4, "8B", ["argument 4 (MODEL_SIZE) is '8B'", "7B or 13B or 70B"]),
    (5, "one", ["argument 5 (BATCH_SIZE) is 'one'", "whole number above 0"]),
    (6, "0", ["argument 6 (GLOBAL_BATCH_SIZE) is '0'"]),
    (7, "10", ["argument 7 (LR) is '10'", "learning rate"]),
    (8, "1e-3", ["argument 8 (MIN_LR) 1e-3 is above argument 7 (LR) 1e-5", "swapped"]),
    (12, "BF16", ["argument 12 (PR) is 'BF16'", "fp16 or bf16 or fp8"]),
    (15, "selective", ["argument 15 (AC) is 'selective'", "sel or full or none"]),
    (16, "True", ["argument 16 (DO) is 'True'", "true or false"]),
    (22, "ten", ["argument 22 (TRAIN_TOKENS) is 'ten'"]),
    (22, "1000", ["argument 22 (TRAIN_TOKENS) is 1000", "less than one step of 32768 tokens"]),
    (23, "1000000000", ["argument 23 (WARMUP_TOKENS) is 1000000000", "swapped"]),
    (11, "3", ["argument 11 (EXTRA_VOCAB_SIZE) is 3", "32000 + 3 rows", "such as 4", "2 tensor-parallel ranks"]),
])  # fmt: skip
def test_a_value_that_fits_neither_order_is_named_with_what_was_expected(at, value, words):
    fault = fault_of(replaced(OLD["pretrain"], at, value))
    assert all(word in fault for word in words), fault


def test_swapped_arguments_are_both_named_with_where_they_fit():
    words = OLD["pretrain"].split()
    words[13], words[21] = words[21], words[13]  # PR and DATASET_PATH
    fault = fault_of(words)
    assert "argument 12 (PR) is '/data/text_document'" in fault
    assert "argument 20 (DATASET_PATH) is 'bf16'" in fault
    assert "the value fits argument 12, PR" in fault


def test_tokens_that_bash_cannot_count_are_taken_as_meant():
    [migration], _ = migrate(replaced(OLD["pretrain"], 22, "1e9"))
    assert migration.values["training.train_tokens"] == 10**9
    assert next(line for line in migration.lines if line.name == "TRAIN_TOKENS").trap


@pytest.mark.parametrize(
    ("pad", "path", "real"), [("80", "/data/text_document", 80), ("2049", "/d.json", None), ("128", "/d.json", 127)]
)
def test_the_length_of_samples_is_pad_len_and_the_recipes_is_seq_len(pad, path, real):
    words = replaced(" ".join(replaced(OLD["pretrain"], 10, pad)), 20, path)
    [migration], _ = migrate(words)
    trap = next(line for line in migration.lines if line.name == "PAD_LEN").trap
    assert migration.values["training.seq_length"] == 2048
    assert (f"training.seq_length={real}" in trap) if real else not trap
    assert bool(migration.lost) == path.endswith(".json")


def test_a_blend_and_random_weights():
    words = replaced(" ".join(replaced(OLD["pretrain"], 20, "0.3,/a,0.7,/b")), 21, "none")
    [migration], _ = migrate(words)
    assert migration.values["data.data_path"] == [0.3, "/a", 0.7, "/b"]
    assert "checkpoint.load" not in migration.values
    assert [line.name for line in migration.lost] == ["PRETRAIN_CHECKPOINT_PATH"]


def test_extra_rows_of_the_vocabulary_come_out_exactly():
    from launcher.recipe.resolve import resolve
    from launcher.recipe.schema import Recipe

    values = values_of(" ".join(replaced(OLD["pretrain"], 11, "256")))
    recipe = Recipe()
    for key, value in values.items():
        group, leaf = key.split(".")
        setattr(getattr(recipe, group), leaf, value)
    resolve(recipe, {}, "test")
    assert recipe.derived.padded_vocab_size == 32256


def test_machines_of_a_cluster_are_its_environments():
    command = OLD["pretrain"].replace(" dsw ", " dlc ")
    values = values_of(
        command, WORLD_SIZE="4", KUBERNETES_CONTAINER_RESOURCE_GPU="8", RANK="1", MASTER_ADDR="node0", MASTER_PORT="2222"
    )
    assert (values["launch.nnodes"], values["launch.nproc_per_node"], values["launch.node_rank"]) == (4, 8, 1)
    assert values["launch.rdzv_endpoint"] == "node0:2222"
    [migration], _ = migrate(command.split())
    assert [line.name for line in migration.lost] == ["ENV"]


@pytest.mark.parametrize(("flash", "number"), [("", 14), ("false ", 15)])
def test_deepspeeds_two_orders(flash, number):
    [migration], _ = migrate(DEEPSPEED.format(flash).split())
    assert f"{number} arguments" in migration.origin
    assert migration.values["training.global_batch_size"] == 16
    assert migration.values["model.num_query_groups"] == 8
    assert migration.values["parallel.zero"] == 3 and not migration.lost
    assert any(line.name == "FLASH" and line.trap for line in migration.lines) == bool(flash)


@pytest.mark.parametrize(("stage", "precision", "zero"), [(1, "bf16", 1), (2, "bf16", 2), (3, "bf16", 3), (1, "fp16", 1), (3, "fp16", 1)])
def test_zero_stages_are_told_honestly(stage, precision, zero):
    """In fp16 the first alone is to be had."""
    [migration], _ = migrate(DEEPSPEED.format("").replace("bf16 3 true", f"{precision} {stage} true").split())
    assert migration.values["parallel.zero"] == zero
    assert [line.name for line in migration.lost] == (["ZERO"] if zero != stage else [])


CONVERTOR = "sh model_convertor.sh /m /source/ /target 2 4 llama2-7b 0 {}"
MCORE = "bash hf2mcore_convertor.sh 7B /hf /m /source /target 2 1 0 0 0 0 {}"


@pytest.mark.parametrize(("back", "to"), [("false", "torch_dist"), ("true", "hf")])
@pytest.mark.parametrize("command", [CONVERTOR, MCORE, MCORE.replace("{}", "0 {}")])
def test_convertors_both_ways(command, back, to):
    values = values_of(command.format(back))
    assert (values["convert.source"], values["convert.target"], values["convert.to"]) == ("/source", "/target", to)
    assert values["convert.tensor_model_parallel_size"] == 2


def test_the_twelve_documented_arguments_of_hf2mcore_are_told_what_they_did():
    [documented], _ = migrate(MCORE.format("true").split())
    assert "always converts from Hugging Face" in documented.traps[-1].trap


@pytest.mark.parametrize(
    "words, values",
    [
        ("-f pt_to_ms -p fp16 -w 4 -sc hf", {"convert.dtype": "fp16"}),
        ("-f train_to_infer -p fp16 -w 2 -pp 4 -sc trained/llama2_13b -y llama2_13b_2p.yaml", {"convert.dtype": "fp16", "model.num_layers": 40}),
        ("-f quant_weight -p w8a16 -w 4 -d boolq -dp /data -sc llama-2-70b_qkv", {
            "convert.dtype": "fp16", "convert.quantize": "int8", "convert.fused_layout": "concat", "model.num_query_groups": 8,
        }),
        ("-f distributed_weight_transfer -w 8 -sc /a", {}),
    ],
)  # fmt: skip
def test_every_function_of_the_tool_for_mindspore(words, values):
    [found], _ = migrate(["bash", "ckpt_convert.sh", *words.split(), "-dc", "out"])
    assert found.verb == "convert" and found.values.items() >= ({"convert.to": "mindspore"} | values).items()
    asked = [line.lost for line in found.lost if "convert.hf_config" in line.lost]
    assert bool(asked) is ("-sc /a" in words)  # which model it is nothing there tells


@pytest.mark.parametrize(("command", "words"), [
    (CONVERTOR.format("yes"), ["argument 8 (mg2hf) is 'yes'", "true or false"]),
    (CONVERTOR.format("true").replace("llama2-7b", "qwen"), ["argument 6 (MN) is 'qwen'"]),
    ("bash run_text_generation_megatron_llama.sh dsw /m /p /ckpt 7B 1 1 1024 1024 0 fp16 5 1 1 /in /out 0.9 1 1", ["12 (TOP_K) 5", "17 (TOP_P) 0.9"]),
    ("bash run_text_generation_megatron_llama.sh dsw /m /p /ckpt 7B 1 1 1024 1024 0 fp16 5 1 1 /in /out 0 0 1", ["18 (TEMPERATURE) is 0"]),
    ("bash run_text_generation_megatron_llama.sh dsw /m /p /ckpt 7B 1 1 1024 1024 0 fp16 5 1 1 none /out 0 1 1", ["15 (INPUT_FILE) is none"]),
    ("bash ckpt_convert.sh -f quant -w 4 -sc /a", ["-f quant: there is no such function", "quant_weight"]),
    ("bash ckpt_convert.sh -f pt_to_ms -sc /a", ["-w (--world_size) is not given"]),
    ("bash ckpt_convert.sh -f pt_to_ms -w four -sc /a", ["-w (--world_size) is 'four'"]),
    ("bash ckpt_convert.sh -w 4 -sc", ["--src_ckpt_path has no value"]),
    ("bash ckpt_convert.sh -w 4 -x 5", ["'-x' is no option"]),
    ("bash ckpt_partitions_102B.sh", ["LOAD_CHECKPOINT_PATH and SAVE_CHECKPOINT_PATH", "have no value"]),
])  # fmt: skip
def test_faults_of_the_others(command, words):
    fault = fault_of(command.split())
    assert all(word in fault for word in words), fault


YUAN_TOOL = "python tools/{} --tensor-model-parallel-size 1 --target-tensor-model-parallel-size 8 --target-pipeline-model-parallel-size 32 "
YUAN_TOOL += "--pipeline-generate-layer 0,1 --use-lf-gate --num-layers 84 --bf16 --load /mnt/102B/ --save ./mid --lr 0.0001"


@pytest.mark.parametrize(("tool", "to", "traps"), [
    ("split_tp_partitions.py", "yuan", 0), ("merge_tp_partitions.py", "yuan", 1), ("convert_hf.py", "hf", 1),
])  # fmt: skip
def test_yuans_conversion_tools_by_their_flags(tool, to, traps):
    [migration], _ = migrate(YUAN_TOOL.format(tool).split())
    assert migration.values == {
        "convert.source": "/mnt/102B", "convert.target": "./mid", "convert.to": to,
        "convert.tensor_model_parallel_size": 8, "convert.pipeline_model_parallel_size": 32,
    }  # fmt: skip
    assert len(migration.traps) == traps


def test_yuans_conversion_tools_want_both_folders():
    assert "--save is not given" in fault_of(YUAN_TOOL.format("merge_pp_partitions.py").replace("--save ./mid", "").split())
