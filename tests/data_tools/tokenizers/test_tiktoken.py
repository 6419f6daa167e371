"""Files of ranks, beside `tiktoken`'s own encodings and megatron-core's reading of its JSON vocabulary."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.tokenizers import TokenizerError, build_tokenizer
from data_tools.tokenizers.tiktoken import ENCODINGS
from tests.data_tools.samples import HARD_TEXTS, SHARED, needs_shared
from tests.data_tools.tokenizers.conftest import rank_file, ranks_of, vocabulary_file

PUBLISHED = [name for name, encoding in ENCODINGS.items() if encoding.special_tokens]


def build(path, **options):
    return build_tokenizer("TikTokenizer", tokenizer_model=path, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory, small_ranks):
    return rank_file(tmp_path_factory.mktemp("tik") / "small.tiktoken", small_ranks)


@pytest.fixture(scope="module")
def gpt2_ranks():
    return ranks_of(json.loads((SHARED / "data" / "gpt2-vocab.json").read_text(encoding="utf-8")))


def published(name, ranks, monkeypatch):
    """The library's own encoding of that name, with `ranks` instead of those that it would download."""
    import tiktoken
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    description = getattr(openai_public, name)()
    return tiktoken.Encoding(**{key: value for key, value in description.items() if key != "explicit_n_vocab"})


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encodings_id_for_id(name, gpt2_ranks, tmp_path, monkeypatch):
    library = published(name, gpt2_ranks, monkeypatch)
    for use_gigatoken in (True, False):
        ours = build(rank_file(tmp_path / f"{name}.tiktoken", gpt2_ranks), use_gigatoken=use_gigatoken)
        assert ours.special_tokens == library._special_tokens and ours.eod == library.eot_token
        assert ours.vocab_size == library.n_vocab
        texts = [*HARD_TEXTS, *ours.special_tokens, "I'll THEY'RE 12345 x1234\r\n\r\n  y \n z", "".join(f"a {t}" for t in ours.special_tokens)]
        assert ours.encode_arrays(texts)[0].tolist() == [i for text in texts for i in library.encode(text, allowed_special="all")]


@needs_shared
def test_every_character_of_unicode(gpt2_ranks, tmp_path):
    """Letters, digits and marks that one library knows and the other does not: o200k's expression asks for all kinds."""
    texts = [f"{chr(c)}'ll b{chr(c)}A" for c in range(0x80, 0x34000) if not 0xD800 <= c < 0xE000]
    path = rank_file(tmp_path / "o200k_base.tiktoken", gpt2_ranks)
    (ids, lengths), (wanted, theirs) = (build(path, use_gigatoken=one).encode_arrays(texts) for one in (True, False))
    assert lengths.tolist() == theirs.tolist() and ids.tolist() == wanted.tolist()


@needs_shared
def test_r50k_is_gpt2(gpt2_ranks, tmp_path):
    files = {"vocab_file": SHARED / "data" / "gpt2-vocab.json", "merge_file": SHARED / "data" / "gpt2-merges.txt"}
    ours, gpt2 = build(rank_file(tmp_path / "r50k_base.tiktoken", gpt2_ranks)), build_tokenizer("GPT2BPETokenizer", **files)
    texts = [*HARD_TEXTS, "a<|endoftext|>b"]
    assert ours.encode_batch(texts) == gpt2.encode_batch(texts)
    assert (ours.eod, ours.vocab_size) == (gpt2.eod, gpt2.vocab_size)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_megatrons_json_vocabulary(name, small_ranks, tmp_path):
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    path = vocabulary_file(tmp_path / "vocab.json", small_ranks)
    for size in (300, 20 + len(small_ranks)):  # the first cuts the vocabulary off
        ours = build(path, tiktoken_pattern=name, tiktoken_num_special_tokens=20, vocab_size=size)
        theirs = TikTokenTokenizer(str(path), num_special_tokens=20, pattern=name, vocab_size=size)
        texts = [*HARD_TEXTS, "<s>a<SPECIAL_19></s><sep>"]
        assert ours.encode_batch(texts) == [theirs.text_to_ids(text) for text in texts]
        assert (ours.eod, ours.vocab_size, list(ours.special_tokens)) == (theirs.eod, theirs.vocab_size, theirs.special_tokens)
    assert build(path, tiktoken_num_special_tokens=20).vocab_size == 20 + len(small_ranks)
    assert build(path, vocab_size=1 << 17).special_tokens["<SPECIAL_999>"] == 999


