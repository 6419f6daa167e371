"""The estimate of memory and arithmetic: against published formulas, megatron-core's own stages, and what training takes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.recipe import load
from launcher.recipe.check import check
from launcher.recipe.check_memory import available
from launcher.recipe.estimate import activations
from launcher.recipe.estimate.memory import BAND, GIB, bytes_per_parameter, stage_memory, stage_parameters
from launcher.recipe.estimate.report import estimate
from launcher.recipe.estimate.stages import chunks, in_flight
from launcher.recipe.estimate.time import total_flops, training_seconds
from launcher.recipe.size import flops_per_token, parameters, vocabulary_table

ONE_GPU = "launch.device=cuda launch.nnodes=1 launch.nproc_per_node=1 tokenizer.type=NullTokenizer tokenizer.vocab_size=50303"


def recipe(*words: str, base: str = "345m"):
    """A resolved recipe on GPUs."""
    return load([f"recipe={base}", *ONE_GPU.split(), *[word for text in words for word in text.split()]]).recipe


def layout(tp: int = 1, pp: int = 1, dp: int = 1, **parallel: object) -> str:
    """Words for TP, PP and DP, and others of `parallel`."""
    keys = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp} | parallel
    words = [f"parallel.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
    return " ".join([*words, f"launch.nproc_per_node={tp * pp * dp}"])


@pytest.mark.parametrize("dp", [1, 4, 8])
def test_bytes_of_a_parameter_are_megatrons(dp):
    """18, and 6 + 12 / DP with the distributed optimizer, in bf16; 16 in fp32; in fp16 gradients are reduced in 16 bits."""
    words = "training.global_batch_size=64 training.precision="
    assert sum(bytes_per_parameter(recipe(layout(dp=dp), f"{words}bf16"))) == 18
    shared = layout(dp=dp, use_distributed_optimizer=True)
    assert sum(bytes_per_parameter(recipe(shared, f"{words}bf16"))) == pytest.approx(6 + 12 / dp)
    assert sum(bytes_per_parameter(recipe(shared, f"{words}fp32"))) == pytest.approx(8 + 8 / dp)
    assert sum(bytes_per_parameter(recipe(shared, f"{words}fp16"))) == pytest.approx(4 + 12 / dp)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_activations_are_those_of_the_published_formula(tp):
    """Korthikanti et al. 2022, table 2, without the quadratic term, which a fused attention does not have; it keeps one
    fp32 number per head and token instead."""
    r = recipe(layout(tp), "training.precision=bf16")
    sbh = 1024 * 4 * 1024
    statistics = 1024 * 4 * 16 * 4 // tp
    assert activations.layer(r) - statistics == sbh * (10 + 24 / tp)
    if tp > 1:
        r = recipe(layout(tp, sequence_parallel=True), "training.precision=bf16")
        assert activations.layer(r) - statistics == sbh * 34 / tp


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_a_mask_of_documents_is_in_each_layer_on_a_gpu_and_nowhere_on_a_cpu(dropout):
    """A byte for each pair of 1,024 tokens in 4 samples, in each of 24 layers as bool and fp32."""
    words = f"training.precision=fp32 training.micro_batch_size=4 model.attention_dropout={dropout}"
    for device, times in [("cpu", 0), ("cuda", 24 * (1 + 4))]:
        plain, apart = (
            stage_memory(recipe(words, f"launch.device={device} data.reset_attention_mask={mask}"))[0] for mask in ("false", "true")
        )
        assert apart.activations - plain.activations == times * 4 * 1024 * 1024


def test_recomputed_layers_keep_their_input_alone():
    """2sbh a layer with `uniform`; `block` keeps all of the layers that it does not recompute."""
    bf16 = "training.precision=bf16 parallel.recompute_granularity=full parallel.recompute_num_layers="
    plain = recipe("training.precision=bf16")
    stream, layer = 2 * 1024 * 4 * 1024, activations.layer(plain)
    rest = stage_memory(plain)[0].activations - 24 * layer  # of the embedding and the last norm
    assert stage_memory(recipe(f"{bf16}1 parallel.recompute_method=uniform"))[0].activations == 24 * stream + rest
    assert stage_memory(recipe(f"{bf16}4 parallel.recompute_method=uniform"))[0].activations == 6 * stream + rest
    assert stage_memory(recipe(f"{bf16}20 parallel.recompute_method=block"))[0].activations == 20 * stream + 4 * layer + rest


@pytest.mark.parametrize(("pp", "virtual"), [(2, 1), (4, 1), (4, 2), (8, 3), (2, 12)])
def test_a_pipelines_first_rank_holds_a_whole_models_activations(pp, virtual):
    """Of one micro-batch: PP micro-batches of 1 / PP of the layers, and 1 + (p - 1) / (p m) of that when interleaved
    (Korthikanti et al. 2022, section 4.2.3)."""
    words = "" if virtual == 1 else f"parallel.num_layers_per_virtual_pipeline_stage={24 // pp // virtual}"
    r = recipe(layout(pp=pp), words, "training.global_batch_size=256")
    held = sum(count * chunk.layers for count, chunk in zip(in_flight(r, 0, virtual), chunks(r)[0], strict=True))
    assert held == pytest.approx(24 * (1 + (pp - 1) / (pp * virtual) if virtual > 1 else 1))
    last = in_flight(r, pp - 1, virtual)
    assert last == [1] if virtual == 1 else sum(last) == (virtual - 1) * pp + 1


def test_fewer_micro_batches_than_ranks_are_all_that_is_held():
    r = recipe(layout(pp=8), "training.global_batch_size=12 training.micro_batch_size=4")
    assert [in_flight(r, rank, 1) for rank in range(8)] == [[3]] * 6 + [[2], [1]]


@settings(max_examples=25, deadline=None)
@given(
    pp=st.sampled_from([1, 2, 3, 4, 6]),
    virtual=st.sampled_from([None, 1, 2]),
    tied=st.booleans(),
    base=st.sampled_from(["345m", "bases/llama2_7b", "bases/yuan2_2b"]),
)
def test_the_stages_hold_the_model_once_and_a_tied_table_twice(pp, virtual, tied, base):
    words = f"model.num_layers=24 model.untie_embeddings_and_output_weights={str(not tied).lower()} training.seq_length=512"
    if virtual and pp > 1:
        words += f" parallel.num_layers_per_virtual_pipeline_stage={virtual}"
    r = recipe(layout(pp=pp), words, "training.micro_batch_size=1 training.global_batch_size=12", base=base)
    copy = vocabulary_table(r) if tied and pp > 1 else 0
    assert sum(stage_parameters(r, stage) for stage in chunks(r)) == parameters(r) + copy


def test_stages_are_megatron_cores():
    """Uneven layouts, also those that `yuan plan` writes, and interleaved ones, as megatron-core deals them out."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    from launcher.recipe.estimate.layouts import uneven_layout

    texts = ["Ett|(tt|)*9(ttt|)*20tt|ttL", "Et*3|t*5|t*4|L", "E|t*4|t*4|t*3L"]
    texts += [uneven_layout(layers, pp) for layers, pp in [(42, 16), (84, 32), (80, 12), (7, 2), (25, 24)]]
    for text in texts:
        flat = PipelineParallelLayerLayout.parse_str_to_list(text)
        for pp in {len(flat), len(flat) // 2} if len(flat) % 2 == 0 else {len(flat)}:
            theirs = PipelineParallelLayerLayout.from_str(text, pp).layout
            layers = sum(kinds.count(LayerType.decoder) for rank in theirs for kinds in rank)
            quoted = f"parallel.pipeline_model_parallel_layout='{text}'"
            r = load(["recipe=345m", *ONE_GPU.split(), f"model.num_layers={layers}", *layout(pp=pp).split(), quoted]).recipe
            ours = [[(chunk.layers, chunk.embedding, chunk.output) for chunk in rank] for rank in chunks(r)]
            assert ours == [
                [
                    (kinds.count(LayerType.decoder), LayerType.embedding in kinds, LayerType.loss in kinds)
                    for kinds in rank
                ]
                for rank in theirs
            ], text


def test_yuans_published_sizes():
    """Parameters of the paper's models, their published uneven stages, and 15.0 / 319 / 633 GFLOP a token."""
    for name, size, flops in [("2b", 2_088_724_480, 15.0), ("51b", 51_842_105_344, 319), ("102b", 102_577_954_816, 633)]:
        r = load([f"recipe=yuan2_{name}"]).recipe
        assert parameters(r) == size
        assert flops_per_token(r) / 1e9 == pytest.approx(flops, rel=0.005)


def test_days_follow_from_flops_peak_and_share():
    r = recipe(layout(dp=4), "launch.gpu_peak_tflops=312 launch.mfu=0.5")
    flops = r.derived.train_iters * 32 * 1024 * flops_per_token(r)
    assert total_flops(r) == pytest.approx(flops)
    assert training_seconds(r) == pytest.approx(flops / (4 * 156e12))
    assert training_seconds(recipe()) is None


def verdict(*words: str) -> list:
    """What `check` says of the memory."""
    loaded = load([f"recipe={words[0]}", *" ".join(words[1:]).split()])
    return [problem for problem in check(loaded.recipe, loaded.sources) if "needs" in problem.what and " GiB: " in problem.what]


@pytest.mark.parametrize(("times", "severity"), [(0.85, "error"), (0.95, "warning"), (1.05, "warning"), (1.15, None)])
def test_a_gpu_too_small_is_an_error_and_one_just_enough_a_warning(times, severity):
    words = ("345m", ONE_GPU, "training.precision=bf16")
    needed = stage_memory(load(["recipe=345m", *" ".join(words[1:]).split()]).recipe)[0].total / GIB
    found = verdict(*words, f"launch.gpu_memory_gib={needed * times}")
    assert [problem.severity for problem in found] == ([severity] if severity else [])
    assert not verdict(*words)  # no memory given, no verdict


@settings(max_examples=30, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 4, 8]),
    gib=st.floats(2, 40),
)
def test_the_way_out_that_is_offered_fits(tp, pp, dp, micro, gib):
    words = [*ONE_GPU.split(), *layout(tp, pp, dp).split(), f"training.micro_batch_size={micro}"]
    words += ["training.global_batch_size=128", "training.precision=bf16", f"launch.gpu_memory_gib={gib}"]
    for problem in verdict("345m", *words):
        if problem.fix.startswith(("parallel.", "training.")):
            altered = load(["recipe=345m", *words, *problem.fix.split()]).recipe
            assert max(stage.total for stage in stage_memory(altered)) <= gib * GIB * (1 - BAND)
            assert not verdict("345m", *words, problem.fix)
        else:
            assert "none of" in problem.fix


