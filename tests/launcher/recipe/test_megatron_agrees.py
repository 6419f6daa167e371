"""The checks accept what Megatron accepts and refuse what it refuses: both are asked about the same recipes."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.recipe.check_data import BlendError, parse_blend, parse_split
from launcher.recipe.check_layout import pipeline, tensor_parallel
from launcher.recipe.check_schedule import learning_rate, rampup, weight_decay
from launcher.recipe.pipeline import LayoutError, parse_layout
from launcher.recipe.problem import Case
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Recipe

small = st.integers(1, 12)


def faults_of(checks, **values) -> list[str]:
    """Errors of some checks about a recipe with these values (`model__num_layers=2`)."""
    recipe, sources = Recipe(), {}
    for name, value in values.items():
        group, leaf = name.split("__")
        setattr(getattr(recipe, group), leaf, value)
        sources[f"{group}.{leaf}"] = "command line"
    resolve(recipe, sources, "test")
    problems = [problem for check in checks for problem in check(Case(recipe, sources))]
    return [problem.what for problem in problems if problem.severity == "error"]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.integers(0, 1000), st.floats(0, 100).map(lambda x: round(x, 3))), min_size=1, max_size=3))
def test_splits_round_to_the_same_documents(shares):
    from megatron.core.datasets import blended_megatron_dataset_config as megatron

    assume(sum(shares) > 0)
    text = ",".join(map(str, shares))
    assume("e" not in text)
    theirs = megatron.convert_split_vector_to_split_matrix(megatron.parse_and_normalize_split(text))
    assert parse_split(text) == theirs


@given(
    st.lists(
        st.one_of(st.sampled_from(["a", "b_text_document", "c/d"]), st.floats(0.1, 9).map(lambda x: round(x, 2))),
        min_size=1,
        max_size=6,
    )
)
@settings(deadline=None)
def test_blends_mean_the_same(words):
    from megatron.core.datasets.utils import get_blend_from_list

    try:
        ours = parse_blend(words)
    except BlendError:
        assert len(words) % 2 or any(isinstance(word, str) for word in words[::2])  # weights without a partner
        return
    prefixes, weights = get_blend_from_list([str(word) for word in words])
    assert (ours[0], ours[1]) == (list(prefixes), weights)


@settings(deadline=None, max_examples=200)
@given(st.text("EtL|()*2, ", max_size=14))
def test_layouts_are_read_alike(text):
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L"}
    assume(" " not in text)  # ours takes spaces for decoration too
    try:
        theirs = ["".join(letters[layer] for layer in stage) for stage in PipelineParallelLayerLayout.parse_str_to_list(text)]
    except AssertionError:
        with pytest.raises(LayoutError):
            parse_layout(text)
    else:
        assert parse_layout(text) == theirs


@settings(deadline=None, max_examples=150)
@given(
    layers=small,
    heads=small,
    groups=st.one_of(st.none(), small),
    tp=st.integers(1, 4),
    pp=st.integers(1, 4),
    first=st.one_of(st.none(), st.integers(1, 4)),
    last=st.one_of(st.none(), st.integers(1, 4)),
    layout=st.one_of(st.none(), st.none(), st.sampled_from(["Et*2|t*2L", "Ett|tt|tt|ttL", "Et|t|tL", "Ettt|L", "Ett|LE"])),
    sequence_parallel=st.booleans(),
)
def test_layers_heads_and_stages(layers, heads, groups, tp, pp, first, last, layout, sequence_parallel):
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    counts = [count for count in (first, last) if count is not None]
    assume(layers >= sum(counts) and pp >= len(counts))  # Megatron lets negative rests pass, and builds too many layers
    assume(groups is None or heads % groups == 0)  # attention's own rule, which comes later
    ours = faults_of(
        [pipeline, tensor_parallel],
        model__num_layers=layers,
        model__num_attention_heads=heads,
        model__hidden_size=heads * 8,
        model__ffn_hidden_size=tp * 16,
        model__num_query_groups=groups,
        parallel__tensor_model_parallel_size=tp,
        parallel__pipeline_model_parallel_size=pp,
        parallel__decoder_first_pipeline_num_layers=first,
        parallel__decoder_last_pipeline_num_layers=last,
        parallel__pipeline_model_parallel_layout=layout,
        parallel__sequence_parallel=sequence_parallel,
        training__seq_length=tp * 8,
        model__max_position_embeddings=256,
    )
    try:
        TransformerConfig(
            num_layers=layers,
            hidden_size=heads * 8,
            num_attention_heads=heads,
            num_query_groups=groups,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
            pipeline_model_parallel_layout=layout,
            sequence_parallel=sequence_parallel,
            pipeline_dtype=torch.float32,
        )
        accepted = layout is not None or first is not None or last is not None or layers % pp == 0  # the last: validate_args
    except (ValueError, AssertionError):
        accepted = False
    assert accepted == (not ours), ours


@settings(deadline=None, max_examples=150)
@given(
    style=st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]),
    iters=small,
    decay=st.one_of(st.none(), small),
    warmup=st.integers(0, 12),
    wsd=st.one_of(st.none(), small),
    rates=st.tuples(*[st.sampled_from([0.0, 0.1, 0.2])] * 3),
    weights=st.tuples(st.sampled_from([None, 0.1, 0.2]), st.sampled_from([None, 0.1, 0.2])),
    growth=st.sampled_from(["constant", "linear"]),
)
def test_schedules(style, iters, decay, warmup, wsd, rates, weights, growth):
    import torch
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    lr, min_lr, init = rates[0] + 0.1, rates[1], rates[2]
    assume(wsd is None or style != "WSD" or wsd <= (decay or iters) - warmup)  # Megatron decays by a wrong curve there
    ours = faults_of(
        [learning_rate, weight_decay],
        training__train_iters=iters,
        training__global_batch_size=16,
        optimizer__lr=lr,
        optimizer__min_lr=min_lr,
        optimizer__lr_decay_style=style,
        optimizer__lr_decay_iters=decay,
        optimizer__lr_warmup_iters=warmup,
        optimizer__lr_warmup_init=init,
        optimizer__lr_wsd_decay_iters=wsd,
        optimizer__weight_decay_incr_style=growth,
        optimizer__start_weight_decay=weights[0],
        optimizer__end_weight_decay=weights[1],
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        assert growth == "linear" or weights == (None, None)  # validate_args
        assert growth == "constant" or None not in weights
        start, end = weights if growth == "linear" else (0.1, 0.1)
        OptimizerParamScheduler(
            optimizer, init, lr, min_lr, warmup * 16, (decay or iters) * 16, style, start, end, iters * 16, growth,
            use_checkpoint_opt_param_scheduler=False, wsd_decay_steps=None if wsd is None else wsd * 16, lr_wsd_decay_style="linear",
        )  # fmt: skip
        accepted = True
    except AssertionError:
        accepted = False
    assert accepted == (not ours), ours


@settings(deadline=None, max_examples=100)
@given(start=small, increment=small, samples=st.integers(0, 40), batch=small, micro=st.integers(1, 3))
def test_growing_batches(start, increment, samples, batch, micro):
    """Its asserts let a ramp over 0 samples and one from the whole batch pass; then it divides by zero."""
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    ours = faults_of(
        [rampup],
        training__train_samples=1000,
        training__global_batch_size=batch,
        training__micro_batch_size=micro,
        training__rampup_batch_size=[start, increment, samples],
    )
    try:
        theirs = RampupBatchsizeNumMicroBatchesCalculator(batch, micro, 1, False, 1, start, increment, samples)
        for consumed in range(samples + 2):
            theirs.update(consumed, consistency_check=True)
        accepted = True
    except (AssertionError, ZeroDivisionError):
        accepted = False
    assert accepted == (not ours), ours
