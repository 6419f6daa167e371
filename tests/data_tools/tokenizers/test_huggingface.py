"""tokenizer.json: which files decide what, what is left out of a text's ids, and where gigatoken may run."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.tokenizers import TokenizerError, build_tokenizer
from tests.data_tools.samples import HARD_TEXTS, SHARED, needs_shared
from tests.data_tools.tokenizers.conftest import huggingface_folder


def build(path, **options):
    return build_tokenizer("HuggingFaceTokenizer", tokenizer_model=path, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return huggingface_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def changed(folder, tmp_path):
    """changed(tokenizer_config=..., special_tokens_map=...) → a folder with these files instead."""

    def change(**files):
        shutil.copy(folder / "tokenizer.json", tmp_path)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return change


def test_ids_are_the_librarys_whatever_the_file_cuts_or_fills_up(folder):
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(library.encode("a").ids) == 9 and library.encode("a").ids[0] == 0  # filled up, and with a beginning
    library.no_truncation()
    library.no_padding()
    ours = build(folder)
    assert ours.encode_batch(HARD_TEXTS) == [library.encode(text, add_special_tokens=False).ids for text in HARD_TEXTS]
    assert (ours.vocab_size, ours.eod) == (library.get_vocab_size(), 1)
    assert ours.special_tokens == {"<|begin|>": 0, "<|end|>": 1, "<mask>": 401}


def test_the_template_is_filled_in_where_asked_for_and_not_by_gigatoken(folder):
    plain, whole = build(folder), build(folder, tokenizer_hf_include_special_tokens=True)
    assert whole.encode("a b") == [0, *plain.encode("a b")]
    assert whole.encode_arrays(["a b", ""])[0].tolist() == [0, *plain.encode("a b"), 0]
    assert (plain.engine, whole.engine) == ("gigatoken", "tokenizers")
    assert plain.hash() != whole.hash()


@pytest.mark.parametrize("files", [
    {"tokenizer_config": {"eos_token": "<|end|>"}},
    {"tokenizer_config": {"eos_token": {"content": "<|end|>", "lstrip": False}}},
    {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": {"content": "<|end|>"}}},
    {"tokenizer_config": {"eos_token": "<|end|>"}, "special_tokens_map": {"eos_token": "<tool>"}},
])  # fmt: skip
def test_end_of_document_is_their_eos_token(changed, folder, files):
    for tokenizer in (build(changed(**files)), build(changed(**files) / "tokenizer.json")):
        assert tokenizer.eod == 1
        assert tokenizer.hash() == build(folder).hash()  # which of them says so is no part of it


def test_end_of_document_by_name(changed, folder):
    assert build(changed(), eod_token="<|begin|>").eod == 0
    assert build(folder, eod_token="<tool>").eod == 400  # not marked as special, and one from now on
    assert 400 in build(folder, eod_token="<tool>").special_ids
    assert build(folder, eod_token="<tool>").hash() != build(folder).hash()


@pytest.mark.parametrize(("files", "options", "what", "fix"), [
    ({}, {}, "no tokenizer_config.json beside it says which is the eos_token", "tokenizer.eod_token=TOKEN; the tokenizer has <|begin|>, <|end|>"),
    ({"tokenizer_config": {"eos_token": "</s>"}}, {}, "no token '</s>' to end documents with", "<|begin|>, <|end|>"),
    ({}, {"eod_token": "<eos>"}, "no token '<eos>' to end documents with", "tokenizer.eod_token=TOKEN"),
    ({"tokenizer_config": "{"}, {}, "not JSON", "fetch the file again"),
    ({"tokenizer_config": []}, {}, "not a JSON object", "fetch the file again"),
    ({"tokenizer": {"model": 1}}, {}, "not a tokenizer.json", "or the folder that holds it"),
    ({"tokenizer_config": {"eos_token": "<|end|>", "added_tokens_decoder": {"7": {"content": "<|end|>"}}}}, {},
     "'<|end|>' is 1 by tokenizer.json and 7 by tokenizer_config.json", "both files of the same model"),
])  # fmt: skip
def test_what_is_wrong_is_named_with_its_mend(changed, files, options, what, fix):
    with pytest.raises(TokenizerError) as refused:
        build(changed(**files), **options)
    assert refused.value.what.startswith(what) and fix in refused.value.fix and refused.value.where


def test_tokens_that_only_the_configuration_adds(changed):
    decoder = {"402": {"content": "<extra>", "special": True}, "1": {"content": "<|end|>", "special": True}}
    tokenizer = build(changed(tokenizer_config={"eos_token": "<|end|>", "added_tokens_decoder": decoder}))
    assert tokenizer.encode("a<extra>b") == [*tokenizer.encode("a"), 402, *tokenizer.encode("b")]
    assert tokenizer.vocab_size == 403 and tokenizer.special_tokens["<extra>"] == 402
    assert tokenizer.hash() != build(changed(tokenizer_config={"eos_token": "<|end|>"})).hash()  # they decide ids


def sentencepiece_like(folder, **model):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b"), ("▁", "a")], unk_token="<unk>", **model))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_gigatoken_is_never_tried_on_what_comes_from_sentencepiece(tmp_path):
    for name, model in (("bytes", {"byte_fallback": True}), ("unknown", {})):
        path = sentencepiece_like(tmp_path / name, **model)
        assert build(path, eod_token="</s>").engine == "tokenizers"
        with pytest.raises(TokenizerError, match="byte-level BPE alone"):
            build(path, eod_token="</s>", use_gigatoken=True).engine  # noqa: B018


def test_what_gigatoken_cannot_do_is_done_by_the_library(tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    lower = huggingface_folder(tmp_path / "lower", normalizer=normalizers.Lowercase())
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for path in (lower, huggingface_folder(tmp_path / "digits", pre_tokenizer=digits)):
        assert build(path).engine == "tokenizers"
        with pytest.raises(TokenizerError, match="gigatoken cannot take this tokenizer"):
            build(path, use_gigatoken=True).encode_arrays(["a"])


def test_a_difference_found_on_the_way_is_an_error_and_no_wrong_ids(folder):
    tokenizer = build(folder)
    tokenizer.encode_arrays(["fine"])
    tokenizer._fast._exact = lambda texts: [[0] for _ in texts]  # as if the libraries differed on this text alone
    with pytest.raises(TokenizerError, match="gigatoken gives other ids for a text: 'odd'") as refused:
        tokenizer.encode_arrays(["odd"])
    assert "tokenizer.use_gigatoken=false" in refused.value.fix


def test_letters_that_gigatoken_alone_knows(folder):
    fast, exact = (build(folder, use_gigatoken=one) for one in (True, False))
    for texts in (["a", "\U000323b0'll", "b\ua7f1's 😀", "c"], ["\u1acf 1"], ["x", "Ä", "\U00010940\U00010941 \U00010940'll" * 200]):
        (ids, lengths), (wanted, theirs) = fast.encode_arrays(texts), exact.encode_arrays(texts)
        assert ids.tolist() == wanted.tolist() and lengths.tolist() == theirs.tolist()


@needs_shared
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.sampled_from(["<|endoftext|>", "'ll", " 's\n"])), max_size=8))
def test_gpt2s_own_vocabulary_on_random_unicode(texts):
    fast, exact = (_gpt2(use_gigatoken) for use_gigatoken in (True, False))
    for batch in (texts, ["".join(texts)]):
        (ids, lengths), (wanted, their_lengths) = fast.encode_arrays(batch), exact.encode_arrays(batch)
        assert ids.tolist() == wanted.tolist() and lengths.tolist() == their_lengths.tolist()


_built = {}


def _gpt2(use_gigatoken):
    if use_gigatoken not in _built:
        files = {"vocab_file": SHARED / "data" / "gpt2-vocab.json", "merge_file": SHARED / "data" / "gpt2-merges.txt"}
        _built[use_gigatoken] = build_tokenizer("GPT2BPETokenizer", **files, use_gigatoken=use_gigatoken)
    return _built[use_gigatoken]
