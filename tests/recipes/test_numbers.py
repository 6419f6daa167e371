"""The numbers of the recipes are those of the models and trainings that they stand for, and the old scripts' traps are left out."""

from functools import cache

import pytest

from launcher.recipe import load
from launcher.recipe.pipeline import parse_layout
from launcher.recipe.size import parameters

# As published: Touvron et al. 2023 (arXiv 2307.09288), table 1 and the configs of the weights; Wu et al. 2023 (arXiv
# 2311.15786), table 8 and the released scripts. Layers, hidden, feed-forward, heads, groups, positions, parameters.
MODELS = {
    "llama2_7b": (32, 4096, 11008, 32, 32, 4096, 6_738_415_616),
    "llama2_13b": (40, 5120, 13824, 40, 40, 4096, 13_015_864_320),
    "llama2_70b": (80, 8192, 28672, 64, 8, 4096, 68_976_648_192),
    "yuan2_2b": (24, 2048, 8192, 32, 32, 8192, 2_088_724_480),
    "yuan2_51b": (42, 8192, 32768, 64, 64, 4096, 51_842_105_344),
    "yuan2_102b": (84, 8192, 32768, 64, 64, 4096, 102_577_954_816),
}
# TP, PP, machines, processes on each, distributed optimizer
LAYOUTS = {
    "llama2_7b": (1, 1, 1, 8, True),
    "llama2_7b_sft": (1, 1, 1, 8, True),
    "llama2_13b": (2, 1, 1, 8, True),
    "llama2_13b_sft": (2, 1, 1, 8, True),
    "llama2_70b": (8, 4, 4, 8, True),
    "llama2_70b_sft": (8, 4, 4, 8, True),
    "yuan2_2b": (1, 1, 1, 8, False),
    "yuan2_2b_sft": (1, 1, 1, 8, False),
    "yuan2_51b": (1, 16, 16, 8, True),
    "yuan2_51b_sft": (1, 16, 4, 8, True),
    "yuan2_102b": (1, 32, 32, 8, True),
    "yuan2_102b_sft": (1, 32, 12, 8, True),
}
# seq_length, micro batch, global batch, steps, lr, min_lr, warm-up in steps, decay, weight decay
PRETRAINING = {
    "llama2_7b": (2048, 1, 8, 6103, 1e-5, 1e-6, 61, "linear", 0.1),
    "llama2_13b": (2048, 1, 8, 6103, 1e-5, 1e-6, 61, "linear", 0.1),
    "llama2_70b": (2048, 1, 8, 6103, 1e-5, 1e-6, 61, "linear", 0.1),
    "yuan2_2b": (8192, 2, 384, 95367, 2e-4, 2e-5, 1900, "cosine", 0.1),
    "yuan2_51b": (4096, 1, 1152, 63578, 9e-5, 9e-6, 1300, "cosine", 0.1),
    "yuan2_102b": (4096, 1, 1152, 63578, 3e-5, 3e-6, 1300, "cosine", 0.1),
}
# seq_length, micro batch, global batch, epochs, lr, min_lr, weight decay
FINE_TUNING = {
    "llama2_7b_sft": (2048, 1, 8, 2, 1e-5, 1e-6, 0.1),
    "llama2_13b_sft": (2048, 1, 8, 2, 1e-5, 1e-6, 0.1),
    "llama2_70b_sft": (2048, 1, 8, 2, 1e-5, 1e-6, 0.1),
    "yuan2_2b_sft": (4096, 2, 1152, 4, 8e-5, 0, 0.01),
    "yuan2_51b_sft": (4096, 1, 1152, 4, 8e-5, 0, 0.01),
    "yuan2_102b_sft": (4096, 1, 1152, 4, 8e-5, 0, 0.01),
}
# stages of Yuan 2.0: layers on each
STAGES = {"yuan2_51b": [2] * 5 + [3] * 10 + [2], "yuan2_102b": [2] * 10 + [3] * 20 + [2] * 2}
RECOMPUTED = {
    "yuan2_2b": ("uniform", 1),
    "yuan2_51b": ("block", 1),
    "yuan2_102b": ("block", 2),
    "yuan2_2b_sft": ("uniform", 1),
    "yuan2_51b_sft": ("block", 2),  # one more: on the fewest GPUs that the released code names, each has more of the optimizer
    "yuan2_102b_sft": ("block", 3),
}
# of the old scripts for generation and the servers: TP, new tokens, top_k, top_p, repetition penalty
ANSWERS = {
    "llama2_7b": (1, 512, 10, 0, 1.2),
    "llama2_13b": (1, 512, 10, 0, 1.2),
    "llama2_70b": (4, 512, 10, 0, 1.2),
    "yuan2_2b": (1, 1024, 5, 0, 1),
    "yuan2_51b": (4, 1024, 1, 0, 1),
    "yuan2_102b": (8, 1024, 1, 0, 1),
}
# format, TP, PP
CONVERSIONS = {
    "convert_345m": ("torch", 1, 1),
    "convert_345m_to_hf": ("hf", 1, 1),
    "convert_llama2_7b_mindspore_1to4": ("mindspore", 4, 1),
    "convert_llama2_7b_mindspore_4to8": ("mindspore", 8, 1),
    "convert_llama2_7b_mindspore_8to16": ("mindspore", 16, 1),
    "convert_yuan2_2b_to_hf": ("hf", 1, 1),
    "convert_yuan2_51b_4tp": ("yuan", 4, 1),
    "convert_yuan2_102b_8tp": ("yuan", 8, 1),
    **{f"convert_{model}": ("torch_dist", 1, 1) for model in MODELS},
    **{f"convert_{model}_to_hf": ("hf", 1, 1) for model in MODELS if model.startswith("llama2")},
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YUAN_CONFIG_DIR", str(tmp_path / "config"))


@cache
def recipe(name: str, *words: str):
    return load([f"recipe={name}", *words]).recipe


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["{}", "{}_sft", "generate_{}", "serve_{}", "convert_{}"])
def test_a_model_is_the_published_one_in_every_recipe_for_it(name, form):
    r = recipe(form.format(name))
    m = r.model
    sizes = m.num_layers, m.hidden_size, m.ffn_hidden_size, m.num_attention_heads, m.num_query_groups, m.max_position_embeddings
    assert (*sizes, parameters(r)) == MODELS[name]
    llama = name.startswith("llama2")
    assert m.norm_epsilon == (1e-5 if llama else 1e-6) and m.untie_embeddings_and_output_weights is llama
    shape = m.family, m.normalization, m.position_embedding_type, m.swiglu, m.add_bias_linear, m.rotary_base
    assert shape == ("llama" if llama else "yuan2", "RMSNorm", "rope", True, False, 10000)