def test_a_cpus_processes_share_this_machines_memory(monkeypatch):
    """A warning where a recipe is looked at, which may be for another machine; an error where it is about to start."""
    from launcher.recipe import check_memory
    from launcher.recipe.problem import Case

    words = "launch.device=cpu training.precision=fp32 tokenizer.type=NullTokenizer tokenizer.vocab_size=50303"
    loaded = load(["recipe=345m_4dp", *words.split()])
    assert 2**28 < available(loaded.recipe) < 2**50
    one = stage_memory(loaded.recipe)[0].total
    for machine, launching, severities in [(3 * one, False, ["warning"]), (3 * one, True, ["error"]), (5 * one, True, [])]:
        monkeypatch.setattr(check_memory, "available", lambda recipe, bytes_=machine: bytes_)
        found = list(check_memory.memory(Case(loaded.recipe, loaded.sources, launching=launching)))
        assert [problem.severity for problem in found] == severities
        assert all(f"4 processes need {4 * one / GIB:.1f}" in problem.what for problem in found)


@pytest.mark.parametrize(
    "word",
    ["launch.gpu_memory_gib=-1", "launch.gpu_peak_tflops=0", "launch.mfu=0", "parallel.recompute_num_layers=0", "model.num_layers=0",
     "training.micro_batch_size=0", "training.global_batch_size=-8", "parallel.pipeline_model_parallel_size=5",
     "parallel.tensor_model_parallel_size=0", "parallel.pipeline_model_parallel_layout=Etx", "model.kv_channels=-64",
     "parallel.num_layers_per_virtual_pipeline_stage=0", "model.num_query_groups=-1", "training.seq_length=-1"],
)  # fmt: skip
def test_nothing_is_reckoned_from_impossible_values(word):
    """Another rule says what is wrong with them; the estimate stays silent, and whole."""
    more = "parallel.recompute_granularity=full parallel.recompute_method=uniform parallel.recompute_num_layers=1"
    words = [*ONE_GPU.split(), "launch.gpu_memory_gib=1", "launch.gpu_peak_tflops=312", *more.split(), word]
    assert not verdict("345m", *words)
    loaded = load(["recipe=345m", *words])
    errors = [problem for problem in check(loaded.recipe, loaded.sources) if problem.severity == "error"]
    assert any(word.split("=")[0] in problem.where for problem in errors)