def test_special_tokens_as_ids_as_names_and_as_plain_text(small):
    by_name = build(small, tiktoken_pattern="cl100k_base", tiktoken_special_tokens=["<|endoftext|>", "<x>"])
    first = len(small.read_text().splitlines())
    assert by_name.special_tokens == {"<|endoftext|>": first, "<x>": first + 1} and by_name.vocab_size == first + 2
    by_id = build(small, tiktoken_pattern="cl100k_base", tiktoken_special_tokens={"<x>": 900}, eod_token="<x>")
    assert (by_id.eod, by_id.vocab_size, by_id.encode("a<x>")[-1]) == (900, 901, 900)
    plain = build(small, tiktoken_pattern="cl100k_base", tiktoken_special_tokens=["<|endoftext|>", "<x>"], plain_special_tokens=True)
    assert not plain.special_ids & set(plain.encode("<x><|endoftext|>")) and plain.decode(plain.encode("<x>")) == "<x>"
    assert plain.encode_arrays(["<x>a"])[0].tolist() == plain.encode("<x>a")
    assert len({by_name.hash(), by_id.hash(), plain.hash()}) == 3


def test_a_name_and_its_expression_are_the_same_tokenizer(small):
    named, spelled = (build(small, tiktoken_pattern=p) for p in ("r50k_base", "p50k_base"))
    assert named.hash() == spelled.hash()
    given = build(small, tiktoken_pattern=ENCODINGS["r50k_base"].pattern, tiktoken_special_tokens={"<|endoftext|>": 50256})
    assert given.hash() == named.hash() and given.engine == "tiktoken"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_an_expression_of_our_own(small, text):
    import re

    tokenizer = build(small, tiktoken_pattern=r"\s+|\S+", tiktoken_special_tokens=["<|endoftext|>"])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == [i for part in re.findall(r"[^\S\x1c-\x1f]+|[\S\x1c-\x1f]+", text) for i in tokenizer.encode(part)]


@pytest.mark.parametrize(("content", "options", "what", "fix"), [
    (None, {}, "a file of ranks does not say how texts are split", "r50k_base, p50k_base, cl100k_base, o200k_base"),
    (None, {"tiktoken_pattern": "r50k"}, "the pattern 'r50k' leaves out parts of a text", "r50k_base"),
    (None, {"tiktoken_pattern": r"\S+"}, "the pattern '\\\\S+' leaves out parts of a text", "matches every text from end to end"),
    (None, {"tiktoken_pattern": r"(?s:.)"}, "no special token '<|endoftext|>'", "tokenizer.tiktoken_special_tokens=[TOKEN]"),
    (None, {"tiktoken_pattern": "(", "tiktoken_special_tokens": ["<|endoftext|>"]}, "not a pattern", "r50k_base"),
    (None, {"tiktoken_pattern": "cl100k_base", "eod_token": "<eos>"}, "no special token '<eos>'", "tokenizer.eod_token=TOKEN; there are <|endoftext|>"),
    (None, {"tiktoken_pattern": "cl100k_base", "tiktoken_special_tokens": {"<|endoftext|>": 5}}, "'<|endoftext|>' has the id of a rank, 5", "ids that no rank has"),
    (None, {"tiktoken_pattern": "cl100k_base", "tiktoken_special_tokens": {"<|endoftext|>": 999, "<x>": 999}}, "two tokens with the same id", "ids that no rank has"),
    ("IQ== 0\n", {"tiktoken_pattern": "cl100k_base"}, "no token for the byte 0x00", "fetch the file again"),
    ("hello\n", {"tiktoken_pattern": "cl100k_base"}, "not a file of ranks", "IQ== 0"),
])  # fmt: skip
def test_what_is_wrong_is_named_with_its_mend(small, tmp_path, content, options, what, fix):
    path = small
    if content is not None:
        (path := tmp_path / "x.tiktoken").write_text(content)
    with pytest.raises(TokenizerError) as refused:
        build(path, **options)
    assert refused.value.what.startswith(what) and fix in refused.value.fix and refused.value.where


@pytest.mark.parametrize(("content", "options", "what"), [
    ("{}", {}, "not a vocabulary of Megatron-LM's form"),
    ("[1]", {}, "not a vocabulary of Megatron-LM's form"),
    ('[{"rank": 1, "token_bytes": "AA==", "token_str": ""}]', {}, "the ranks are not 0, 1, 2"),
    ("[]", {"tiktoken_num_special_tokens": 3}, "7 special tokens, and only 3 ids"),
])  # fmt: skip
def test_what_is_wrong_with_a_json_vocabulary(tmp_path, content, options, what):
    (path := tmp_path / "vocab.json").write_text(content)
    with pytest.raises(TokenizerError) as refused:
        build(path, **options)
    assert refused.value.what.startswith(what) and refused.value.fix
