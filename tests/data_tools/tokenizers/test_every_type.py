"""What holds for every type: the four ways to encode agree, every text comes back, it can be rebuilt and copied."""

import pickle
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.tokenizers import base, build_tokenizer, gigatoken
from tests.data_tools.samples import HARD_TEXTS

LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=30)
WORDS = ["<sep>", "<eod>", "<pad>", "<s>", "</s>", "<unk>", "<n>", "<mask>", "<|endoftext|>", "<|end|>", "<tool>", "<sep", " ", "  ", "\n"]
TEXT = st.lists(st.one_of(LETTERS, st.sampled_from(WORDS)), max_size=6).map("".join)
FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = [
    "gpt2", "gpt2, library alone", "huggingface", "huggingface, library alone", "gpt-4", "gpt-4o", "gpt-4, library alone",
    "tiktoken of our own", "megatron's tiktoken", "sentencepiece bpe", "sentencepiece unigram", "yuan",
]  # fmt: skip


@pytest.fixture(params=NAMES)
def tokenizer(request, of_every_type):
    return of_every_type[request.param]


def agree(tokenizer, texts: list[str]) -> None:
    alone = [tokenizer.encode(text) for text in texts]
    flat, lengths = tokenizer.encode_arrays(texts)
    assert tokenizer.encode_batch(texts) == alone
    assert lengths.tolist() == [len(ids) for ids in alone]
    assert flat.tolist() == [i for ids in alone for i in ids]


def test_hard_texts(tokenizer):
    agree(tokenizer, ["", *HARD_TEXTS, ""])
    agree(tokenizer, [])
    agree(tokenizer, [""])
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@FAST
@given(texts=st.lists(TEXT, max_size=4))
def test_encodings_agree_and_any_text_comes_back(tokenizer, texts):
    agree(tokenizer, texts)
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        if " <mask>" not in text and "\n<mask>" not in text or tokenizer.type != "HuggingFaceTokenizer":  # it takes the space before it
            assert tokenizer.decode(ids) == text


def pieces(tokenizer, text: str, size: int) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_pieces(text[i : i + size] for i in range(0, len(text), size))]


@FAST
@given(texts=st.lists(TEXT, max_size=20), size=st.integers(1, 60))
def test_a_long_text_in_pieces(tokenizer, texts, size):
    before, base.LONG = base.LONG, 40
    try:
        text = "你好，世界。 the cat sat\n".join(texts)
        assert sum(pieces(tokenizer, text, size), []) == tokenizer.encode(text)
    finally:
        base.LONG = before


SIGNS = st.lists(st.sampled_from(["a", "x1", "the", '"),', "=", "=" * 70, ");", "！", "\n", "\r\n", "  ", "\t", "'s"]), min_size=60, max_size=150)


@FAST
@given(signs=SIGNS)
def test_a_long_text_of_signs_in_pieces(tokenizer, signs):
    before, base.LONG = base.LONG, 100
    try:
        assert sum(pieces(tokenizer, "".join(signs), 100), []) == tokenizer.encode("".join(signs))
    finally:
        base.LONG = before


def test_around_characters_that_one_library_does_not_know(tokenizer, monkeypatch):
    monkeypatch.setattr(gigatoken, "_NEAR", 200)
    monkeypatch.setattr(base, "_SEARCHED", 200)
    lines = [f'    (0x{i:x}, "{chr(i)}"),\n' for i in range(0x80, 0x200)]
    lines[7::40] = [f"  {chr(i)}{chr(0x323B0 + i)}'ll, the cat sat\n" for i in range(len(lines[7::40]))]
    text = "".join(lines)
    ids, lengths = tokenizer.encode_arrays(["before", text, "behind"])
    assert ids[lengths[0] : lengths[:2].sum()].tolist() == tokenizer.encode(text)


def test_a_long_text_is_cut_where_neighbours_are_merged(tokenizer, monkeypatch):
    monkeypatch.setattr(base, "LONG", 200)
    text = "the cat sat on that mat, and it is said to return 12 times\n" * 20
    found = pieces(tokenizer, text, 50)
    assert sum(found, []) == tokenizer.encode(text)
    assert (len(found) > 4) == (tokenizer.type != "SentencePieceTokenizer" or tokenizer.is_local)
    assert max(map(len, found)) < 250 or not tokenizer.is_local


def test_which_library_runs(of_every_type):
    assert {name: tokenizer.engine for name, tokenizer in of_every_type.items()} == {
        "gpt2": "gigatoken", "gpt2, library alone": "tokenizers", "huggingface": "gigatoken",
        "huggingface, library alone": "tokenizers", "gpt-4": "gigatoken", "gpt-4o": "gigatoken", "gpt-4, library alone": "tiktoken",
        "tiktoken of our own": "tiktoken", "megatron's tiktoken": "tiktoken", "sentencepiece bpe": "sentencepiece",
        "sentencepiece unigram": "sentencepiece", "yuan": "sentencepiece",
    }  # fmt: skip


def test_ids(tokenizer):
    assert tokenizer.eod in tokenizer.special_ids and max(tokenizer.special_ids) < tokenizer.vocab_size
    assert all(tokenizer.decode([i]) in (name, "") for name, i in tokenizer.special_tokens.items() if name != "<unk>")


def test_pickled_and_moved_it_is_the_same(tokenizer, tmp_path):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.hash() == tokenizer.hash() and again.encode(HARD_TEXTS[1]) == tokenizer.encode(HARD_TEXTS[1])
    copies = {name: shutil.copy(path, tmp_path) for name, path in tokenizer.files.items()}
    for path in tokenizer.companions:
        shutil.copy(path, tmp_path)
    assert build_tokenizer(tokenizer.type, **tokenizer.options, **copies).hash() == tokenizer.hash()


def test_hashes_differ(of_every_type):
    same = {name.removesuffix(", library alone") for name in NAMES}
    assert len({tokenizer.hash() for tokenizer in of_every_type.values()}) == len(same)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["abcdefghij", "今天天气很好", " ", "=", "0"])
def test_half_a_megabyte_without_a_space(of_every_type, name, text):
    """A library that tries every pair of neighbours would need hours."""
    tokenizer, text = of_every_type[name], text * (500_000 // len(text.encode()))
    flat, lengths = tokenizer.encode_arrays([text])
    assert len(flat) == lengths[0] and tokenizer.decode(flat) == text