def test_the_lines_of_check():
    """One line where the stages are alike, a table with a row for each kind of stage where they are not."""
    alike = estimate(recipe("launch.gpu_memory_gib=24 launch.gpu_peak_tflops=312"))
    assert alike["memory"].count("\n") == 0 and " of 24 GiB a process: weights " in alike["memory"]
    assert "29.8 minutes on 1 at 40% of 312 TFLOP/s" in alike["arithmetic"]
    table = estimate(load(["recipe=yuan2_102b"]).recipe)["memory"].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["stage", "0", "1-9", "10-29", "30", "31"]
    assert all(len(line) <= 86 for line in table)  # 100 columns with what stands before them


@pytest.mark.parametrize(
    "words",
    [
        "recipe=345m model.num_layers=6 model.hidden_size=512 model.num_attention_heads=8 model.max_position_embeddings=512 "
        "training.precision=fp32 parallel.recompute_granularity=selective tokenizer.vocab_size=16383 "
        "training.micro_batch_size=2 training.global_batch_size=4 "
        "launch.nproc_per_node=2 parallel.pipeline_model_parallel_size=2",
        "recipe=quickstart model.num_layers=6 model.hidden_size=768 model.num_attention_heads=12 tokenizer.vocab_size=16383 "
        "training.micro_batch_size=2 training.global_batch_size=4 launch.nproc_per_node=2 "
        "parallel.use_distributed_optimizer=true parallel.recompute_granularity=full parallel.recompute_method=uniform parallel.recompute_num_layers=1",
    ],
    ids=["pp2_dropout_selective", "zero1_full"],
)
def test_what_training_really_takes(words):
    """Tensors within 5 %, processes within the stated band; the shapes of tests/benchmarks/memory.py, smaller."""
    from tests.benchmarks.memory import measure

    peaks = measure(words.split())
    for rank in peaks:
        assert rank.estimate_tensors == pytest.approx(rank.tensors, rel=0.05)
    for stage in {rank.stage for rank in peaks}:
        of_stage = [rank for rank in peaks if rank.stage == stage]
        assert of_stage[0].estimate_process == pytest.approx(max(rank.process for rank in of_stage), rel=BAND)
