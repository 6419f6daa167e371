"""Training byte-level BPE; SentencePiece's is in test_tokenizers.py."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.tokenizers import TokenizerError, build_tokenizer, train_byte_level_bpe
from tests.data_tools.samples import HARD_TEXTS
from tests.data_tools.tokenizers.conftest import ranks_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    for name, content in train_byte_level_bpe(HARD_TEXTS, 330).items():
        (folder / name).write_bytes(content)
    return folder


def both(folder):
    files = {"vocab_file": folder / "vocab.json", "merge_file": folder / "merges.txt"}
    return build_tokenizer("GPT2BPETokenizer", **files), build_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder)


def test_two_forms_of_one_vocabulary(folder):
    gpt2, huggingface = both(folder)
    for tokenizer in (gpt2, huggingface):
        assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.special_tokens) == (330, 329, {"<|endoftext|>": 329})
        assert tokenizer.engine == "gigatoken"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_with_the_same_ids_from_both(folder, text):
    gpt2, huggingface = both_once(folder)
    assert gpt2.encode(text) == huggingface.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text


_both = []


def both_once(folder):
    if not _both:
        _both.extend(both(folder))
    return _both


def test_the_same_texts_make_the_same_files():
    assert train_byte_level_bpe(iter(HARD_TEXTS), 330) == train_byte_level_bpe(iter(HARD_TEXTS), 330)


def test_what_is_frequent_becomes_a_token_and_best_merges_come_first():
    files = train_byte_level_bpe(["aab aab aab aab xyz"], 260)
    assert files["merges.txt"].decode().splitlines() == ["#version: 0.2", "a a", "aa b", "Ġ aab"]  # 4, 4 and 3 times
    assert list(json.loads(files["vocab.json"]))[256:] == ["aa", "aab", "Ġaab", "<|endoftext|>"]


def test_gigatokens_trainer_makes_the_same_merges():
    from gigatoken import train_bpe

    text = " ".join(HARD_TEXTS[:4]) * 3
    _, theirs = train_bpe(text.encode(), 299, [])
    ours = [line.split() for line in train_byte_level_bpe([text], 300)["merges.txt"].decode().splitlines()[1:]]
    signs = {part: i for i, part in enumerate({part for merge in ours for part in merge})}
    token_of = {i: token for token, i in ranks_of(signs).items()}
    assert [tuple(token_of[signs[part]] for part in merge) for merge in ours] == theirs


def test_a_text_without_a_space_is_no_harder():
    assert len(train_byte_level_bpe(["abcdefghij" * 100_000], 270)["merges.txt"].splitlines()) == 14


def test_too_few_words_and_a_fault_of_the_input():
    with pytest.raises(TokenizerError, match="and not 5000") as refused:
        train_byte_level_bpe(["a b c"], 5000)
    assert refused.value.fix == "--vocab-size 259, or more text"

    def broken():
        yield "fine"
        raise TokenizerError("line 2 is broken")

    with pytest.raises(TokenizerError, match="line 2 is broken"):
        train_byte_level_bpe(broken(), 300)
