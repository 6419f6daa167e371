"""The users' own commands, word for word: every key of the recipe that they become, and the traps that are named."""

import re

import pytest

from launcher.recipe import load
from launcher.recipe.check import CHECKS, check
from tests.launcher.migrate.conftest import COMMANDS

WORK = "/mnt/workspace"
LLAMA_7B = {
    "model.family": "llama", "model.num_layers": 32, "model.hidden_size": 4096, "model.ffn_hidden_size": 11008,
    "model.num_attention_heads": 32, "model.num_query_groups": 32, "model.max_position_embeddings": 4096,
    "model.position_embedding_type": "rope", "model.normalization": "RMSNorm", "model.norm_epsilon": 1e-5,
    "model.swiglu": True, "model.add_bias_linear": False, "model.untie_embeddings_and_output_weights": True,
    "model.attention_dropout": 0.0, "model.hidden_dropout": 0.0, "model.make_vocab_size_divisible_by": 1,
    "tokenizer.type": "SentencePieceTokenizer", "tokenizer.vocab_size": 32000,
}  # fmt: skip
LLAMA2_7B = {key: value for key, value in LLAMA_7B.items() if key.startswith("model.") and "dropout" not in key and "divisible" not in key}
MEGATRON_CKPT = f"{WORK}/llama2-ckpts/llama2-7b-hf-to-megatron-tp1-pp1"
TRAINING_7B = LLAMA_7B | {
    "tokenizer.tokenizer_model": f"{MEGATRON_CKPT}/tokenizer.model", "training.seq_length": 2048, "training.micro_batch_size": 1,
    "training.global_batch_size": 8, "training.seed": 1234, "training.eval_iters": 10, "optimizer.lr": 1e-5,
    "optimizer.min_lr": 1e-6, "optimizer.weight_decay": 0.1, "optimizer.clip_grad": 1.0, "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.95, "parallel.tensor_model_parallel_size": 1, "parallel.pipeline_model_parallel_size": 1,
    "parallel.sequence_parallel": False, "parallel.use_distributed_optimizer": True,
    "parallel.recompute_granularity": "selective", "checkpoint.load": MEGATRON_CKPT, "checkpoint.finetune": True,
    "logging.log_interval": 1, "launch.nproc_per_node": 8, "launch.nnodes": 1,
}  # fmt: skip
GPT2_345M = {
    "model.family": "gpt2", "model.num_layers": 24, "model.hidden_size": 1024, "model.num_attention_heads": 16,
    "model.max_position_embeddings": 1024, "model.openai_gelu": True, "training.seq_length": 1024, "training.precision": "fp16",
    "parallel.tensor_model_parallel_size": 1, "parallel.pipeline_model_parallel_size": 1,
    "tokenizer.vocab_file": "/workspace/model/gpt2-vocab/gpt2-vocab.json",
    "tokenizer.merge_file": "/workspace/model/gpt2-vocab/gpt2-merges.txt", "launch.nnodes": 1,
}  # fmt: skip
OUT_345M = "/workspace/model/megatron-models/345m-1dp-out"