@pytest.mark.parametrize("name, rows", [("llama2_7b", 32000), ("llama2_70b", 32000), ("yuan2_2b", 135040), ("yuan2_102b", 135040)])
@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_the_vocabulary_has_the_published_rows_at_every_tp(name, rows, tp):
    derived = recipe(name, f"parallel.tensor_model_parallel_size={tp}", "parallel.pipeline_model_parallel_size=1").derived
    assert derived.padded_vocab_size == rows and derived.vocab_size == (32000 if rows == 32000 else 134958)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    r = recipe(name)
    p, launch = r.parallel, r.launch
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    assert (tp, pp, launch.nnodes, launch.nproc_per_node, p.use_distributed_optimizer) == LAYOUTS[name]
    assert p.sequence_parallel is (tp > 1)
    assert launch.kind == ("slurm" if launch.nnodes > 1 else "torchrun")
    assert r.derived.num_microbatches >= pp  # else the pipeline is never full


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("form", ["{}", "{}_sft"])
def test_the_stages_of_yuan(name, form):
    r = recipe(form.format(name))
    stages = parse_layout(r.parallel.pipeline_model_parallel_layout)
    assert [stage.count("t") for stage in stages] == STAGES[name]
    assert "".join(stages) == "E" + "t" * r.model.num_layers + "L"


@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_yuan_recomputes(name):
    p = recipe(name).parallel
    assert (p.recompute_granularity, p.recompute_method, p.recompute_num_layers) == ("full", *RECOMPUTED[name])


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining(name):
    r = recipe(name)
    t, o = r.training, r.optimizer
    warmup = o.lr_warmup_iters or o.lr_warmup_samples / t.global_batch_size
    sizes = t.seq_length, t.micro_batch_size, t.global_batch_size, r.derived.train_iters
    assert (*sizes, o.lr, o.min_lr, int(warmup), o.lr_decay_style, o.weight_decay) == PRETRAINING[name]
    assert (o.adam_beta1, o.adam_beta2, o.clip_grad, t.precision) == (0.9, 0.95, 1.0, "bf16")
    assert r.data.split == ("98,2,0" if name.startswith("llama2") else "10,0,0")
    assert (r.checkpoint.load, r.checkpoint.finetune) == ((f"data/{name}", True) if name.startswith("llama2") else (None, False))


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning(name):
    r = recipe(name)
    t, o = r.training, r.optimizer
    sizes = t.seq_length, t.micro_batch_size, t.global_batch_size, t.epochs
    assert (*sizes, o.lr, o.min_lr, o.weight_decay) == FINE_TUNING[name]
    assert o.lr_decay_style == "cosine" and t.precision == "bf16" and r.data.data_path is None
    assert (r.checkpoint.load, r.checkpoint.finetune) == (f"data/{name.removesuffix('_sft')}", True)


@pytest.mark.parametrize("name", [*PRETRAINING, *FINE_TUNING])
def test_the_traps_of_the_old_scripts_are_left_out(name):
    r = recipe(name)
    t, o = r.training, r.optimizer
    assert r.model.hidden_dropout == 0.0  # Megatron's default is 0.1
    assert r.model.attention_dropout == (0.0 if name.startswith("llama2") else 0.1)
    warmup = o.lr_warmup_fraction or o.lr_warmup_iters or o.lr_warmup_samples // t.global_batch_size
    assert warmup > 0  # 10,000 tokens of warm-up were less than one step
    assert r.checkpoint.save_interval < (r.derived.train_iters or 1e9)  # every 100,000 steps of 6,103 saved nothing
    assert not r.checkpoint.no_load_optim and not r.checkpoint.no_load_rng  # a run goes on with its optimizer
    assert t.seq_length <= r.model.max_position_embeddings


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_answers(verb, name):
    r = recipe(f"{verb}_{name}")
    g, tp = r.generate, r.parallel.tensor_model_parallel_size
    assert (tp, g.max_new_tokens, g.top_k, g.top_p, g.repetition_penalty) == ANSWERS[name]
    assert (r.derived.world_size, r.parallel.pipeline_model_parallel_size) == (tp, 1)
    assert g.load == recipe(f"convert_{name}").convert.target
    assert r.serve.port == 8000 and r.serve.host == "127.0.0.1"


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions(name):
    c = recipe(name).convert
    assert (c.to, c.tensor_model_parallel_size, c.pipeline_model_parallel_size) == CONVERSIONS[name]
    assert (c.fused_layout is not None) is (c.to == "mindspore")


def test_one_conversion_of_mindspore_goes_on_where_the_other_ended():
    first, second, third = (recipe(f"convert_llama2_7b_mindspore_{step}").convert for step in ("1to4", "4to8", "8to16"))
    assert (first.target, second.target) == (second.source, third.source)
