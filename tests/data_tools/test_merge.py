"""Pairs joined into one: the bytes of a single run, and of megatron-core's own builder."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_tools.errors import IndexedError
from data_tools.indexed import IndexedReader, bin_path, idx_path
from data_tools.merge import find_pairs, merge
from data_tools.preprocess import preprocess
from data_tools.tokenizers.null import NullTokenizer
from tests.data_tools.samples import write_jsonl
from tests.data_tools.test_indexed import DOCUMENTS, write


def content(prefix) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


@settings(max_examples=15, deadline=None)  # each makes a dozen files and waits for the disk
@given(first=DOCUMENTS, second=DOCUMENTS, third=DOCUMENTS)
def test_the_bytes_of_one_run_and_of_megatrons_merge(tmp_path_factory, first, second, third):
    folder = tmp_path_factory.mktemp("merge")
    parts = [first, second, third]
    for name, documents in zip("abc", parts):
        write(folder / name, documents)
    joined = merge([folder / name for name in "abc"], folder / "joined")
    write(folder / "whole", first + second + third)
    assert content(folder / "joined") == content(folder / "whole")
    assert joined["documents"] == len(first + second + third)

    theirs = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.uint16)
    for name, documents in zip("abc", parts):
        if any(sequence for document in documents for sequence in document):  # megatron-core cannot map an empty .bin
            theirs.add_index(str(folder / name))
        else:
            for document in documents:
                theirs.add_document([], [len(sequence) for sequence in document])
    theirs.finalize(str(folder / "theirs.idx"))
    assert content(folder / "joined") == content(folder / "theirs")


def test_pieces_smaller_than_a_pair(tmp_path, monkeypatch):
    documents = [[[n, n + 1], [n]] if n % 3 else [] for n in range(20)]
    write(tmp_path / "a", documents[:9])
    write(tmp_path / "b", documents[9:])
    write(tmp_path / "whole", documents)
    monkeypatch.setattr("data_tools.indexed.pieces.__defaults__", (2,))
    monkeypatch.setattr("data_tools.indexed._COPIED", 5)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    assert content(tmp_path / "joined") == content(tmp_path / "whole")


@pytest.fixture
def shards(tmp_path):
    """Four shares of one input, and the same in one run; ids up to 90, end of document 100."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": " ".join(str(n % 91) for n in range(i))} for i in range(50)])
    for i in range(4):
        preprocess(corpus, tmp_path / "sh", NullTokenizer(100), append_eod=True, shard=(i, 4))
    preprocess(corpus, tmp_path / "whole", NullTokenizer(100), append_eod=True)
    return tmp_path


def name(i: int, of: int = 4) -> str:
    return f"sh_{i:05d}-of-{of:05d}_text_document"


def test_shards_are_the_whole_and_so_is_their_manifest(shards):
    pairs = find_pairs([shards / "sh_*_document"])
    assert [pair.rsplit("/", 1)[1] for pair in pairs] == [name(i) for i in range(4)]
    merge(pairs, shards / "new" / "joined")
    assert content(shards / "new" / "joined") == content(shards / "whole_text_document")
    joined, whole = (IndexedReader(prefix).description for prefix in (shards / "new" / "joined", shards / "whole_text_document"))
    for key in ("documents", "tokens", "largest_id", "bad_lines", "input_bytes", "tokenizer", "append_eod", "json_keys", "inputs"):
        assert joined[key] == whole[key], key
    assert [part["shard"] for part in joined["merged"]] == [[i, 4] for i in range(4)]

    merge([shards / "new" / "joined", *_copies(shards)], shards / "twice")  # what is merged already is merged again
    again = IndexedReader(shards / "twice").description
    assert len(again["merged"]) == 5 and all("inputs" in part for part in again["merged"])


def _copies(shards):
    other = write_jsonl(shards / "other.jsonl", [{"text": "1 2 3"}])
    preprocess(other, shards / "other", NullTokenizer(100), append_eod=True)
    return [shards / "other_text_document"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([name(0), name(2)], f"2 of 4 shards missing: .*{name(1)}, .*{name(3)}"),
        ([name(1), name(0), name(2), name(3)], "not in order"),
        ([name(0), name(1), name(2), name(3), name(3) + ".idx"], "given twice"),
        (["nothing*"], "no data set there"),
    ],
)
def test_shards_that_are_not_one_set(shards, given, says):
    with pytest.raises(IndexedError, match=says):
        find_pairs([shards / one for one in given])


def test_shards_of_an_input_that_grew_are_refused(shards):
    """Lines between the shares of then and of now would be in none of them."""
    with open(shards / "corpus.jsonl", "a") as file:
        file.write('{"text": "1"}\n' * 30)
    preprocess(shards / "corpus.jsonl", shards / "sh", NullTokenizer(100), append_eod=True, shard=(2, 4))
    with pytest.raises(IndexedError, match=f"{name(0)} and .*{name(2)} are shares of inputs that differ: corpus.jsonl of .* bytes") as refused:
        merge(find_pairs([shards / "sh_*_document"]), shards / "x")
    assert "make the shards again" in refused.value.fix and not list(shards.glob("x*"))


def test_what_does_not_belong_together(shards, tmp_path):
    whole = shards / "whole_text_document"
    write(tmp_path / "wide", [[[1]]], np.int32)
    write(tmp_path / "bare", [[[1]]])
    corpus = write_jsonl(tmp_path / "more.jsonl", [{"text": "5"}])
    preprocess(corpus, tmp_path / "open", NullTokenizer(100))
    preprocess(corpus, tmp_path / "other", NullTokenizer(101), append_eod=True)
    for other, says in (
        ("wide", "uint16 and .* int32"),
        ("open_text_document", "append_eod true and false"),
        ("other_text_document", "NullTokenizer of 101 ids, .* and NullTokenizer of 102 ids"),
        ("whole_text_document", "is one of those to merge"),
    ):
        output = whole if other == "whole_text_document" else tmp_path / "x"
        with pytest.raises(IndexedError, match=says):
            merge([whole, tmp_path / other], output)
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"copy{suffix}").write_bytes((shards / f"whole_text_document{suffix}").read_bytes())
    with pytest.raises(IndexedError, match="made of the same text"):
        merge([whole, tmp_path / "copy"], tmp_path / "x")
    assert not list(tmp_path.glob("x*"))
    merge([whole, tmp_path / "bare"], tmp_path / "x")  # another tool's: nothing is known of it, and nothing is claimed
    assert set(json.loads((tmp_path / "x.json").read_text())) == {"documents", "tokens", "merged_from"}


def test_a_multimodal_set_keeps_its_modes_by_being_refused(tmp_path):
    write(tmp_path / "a", [[[1, 2]], [[3]]])
    with open(idx_path(tmp_path / "a"), "ab") as file:
        file.write(b"\0\1")
    with pytest.raises(IndexedError, match="multimodal"):
        merge([tmp_path / "a"], tmp_path / "x")