EXPECTED = {
    "pai_pretrain.sh": (TRAINING_7B | {
        "training.train_tokens": 100_000_000, "training.precision": "fp16", "training.eval_interval": 100,
        "optimizer.lr_decay_style": "linear", "optimizer.lr_warmup_tokens": 16384, "model.init_method_std": 0.006,
        "data.data_path": f"{WORK}/llama2-datasets/wudao/wudao_llamabpe_text_document", "data.split": "98,2,0",
        "checkpoint.save_interval": 100000, "run.dir": f"{WORK}/output_megatron_llama2/llama2_7b_pretrain",
    }, ["PAD_LEN", "EXTRA_VOCAB_SIZE", "PRETRAIN_CHECKPOINT_PATH", "WARMUP_TOKENS", "OUTPUT_BASEPATH", "dropout"]),
    "pai_finetune.sh": (TRAINING_7B | {
        "training.epochs": 2, "training.precision": "bf16", "training.eval_interval": 1000, "optimizer.lr_decay_style": "cosine",
        "model.init_method_std": 0.01, "data.train": f"{WORK}/llama2-datasets/wudao_train.json",
        "data.valid": f"{WORK}/llama2-datasets/wudao_valid.json", "run.dir": f"{WORK}/output_megatron_llama2/llama2_7b_sft",
    }, ["PAD_LEN", "EXTRA_VOCAB_SIZE", "PRETRAIN_CHECKPOINT_PATH", "OUTPUT_BASEPATH", "dropout"]),
    "pai_generate.sh": (LLAMA_7B | {
        "tokenizer.tokenizer_model": "../../../llama2-train/tokenizer.model", "training.seq_length": 1024,
        "training.precision": "fp16", "parallel.tensor_model_parallel_size": 1, "launch.nproc_per_node": 1,
        "generate.load": "../../../llama2-train", "generate.input": f"{WORK}/pred_input.jsonl",
        "generate.output": f"{WORK}/llama2_pred.txt", "generate.max_new_tokens": 512, "generate.batch_size": 1,
        "generate.temperature": 1.0, "generate.top_k": 10, "generate.top_p": 0, "generate.repetition_penalty": 1.2,
        "generate.seed": 1234,
    }, ["CHECKPOINT_PATH", "TP", "SEQ_LEN", "EXTRA_VOCAB_SIZE", "REPETITION_PENALTY"]),
    "pai_deepspeed.sh": ({key: value for key, value in TRAINING_7B.items() if key not in (
        "training.seed", "training.eval_iters", "optimizer.min_lr", "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size", "parallel.sequence_parallel", "parallel.use_distributed_optimizer",
        "logging.log_interval")} | {
        "parallel.zero": 2,
        "training.global_batch_size": 16, "training.epochs": 2, "training.precision": "bf16",
        "optimizer.lr_decay_style": "constant", "parallel.recompute_granularity": "full", "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1, "data.train": f"{WORK}//llama2-datasets/wudao_train.json",
        "data.valid": f"{WORK}//llama2-datasets/wudao_valid.json", "checkpoint.load": f"{WORK}//llama2-ckpts/Llama-2-7b-hf",
        "checkpoint.save_interval": 500, "checkpoint.export_hf": f"{WORK}//output_llama2/llama2_7b_sft_hf",
        "tokenizer.tokenizer_model": f"{WORK}//llama2-ckpts/Llama-2-7b-hf/tokenizer.model",
        "run.dir": f"{WORK}//output_llama2/llama2_7b_sft",
    }, ["TRAIN_DATASET_PATH", "VALID_DATASET_PATH", "PRETRAIN_CHECKPOINT_PATH", "OUTPUT_BASEPATH", "saving"]),
    "pai_convertor.sh": ({
        "convert.source": f"{WORK}/llama2-ckpts/llama2-7b-hf", "convert.target": MEGATRON_CKPT, "convert.to": "torch_dist",
        "convert.tensor_model_parallel_size": 1, "convert.pipeline_model_parallel_size": 1,
    }, ["TARGET_CKPT_PATH", "mg2hf"]),
    "preprocess.txt": ({
        "tokenizer.type": "GPT2BPETokenizer", "tokenizer.vocab_file": "/workspace/model/gpt2-vocab/gpt2-vocab.json",
        "tokenizer.merge_file": "/workspace/model/gpt2-vocab/gpt2-merges.txt", "preprocess.input": "/workspace/data/oscar-1GB.jsonl",
        "preprocess.output_prefix": "/workspace/data/my-gpt2", "preprocess.append_eod": True, "preprocess.workers": 20,
    }, ["--dataset-impl"]),
    "train_gpt2_345m_1dp1pp_distributed.sh": (GPT2_345M | {
        "model.init_method_std": 0.006, "model.attention_softmax_in_fp32": True, "training.micro_batch_size": 4,
        "training.global_batch_size": 32, "training.train_iters": 3000, "training.eval_interval": 1000, "training.eval_iters": 10,
        "optimizer.lr": 6e-5, "optimizer.min_lr": 6e-6, "optimizer.lr_decay_style": "cosine", "optimizer.lr_decay_iters": 430000,
        "optimizer.lr_warmup_fraction": 0.001, "optimizer.weight_decay": 0.1, "optimizer.clip_grad": 1.0,
        "data.data_path": "/workspace/data/my-gpt2_text_document", "data.split": "949,50,1", "checkpoint.save_interval": 1000,
        "logging.log_interval": 100, "launch.nproc_per_node": 4, "run.dir": OUT_345M,
    }, ["--lr-decay-iters"]),
    "run_text_generation_server_345M.sh": (GPT2_345M | {
        "tokenizer.type": "GPT2BPETokenizer", "launch.nproc_per_node": 1, "generate.load": OUT_345M, "generate.seed": 42,
        "serve.port": 5000,
    }, ["host"]),
    "mindspore_1_to_4.sh": ({
        "convert.source": "/workspace/ckpt/1_llama-2-7b_qkv", "convert.target": "/workspace/ckpt/4_llama-2-7b/fp16_4p_qkv",
        "convert.to": "mindspore", "convert.tensor_model_parallel_size": 4, "convert.pipeline_model_parallel_size": 1,
        "convert.dtype": "fp16", "convert.fused_layout": "concat",
    } | LLAMA2_7B, ["layout"]),
    "mindspore_4_to_8.sh": ({
        "convert.source": "/workspace/ckpt/4_llama-2-7b/fp16_4p_qkv", "convert.target": "/workspace/ckpt/8_llama-2-7b/fp16_8p_qkv",
        "convert.to": "mindspore", "convert.tensor_model_parallel_size": 8, "convert.pipeline_model_parallel_size": 1,
        "convert.dtype": "fp16", "convert.fused_layout": "concat",
    } | LLAMA2_7B, ["layout"]),
    "mindspore_8_to_16.sh": ({
        "convert.source": "/workspace/ckpt/8_llama-2-7b/fp16_8p_qkv", "convert.target": "/workspace/ckpt/16_llama-2-7b/fp16_16p_qkv",
        "convert.to": "mindspore", "convert.tensor_model_parallel_size": 16, "convert.pipeline_model_parallel_size": 1,
        "convert.dtype": "fp16", "convert.fused_layout": "concat",
    } | LLAMA2_7B, ["layout"]),
    "mindspore_1_to_4_simplified.sh": ({
        "convert.source": "/workspace/ckpt/1_llama-2-7b_qkv", "convert.to": "mindspore", "convert.fused_layout": "concat",
        "convert.target": "../ckpt/llama2_7b/qkv/4_llama-2-7b/fp16_4p_qkv", "convert.tensor_model_parallel_size": 4,
        "convert.pipeline_model_parallel_size": 1,
    } | LLAMA2_7B, ["layout"]),
    "yuan_51b.sh": ({
        "model.family": "yuan2", "model.num_layers": 42, "model.hidden_size": 8192, "model.ffn_hidden_size": 32768,
        "model.num_attention_heads": 64, "model.max_position_embeddings": 4096, "model.position_embedding_type": "rope",
        "model.normalization": "RMSNorm", "model.norm_epsilon": 1e-6, "model.swiglu": True, "model.add_bias_linear": False,
        "model.attention_dropout": 0.1, "model.hidden_dropout": 0.0, "model.make_vocab_size_divisible_by": 211,
        "parallel.tensor_model_parallel_size": 1, "parallel.pipeline_model_parallel_size": 16,
        "parallel.pipeline_model_parallel_layout": "Ett|tt|tt|tt|tt|ttt|ttt|ttt|ttt|ttt|ttt|ttt|ttt|ttt|ttt|ttL",
        "parallel.use_distributed_optimizer": True, "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "block", "parallel.recompute_num_layers": 1, "training.seq_length": 4096,
        "training.micro_batch_size": 1, "training.global_batch_size": 1152, "training.train_iters": 63578,
        "training.precision": "bf16", "training.eval_interval": 1000000, "training.eval_iters": 10, "optimizer.lr": 9e-5,
        "optimizer.min_lr": 9e-6, "optimizer.lr_decay_style": "cosine", "optimizer.lr_decay_iters": 63578,
        "optimizer.lr_warmup_iters": 1300, "optimizer.weight_decay": 0.1, "optimizer.clip_grad": 1.0,
        "optimizer.adam_beta1": 0.9, "optimizer.adam_beta2": 0.95, "data.data_path": [1, "/data/train.txt_document_context"],
        "data.split": "10,0,0", "data.reset_position_ids": True, "data.num_workers": 2, "tokenizer.type": "YuanTokenizer",
        "tokenizer.tokenizer_model": "./tokenizer/tokenizer.model", "tokenizer.vocab_size": 134958,
        "checkpoint.save_interval": 10000, "logging.log_interval": 1, "launch.nproc_per_node": 8, "launch.nnodes": 24,
        "launch.node_rank": 0, "launch.rdzv_endpoint": "node0:6000", "run.dir": "<Specify_path>",
    }, []),
}  # fmt: skip


