"""Damaged pairs: what `verify` says of them, and what `repair` makes of them."""

import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools.errors import IndexedError
from data_tools.indexed import IndexedReader, bin_path, description_path, idx_path
from data_tools.preprocess import preprocess
from data_tools.repair import diagnose, repair
from data_tools.tokenizers.null import NullTokenizer
from data_tools.verify import verify
from tests.data_tools.samples import write_jsonl
from tests.data_tools.test_indexed import write

DOCUMENTS = [[[1, 2, 3]], [[4]], [[5, 6], [7]], [], [[8, 9]]]
PLAIN = [[[1, 2, 3]], [[4]], [[5, 6, 7]], [[8, 9]]]


def documents(prefix) -> list[list[list[int]]]:
    reader = IndexedReader(prefix)
    return [[sequence.tolist() for sequence in reader.document(i)] for i in range(reader.documents)]


def raw_index(prefix, lengths, boundaries, code=8, itemsize=2) -> None:
    """An .idx as an old tool writes it."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1] * itemsize
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(boundaries))
    body = b"".join(np.asarray(values, dtype).tobytes() for values, dtype in ((lengths, "<i4"), (offsets, "<i8"), (boundaries, "<i8")))
    idx_path(prefix).write_bytes(header + body)


def old_yuan(prefix) -> None:
    """preprocess_data_yuan.py: int32, every text an item, and no document ended."""
    np.array([1, 2, 0, 3, 0, 4, 5, 6, 0], "<i4").tofile(bin_path(prefix))
    raw_index(prefix, [3, 2, 4], [0], code=4, itemsize=4)


def test_a_file_of_the_old_yuan_tool_gets_its_documents(tmp_path):
    old_yuan(tmp_path / "old")
    with pytest.raises(AssertionError):
        IndexedDataset(str(tmp_path / "old"))
    faults = verify(tmp_path / "old").faults
    assert len(faults) == 1 and "no document is ended" in faults[0].what and "repair" in faults[0].fix
    found, writer = repair(tmp_path / "old", tmp_path / "new")
    assert "3 sequences become 3 documents" in found.mended[0] and not found.lost and writer.documents == 3
    assert documents(tmp_path / "new") == [[[1, 2, 0]], [[3, 0]], [[4, 5, 6, 0]]] and not verify(tmp_path / "new").faults
    core = IndexedDataset(str(tmp_path / "new"))
    assert core.document_indices.tolist() == [0, 1, 2, 3] and core[2].tolist() == [4, 5, 6, 0]
    assert bin_path(tmp_path / "new").read_bytes() == bin_path(tmp_path / "old").read_bytes()


@settings(max_examples=50, deadline=None)
@given(docs=st.lists(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=3), min_size=1, max_size=8).filter(any))
def test_ends_of_documents_that_no_length_counts(tmp_path_factory, docs):
    """Megatron-LM's old preprocess_data.py --append-eod: the id is in the .bin and not in the .idx."""
    folder = tmp_path_factory.mktemp("eod")
    flat = [token for document in docs for token in [t for s in document for t in s] + [50] * bool(document)]
    np.array(flat, "<u2").tofile(bin_path(folder / "old"))
    raw_index(folder / "old", [len(s) for d in docs for s in d], np.cumsum([0] + [len(d) for d in docs]))
    assert "bytes where the .idx speaks of" in verify(folder / "old").faults[0].what
    found, _ = repair(folder / "old", folder / "new")
    assert not found.lost and "followed by 50" in found.mended[0]
    assert documents(folder / "new") == [[*d[:-1], [*d[-1], 50]] if d else [] for d in docs]


def damaged(tmp_path, docs=DOCUMENTS, cut_bin=0, cut_idx=0, more=b""):
    prefix = tmp_path / "x"
    write(prefix, docs, description={"documents": len(docs), "tokens": sum(len(s) for d in docs for s in d), "append_eod": False})
    for path, cut in ((bin_path(prefix), cut_bin), (idx_path(prefix), cut_idx)):
        path.write_bytes(path.read_bytes()[: -cut or None])
    with open(bin_path(prefix), "ab") as file:
        file.write(more)
    return prefix


@pytest.mark.parametrize(
    ("damage", "kept", "says"),
    [
        ({"cut_bin": 1}, DOCUMENTS[:4], r"the .bin is cut off, 17 of 18 bytes: 1 documents .* \(2 tokens, of which 1 are there"),
        ({"cut_bin": 5}, DOCUMENTS[:2], r"3 documents at the end are left out \(5 tokens, of which 2 are there\)"),
        ({"more": b"\1\0\2\0\3"}, DOCUMENTS, r"5 bytes at the end of the .bin .*\(2 tokens\)"),
        ({"cut_idx": 1}, DOCUMENTS[:4], "known of 4 of 5 documents: 1 sequences at the end are left out"),
        ({"cut_idx": 8 * 3}, DOCUMENTS[:2], "known of 2 documents, each of one: the others become one document each"),
        ({"docs": PLAIN, "cut_idx": 8 * 3}, PLAIN, "the .idx is cut off"),
        ({"docs": PLAIN, "cut_idx": 8 * 5 + 8 * 4 + 6}, PLAIN[:2], "among its lengths: 2 of 4 sequences are known"),
    ],
)
def test_cut_off_files_are_cut_back_to_whole_documents(tmp_path, damage, kept, says):
    prefix = damaged(tmp_path, **damage)
    if damage == {"cut_idx": 8 * 3}:  # documents 0 and 1 are of one sequence each, and so the others are taken to be
        kept = [[[1, 2, 3]], [[4]], [[5, 6]], [[7]], [[8, 9]]]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert verify(prefix).faults
    with pytest.raises(IndexedError, match="not all can be kept") as refused:
        repair(prefix, tmp_path / "new")
    assert "--accept-loss" in refused.value.fix
    found, _ = repair(prefix, tmp_path / "new", accept_loss=True)
    assert re.search(says, "\n".join(found.lost)), found.lost
    assert documents(tmp_path / "new") == kept and not verify(tmp_path / "new").faults
    assert IndexedReader(tmp_path / "new").description["repaired"]["lost"] == found.lost
    assert {path: path.read_bytes() for path in before} == before


