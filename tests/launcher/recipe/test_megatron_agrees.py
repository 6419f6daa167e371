"""The checks accept what Megatron accepts and refuse what it refuses: both are asked about the same recipes."""

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from data_tools.tokenizers import build_tokenizer
from launcher.recipe import load
from launcher.recipe.blend import BlendError, parse_blend, parse_split
from launcher.recipe.check import check
from launcher.recipe.pipeline import LayoutError, parse_layout
from tests.launcher.recipe.differential import core_refusal, one_process, our_problems, resolved


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


# Where `check` refuses what Megatron takes, and why.
STRICTER = {
    "layers are left for the -": "Megatron compares two negative rests as truths, and builds more layers than the model has",
    "channels of a head are no pairs": "with rotary_percent below 1 Megatron rounds an odd number of channels up and turns one more",
    "cannot have optimizer.lr_wsd_decay_iters": "Megatron-LM does not look at it in a training counted in samples",
    "WSD's last phase begins within the warm-up": "Megatron decays by a wrong curve there",
}
VERDICTS = Path(__file__).with_name("validate_args.jsonl.gz")


def test_thousands_of_recipes_are_judged_as_megatron_judges_them():
    """Each line holds what differs from a sound recipe, and the rule by which Megatron-LM's validate_args refuses it.

    That function is on no package index: it was run on these cases beforehand (revision 000c4ac2, the sections that a
    recipe reaches). megatron-core, which has the rest of the rules, is asked now.
    """
    rows = [json.loads(line) for line in gzip.decompress(VERDICTS.read_bytes()).splitlines()]
    disagreements, accepted, reasons = [], 0, set()
    for case, refusal in rows:
        recipe, sources = resolved(case)
        ours = [problem.what for problem in our_problems(recipe, sources) if problem.severity == "error"]
        theirs = refusal or core_refusal(recipe)
        accepted += not theirs
        why = {words for words in STRICTER for what in ours if words in what}
        if bool(ours) != bool(theirs):
            reasons |= why
            if not (why and len(ours) == 1):
                disagreements.append((case, ours, theirs))
    assert disagreements == []
    assert len(rows) == 3000 and 600 < accepted < 1500
    assert reasons == set(STRICTER)
    assert len({refusal for _, refusal in rows}) > 20




@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(1, 70), min_size=6, max_size=12), min_size=1, max_size=3),
    weights=st.sampled_from([None, None, [1, 2, 3], [1, 0.5, 0]]),
    split=st.sampled_from(["1,0,0", "5,5,0", "4,4,2"]),
    iters=st.integers(1, 5),
    eval_iters=st.integers(0, 2),
)
def test_data_are_enough_where_megatron_builds_as_many_samples(write_data, write_recipe, documents, weights, split, iters, eval_iters):
    """Blends of data sets with documents of these lengths. A share without a token is left out: megatron-core counts on
    for ever there."""
    names = [write_data(f"d{number}", lengths) for number, lengths in enumerate(documents)]
    words = names if weights is None else [word for pair in zip(weights, names) for word in pair]
    write_recipe(
        "blend",
        f"""
        model: {{num_layers: 1, hidden_size: 8, num_attention_heads: 1}}
        training: {{seq_length: 16, micro_batch_size: 2, train_iters: {iters}, eval_interval: 2, eval_iters: {eval_iters}}}
        optimizer: {{lr: 1.0}}
        tokenizer: {{type: NullTokenizer, vocab_size: 50}}
        launch: {{device: cpu}}
        data: {{data_path: {json.dumps(words)}, split: '{split}'}}
        """,
    )
    loaded = load(["recipe=blend"])
    problems = check(loaded.recipe, loaded.sources)
    ours = [problem.what for problem in problems if problem.severity == "error"]
    assume(not any("comes to no token" in what for what in ours))
    wanted = [iters * 2, (iters // 2 + 1) * eval_iters * 2, eval_iters * 2]
    built = core_samples([str(word) for word in words], split, wanted)
    enough = built is not None and all(count is None or count >= least for count, least in zip(built, wanted))
    assert enough == (not ours), (ours, built, wanted)


def core_samples(words: list[str], split: str, wanted: list[int]) -> list[int | None] | None:
    """How many samples megatron-core makes of each set; None for the whole where it refuses."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=get_blend_from_list(words),
        split=split,
        tokenizer=build_tokenizer("NullTokenizer", vocab_size=50),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=tempfile.mkdtemp(dir="."),
    )
    with one_process():
        try:
            sets = BlendedMegatronDatasetBuilder(GPTDataset, wanted, lambda: True, config).build()
        except AssertionError:
            return None
        return [None if one is None else len(one) for one in sets]