ASSUMED = {"launch.device": "cuda", "launch.gpu_memory_gib": 80}
for values, _ in EXPECTED.values():
    values |= ASSUMED if "model.num_layers" in values and values.get("convert.to") != "mindspore" else {}
for name, template in (("pai_finetune.sh", "alpaca"), ("pai_deepspeed.sh", "plain")):
    EXPECTED[name][0]["tokenizer.chat_template"] = template


@pytest.mark.parametrize("name", EXPECTED)
def test_each_becomes_its_recipe_and_its_traps_are_named(migrated, name):
    values, report = migrated(str(COMMANDS / name))
    expected, traps = EXPECTED[name]
    assert values == expected
    assert re.findall(r"^trap: (?:\d+ )?(\S+?):? ", report, re.M) == traps


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_written_says_how_to_use_it_and_passes_its_check_but_for_files(migrated, name):
    migrated(str(COMMANDS / name))
    text = open("m.yaml", encoding="utf-8").read()
    verb = re.search(r"^#   (?:yuan convert recipe=m.yaml && )?yuan (\w+) recipe=m.yaml$", text, re.M).group(1)
    loaded = load(["recipe=m.yaml"])
    if verb not in CHECKS:
        return
    found = [one for one in check(loaded.recipe, loaded.sources, verb, launching=False) if one.severity == "error"]
    absent = ("no such ", "there is no", "no checkpoint", "disk", "does not exist", "is not there", "no tokenizer")
    assert not [one.what for one in found if not any(word in one.what for word in absent)]


