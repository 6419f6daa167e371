"""Tokenizers: round trips, ids, identity and refusals, through `build_tokenizer` alone."""

import hashlib
import pickle
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.tokenizers import TokenizerError, build_tokenizer, train_sentencepiece
from tests.data_tools.samples import HARD_TEXTS, SHARED, needs_shared

GPT2 = {"vocab_file": SHARED / "data" / "gpt2-vocab.json", "merge_file": SHARED / "data" / "gpt2-merges.txt"}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_gpt2_gives_hard_texts_back(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_sentencepiece_gives_hard_texts_back(sentencepiece, text):
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


@FAST
@given(text=TEXT)
def test_any_text_comes_back(gpt2, sentencepiece, text):
    for tokenizer in (gpt2, sentencepiece):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_batch_is_its_texts_one_by_one(gpt2, sentencepiece):
    for tokenizer in (gpt2, sentencepiece):
        assert tokenizer.encode_batch([*HARD_TEXTS, ""]) == [tokenizer.encode(text) for text in [*HARD_TEXTS, ""]]


def test_text_cannot_spell_sentencepiece_control_ids(sentencepiece):
    assert sentencepiece.special_ids == {1, 2}  # <s>, </s>
    assert not sentencepiece.special_ids & set(sentencepiece.encode("a</s><s>b"))


def test_sentencepiece_ids_are_the_librarys_own(sentencepiece):
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(sentencepiece.files["tokenizer_model"]))
    assert sentencepiece.encode_batch(HARD_TEXTS) == [library.EncodeAsIds(text) for text in HARD_TEXTS]
    assert (sentencepiece.eod, sentencepiece.vocab_size) == (library.eos_id(), library.GetPieceSize())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(model_type):
    first, second = (train_sentencepiece(iter(HARD_TEXTS), 330, model_type) for _ in range(2))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()


def test_training_uses_lines_that_sentencepiece_would_drop():
    long_line, tabs = "abracadabra " * 2000, "xyzzy\txyzzy\t" * 50
    vocabulary = train_sentencepiece([long_line, tabs], 290, "bpe")
    assert b"cadabra" in vocabulary and b"zzy" in vocabulary


def test_training_refuses_an_impossible_size():
    with pytest.raises(TokenizerError, match="too high"):
        train_sentencepiece(["a b c"], 5000)
    with pytest.raises(TokenizerError, match="too|small"):
        train_sentencepiece(HARD_TEXTS, 100)


@needs_shared
def test_gpt2_known_ids():
    tokenizer = build_tokenizer("GPT2BPETokenizer", **GPT2)
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]  # as GPT-2's own encoder gives
    assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)


@needs_shared
def test_literal_end_of_text():
    special = build_tokenizer("GPT2BPETokenizer", **GPT2)
    plain = build_tokenizer("GPT2BPETokenizer", **GPT2, plain_special_tokens=True)
    assert special.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert plain.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert special.hash() != plain.hash()
    for tokenizer in (special, plain):
        assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
        assert tokenizer.eod == 50256


def test_null_tokenizer_is_megatrons():
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    ours, theirs = build_tokenizer("NullTokenizer", vocab_size=50257), NullTokenizer(50257)
    assert (ours.eod, ours.vocab_size) == (theirs.eod, theirs.vocab_size) == (50257, 50258)
    assert ours.encode("5 0 50256") == theirs.text_to_ids("5 0 50256")
    assert ours.decode([5, 0]) == theirs.ids_to_text([5, 0])
    assert ours.encode("") == []


@pytest.mark.parametrize("text", ["5 x", "-1", "1.0", "12", "1_0", "٣"])
def test_null_tokenizer_refuses_what_is_no_id(text):
    with pytest.raises(ValueError, match="NullTokenizer reads|outside the vocabulary"):
        build_tokenizer("NullTokenizer", vocab_size=11).encode(text)


def test_identity_follows_content_and_not_paths(gpt2, tmp_path):
    moved = {name: shutil.copy(path, tmp_path) for name, path in gpt2.files.items()}
    same = build_tokenizer("GPT2BPETokenizer", **moved)
    assert same.hash() == gpt2.hash() and same.unique_identifiers == gpt2.unique_identifiers
    merges = tmp_path / "merges.txt"
    merges.write_text("\n".join(merges.read_text(encoding="utf-8").splitlines()[:-1]) + "\n", encoding="utf-8")
    assert build_tokenizer("GPT2BPETokenizer", **moved).hash() != gpt2.hash()


def test_pickles(gpt2, sentencepiece):
    for tokenizer in (gpt2, sentencepiece, build_tokenizer("NullTokenizer", vocab_size=9)):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.hash() == tokenizer.hash() and copy.encode("3") == tokenizer.encode("3")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"type": "GPT2BPETokenizer"}, "tokenizer.vocab_file is not given"),
        ({"type": "GPT2BPETokenizer", "vocab_file": "no/vocab.json"}, "no such file: no/vocab.json"),
        ({"type": "SentencePieceTokenizer"}, "tokenizer.tokenizer_model is not given"),
        ({"type": "NullTokenizer"}, "NullTokenizer needs a vocab_size"),
        ({"type": "NullTokenizer", "vocab_size": 0}, "NullTokenizer needs a vocab_size"),
        ({"type": "BertTokenizer"}, "unknown tokenizer type 'BertTokenizer'"),
    ],
)
def test_what_is_missing_is_named_with_its_mend(arguments, what):
    with pytest.raises(TokenizerError) as caught:
        build_tokenizer(**arguments)
    assert caught.value.what.startswith(what) and caught.value.where and caught.value.fix


def test_broken_files_are_refused(gpt2, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(gpt2.files["vocab_file"].read_bytes()[:100])
    with pytest.raises(TokenizerError, match="not GPT-2 tokenizer files"):
        build_tokenizer("GPT2BPETokenizer", vocab_file=broken, merge_file=gpt2.files["merge_file"])
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", tokenizer_model=broken)
    broken.write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges").write_text("#version: 0.2\n")
    with pytest.raises(TokenizerError, match=r"no <\|endoftext\|>"):
        build_tokenizer("GPT2BPETokenizer", vocab_file=broken, merge_file=tmp_path / "merges")