@settings(max_examples=60, deadline=None)
@given(cut_bin=st.integers(0, 18), cut_idx=st.integers(0, 160))
def test_whatever_is_cut_off_what_is_kept_was_there(tmp_path_factory, cut_bin, cut_idx):
    """Never a token that was not one: each kept sequence is one of the old, in their order."""
    folder = tmp_path_factory.mktemp("cut")
    prefix = damaged(folder, PLAIN, cut_bin, cut_idx)
    try:
        repair(prefix, folder / "new", accept_loss=True)
    except IndexedError as error:
        assert cut_bin + cut_idx == 0 or "no whole document" in error.what or "header" in error.what
        return
    kept = documents(folder / "new")
    assert kept == PLAIN[: len(kept)] and not verify(folder / "new").faults


def test_what_cannot_be_mended_and_what_need_not(tmp_path):
    prefix = damaged(tmp_path)
    with pytest.raises(IndexedError, match="nothing to mend"):
        repair(prefix, tmp_path / "new")
    with pytest.raises(IndexedError, match="may be the only copy"):
        repair(prefix, tmp_path / "." / "x")
    idx_path(prefix).write_bytes(b"text" * 20)
    with pytest.raises(IndexedError, match="not the index of a Megatron data set"):
        diagnose(prefix)
    idx_path(prefix).unlink()
    with pytest.raises(IndexedError, match="no such file: .*x.idx"):
        diagnose(prefix)


def change(prefix, at: int, value: bytes) -> None:
    with open(idx_path(prefix), "r+b") as file:
        file.seek(at)
        file.write(value)


def test_wrong_offsets_and_boundaries_are_found_and_mended(tmp_path):
    prefix = damaged(tmp_path)  # 5 sequences: lengths at 34, offsets at 54, boundaries at 94
    change(prefix, 54 + 8, struct.pack("<q", 4))
    assert ["sequence 1 begins at byte 4" in fault.what for fault in verify(prefix).faults] == [True]
    found, _ = repair(prefix, tmp_path / "new")
    assert not found.lost and documents(tmp_path / "new") == DOCUMENTS
    change(prefix, 54 + 8, struct.pack("<q", 6))
    change(prefix, 94 + 8, struct.pack("<q", 3))
    assert ["document 1 ends before it begins" in fault.what for fault in verify(prefix).faults] == [True]
    change(prefix, 94, struct.pack("<q", 1))
    assert "do not begin with its first sequence" in verify(prefix).faults[0].what


@pytest.fixture
def made(tmp_path):
    """A pair with a manifest: ids below 30, each document ended with 40."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": " ".join(map(str, range(i)))} for i in range(30)])
    preprocess(corpus, tmp_path / "x", NullTokenizer(40), append_eod=True, part_bytes=200)
    return tmp_path / "x_text_document"


def poke(prefix, token: int, value: int) -> None:
    with open(bin_path(prefix), "r+b") as file:
        file.seek(2 * token)
        file.write(struct.pack("<H", value))


def test_every_token_is_looked_at(made, monkeypatch):
    monkeypatch.setattr("data_tools.verify._TOKENS", 7)
    seen = []
    found = verify(made, progress=lambda done, total: seen.append(done / total))
    assert not found.faults and found.largest_id == 40 and found.documents == 30 and seen[-1] == 1
    poke(made, 100, 41)
    [fault] = [fault for fault in verify(made).faults if "vocabulary" in fault.what]
    assert "1 ids outside the vocabulary of 41, the first is 41, token 100" in fault.what and fault.where.endswith(".bin")
    assert not [fault for fault in verify(made, vocab_size=50).faults if "vocabulary" in fault.what]
    poke(made, 100, 7)
    poke(made, IndexedReader(made).tokens - 1, 7)
    [fault] = verify(made).faults
    assert "1 documents do not end with 40" in fault.what and "document 29 ends with 7" in fault.what


def test_a_manifest_of_another_pair(made):
    text = description_path(made).read_text()
    for told, said in (('"documents": 30', '"documents": 31'), ('"largest_id": 40', '"largest_id": 39')):
        assert told in text
        description_path(made).write_text(text.replace(told, said))
        [fault] = verify(made).faults
        assert "the manifest says" in fault.what and fault.where.endswith(".json")
    description_path(made).write_text("{")
    assert "cannot be read" in verify(made).faults[0].what
    description_path(made).unlink()
    found = verify(made)
    assert not found.faults and len(found.unknown) == 2


def test_the_input_is_what_it_was(made):
    corpus = made.parent / "corpus.jsonl"
    assert not verify(made, inputs=True).faults
    text = corpus.read_text()
    corpus.write_text(text.replace("28", "27"))
    assert not verify(made).faults
    assert ["another content" in fault.what for fault in verify(made, inputs=True).faults] == [True]
    corpus.write_text(text + "\n")
    assert ["another size" in fault.what for fault in verify(made, inputs=True).faults] == [True]
    corpus.unlink()
    assert ["an input is gone" in fault.what for fault in verify(made, inputs=True).faults] == [True]