def test_the_pasted_text_is_read_as_the_file_is(migrated):
    text = (COMMANDS / "pai_pretrain.sh").read_text()
    assert migrated(text)[0] == EXPECTED["pai_pretrain.sh"][0]


YUAN_CONVERSIONS = {  # the variables that the quick starts tell to fill in
    "102B": ("/mnt/102B", "./ckpt-102B-mid", "./ckpt-102B-8tp", 8),
    "51B": ("/mnt/51B", "./ckpt-51B-mid", "./ckpt-51B-4tp", 4),
}


@pytest.mark.parametrize("size", YUAN_CONVERSIONS)
@pytest.mark.parametrize("form", ["lines", "words", "script"])
def test_yuans_conversion_with_its_variables(migrated, here, size, form):
    source, middle, target, ranks = YUAN_CONVERSIONS[size]
    given = [f"LOAD_CHECKPOINT_PATH={source}", f"SAVE_SPLITED_CHECKPOINT_PATH={middle}", f"SAVE_CHECKPOINT_PATH={target}"]
    call = f"bash examples/ckpt_partitions_{size}.sh"
    if form == "script":
        (here / "examples").mkdir()
        nested = f"bash ./examples/split_tp_partitions_{size}.sh $LOAD_CHECKPOINT_PATH $SAVE_SPLITED_CHECKPOINT_PATH"
        (here / call.split()[1]).write_text("#!/bin/bash\n" + "\n".join([*given, nested]))
    words = {"lines": ["\n".join([*given, call])], "words": [*given, *call.split()], "script": call.split()}[form]
    assert migrated(*words)[0] == {
        "convert.source": source, "convert.target": target, "convert.to": "yuan",
        "convert.tensor_model_parallel_size": ranks, "convert.pipeline_model_parallel_size": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("size", "target", "ranks"), [("102B", "./ckpt-102B-8tp", 8), ("51B", "./ckpt-51B-4tp", 4)])
def test_yuans_server_with_its_variables(migrated, size, target, ranks):
    values, report = migrated(
        f"CHECKPOINT_PATH={target}\nTOKENIZER_MODEL_PATH=./tokenizer\nPORT=8001\nbash examples/run_inference_server_{size}.sh"
    )
    assert values["generate.load"] == target
    assert values["serve.port"] == 8001
    assert values["launch.nproc_per_node"] == values["parallel.tensor_model_parallel_size"] == ranks
    assert values["model.family"] == "yuan2"
    assert values["generate.top_k"] == 1
    assert "serve.host=0.0.0.0" in report


def test_yuans_server_from_its_script_takes_the_branches_that_the_shell_would(migrated, here):
    script = """
        if [ "$TEMP" == "" ]; then
            TEMP=1
        fi
        if [ "$TOP_K" == "" ]; then TOP_K=1; else TOP_K=9; fi
        GPUS_PER_NODE=8
        CHECKPOINT_PATH=./ckpt-102B-8tp
        GPT_ARGS=" --num-layers 84 \\
            --hidden-size 8192 --num-attention-heads 64 --seq-length 4096 --max-position-embeddings 4096 --use-lf-gate \\
            --tensor-model-parallel-size 8 --temperature $TEMP --top_k $TOP_K --seed $RANDOM
        "
        CUDA_VISIBLE_DEVICES=0,1 PORT=8000 torchrun --nproc_per_node $GPUS_PER_NODE tools/run_text_generation_server.py \\
            $GPT_ARGS --tokenizer-type "YuanTokenizer" --load $CHECKPOINT_PATH
        """
    (here / "run_inference_server_102B.sh").write_text(script)
    values, report = migrated("bash", "run_inference_server_102B.sh")
    assert (values["generate.temperature"], values["generate.top_k"], values["serve.port"]) == (1.0, 1, 8000)
    assert values["generate.load"] == "./ckpt-102B-8tp"
    assert "generate.seed" not in values
    assert "--seed $RANDOM: $RANDOM is set nowhere here: fill in generate.seed" in report
