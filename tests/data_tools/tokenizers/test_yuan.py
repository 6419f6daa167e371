"""Yuan's tokenizer beside ids that `transformers` 4.57.6 gave: its slow LlamaTokenizer, set up as Yuan 2.0's code does."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from data_tools.tokenizers import TokenizerError, build_tokenizer
from launcher.recipe.load import load
from tests.data_tools.samples import YUAN_SPECIALS, yuan_model

# Facts of the released model: what it holds, and what its code adds above the last of its 134,953 pieces.
ADDED = ["<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>"]
SPLIT = ["<unk>", "<s>", "<eod>", *YUAN_SPECIALS[2:], *ADDED]


@pytest.mark.parametrize(("text", "ids"), json.loads(Path(__file__).with_name("yuan_ids.json").read_text(encoding="utf-8")))
def test_ids_of_the_original(yuan, text, ids):
    assert yuan.encode(text) == ids
    assert yuan.decode(ids) == text.replace("\u2581", " ")


def test_tokens_that_the_model_lacks_come_above_it_in_order(yuan):
    pieces = SentencePieceProcessor(model_proto=yuan_model()).get_piece_size()
    assert [yuan.special_tokens[token] for token in ADDED] == [pieces + i for i in range(5)]
    assert yuan.vocab_size == pieces + 5
    assert yuan.eod == yuan.special_tokens["<eod>"] < pieces
    assert yuan.special_tokens["</s>"] == 2 and "<n>" not in yuan.special_tokens


def test_the_released_model_is_padded_to_the_rows_of_the_released_weights():
    recipe = load(["recipe=yuan2_2b"]).recipe
    assert recipe.tokenizer.type == "YuanTokenizer"
    assert recipe.derived.vocab_size == 134953 + len(ADDED) and recipe.derived.padded_vocab_size == 135040


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from([*SPLIT, "</s>", "<n>", "<", " ", "\n"]), st.text(max_size=12).filter(lambda t: t.isprintable())), max_size=8))
def test_every_segment_is_one_of_the_library(yuan, parts):
    library, text = SentencePieceProcessor(model_proto=yuan_model()), "".join(parts)
    wanted = []
    for segment in re.split("(" + "|".join(SPLIT) + ")", text):
        wanted += [yuan.special_tokens[segment]] if segment in SPLIT else library.encode(segment)
    assert yuan.encode(text) == wanted


def test_bos_is_never_added_and_every_segment_has_its_prefix(yuan):
    prefix = yuan.encode("R")[0]  # no piece begins with a space and an R
    assert yuan.encode("Rx<sep>Rx") == [prefix, *yuan.encode("Rx")[1:], yuan.special_tokens["<sep>"], *yuan.encode("Rx")]


def test_another_model_is_refused(tmp_path, sentencepiece):
    with pytest.raises(TokenizerError, match="no piece <eod> or <sep> or <pad>") as refused:
        build_tokenizer("YuanTokenizer", tokenizer_model=sentencepiece.files["tokenizer_model"])
    assert "SentencePieceTokenizer" in refused.value.fix
    with pytest.raises(TokenizerError, match="no such file: .*tokenizer.model"):
        build_tokenizer("YuanTokenizer", tokenizer_model=tmp_path)


def test_a_large_merged_vocabulary_is_the_librarys_and_no_ranks(tmp_path):
    """Thousands of pieces with the same score: SentencePiece takes the left-most, a list of ranks cannot say so."""
    import random

    choose = random.Random(1)
    words = " ".join("".join(choose.choices("abcdefgh今天气很", k=7)) for _ in range(1500))
    (tmp_path / "tokenizer.model").write_bytes(yuan_model(words))
    library = SentencePieceProcessor(model_proto=yuan_model(words))
    tokenizer = build_tokenizer("YuanTokenizer", tokenizer_model=tmp_path)
    scores = [library.get_score(i) for i in range(library.get_piece_size())]
    assert scores.count(0.0) > 2500
    texts = ["".join(choose.choices("abcdefgh今天气很 \n1", k=400)) for _ in range(50)]
    assert tokenizer.encode_batch(texts) == [library.EncodeAsIds(text) for text in texts]
    from gigatoken import Tokenizer

    by_rank = Tokenizer.from_sentencepiece(yuan_model(words)).encode_batch_list(texts, parallel=False)
    assert by_rank != tokenizer.encode_batch(texts)
