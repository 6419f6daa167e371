"""The .bin/.idx format, held against megatron-core's own builder and reader."""

import fcntl
import os
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_tools.errors import DataError, IndexedError
from data_tools.indexed import IndexedReader, IndexedWriter, bin_path, description_path, idx_path, token_dtype
from data_tools.inspect import summarize
from data_tools.lock import Lock
from data_tools.merge import merge

SEQUENCE = st.lists(st.integers(0, 65499), max_size=5)
DOCUMENTS = st.lists(st.lists(SEQUENCE.filter(len), max_size=3), min_size=1, max_size=6)


def write(prefix, documents, dtype=np.uint16, description=None):
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add_document([token for sequence in sequences for token in sequence], [len(s) for s in sequences])
        writer.finish(description)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS)
def test_bytes_and_reading_are_megatrons(tmp_path_factory, dtype, documents):
    folder = tmp_path_factory.mktemp("pair")
    ours, theirs = folder / "ours", folder / "theirs"
    write(ours, documents, dtype)
    builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document([t for s in sequences for t in s], [len(s) for s in sequences])
    builder.finalize(f"{theirs}.idx")
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()

    flat = [sequence for sequences in documents for sequence in sequences]
    reader = IndexedReader(ours)
    assert (reader.documents, reader.sequences, reader.tokens) == (len(documents), len(flat), sum(map(len, flat)))
    assert reader.dtype == dtype and [reader.get(i).tolist() for i in range(len(flat))] == flat
    if flat:  # megatron-core cannot map an empty .bin
        core = IndexedDataset(str(ours))
        assert [core[i].tolist() for i in range(len(core))] == flat
        assert core.document_indices.tolist() == reader.boundaries.tolist()


def test_batches_are_documents_one_by_one(tmp_path):
    write(tmp_path / "single", [[[1, 2], [3]], [], [[4]]])
    with IndexedWriter(tmp_path / "batch", np.uint16) as writer:
        writer.add_batch(np.array([1, 2, 3]), [2, 1], [2, 0])
        writer.add_batch(np.array([4]), [1], [1])
        with pytest.raises(ValueError, match="3 tokens"):
            writer.add_batch(np.array([1, 2, 3]), [2], [1])
        writer.finish()
    for path in (bin_path, idx_path):
        assert path(tmp_path / "single").read_bytes() == path(tmp_path / "batch").read_bytes()


def test_offsets_pass_two_gib_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.indexed._CHUNK", 2)
    lengths = [3, 1, 0, 7, 2]
    with IndexedWriter(tmp_path / "x", np.int32) as writer:
        writer.add_batch(np.zeros(13), lengths, [5])
        writer.finish()
    index = np.fromfile(idx_path(tmp_path / "x"), dtype="u1")[34 + 4 * 5 : 34 + 12 * 5].view("<i8")
    assert index.tolist() == [0, 12, 16, 16, 44]
    with IndexedWriter(tmp_path / "y", np.int32) as writer:
        # Only the index is looked at: lengths of 2**29 tokens of 4 bytes pass 2 GiB with the second one.
        writer._lengths.write(np.full(4, 2**29, "<i4").tobytes())
        writer.sequences = 4
        writer._write_index()
        content = np.frombuffer(writer._idx_part.read_bytes(), dtype="u1")
    assert content[34 + 16 : 34 + 48].view("<i8").tolist() == [0, 2**31, 2**32, 3 * 2**31]


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 200000])
def test_dtype_is_megatrons_choice(vocab_size):
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_ids_too_large_for_the_dtype_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "x", np.uint16) as writer, pytest.raises(OverflowError):
        writer.add_document([65536])


def test_unfinished_leaves_nothing_and_keeps_what_was_there(tmp_path):
    write(tmp_path / "x", [[[1]]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([2, 3])
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_idx_is_the_last_to_appear(tmp_path, monkeypatch):
    write(tmp_path / "x", [[[1]]])
    moved = []

    def replace(source, target):
        assert not idx_path(tmp_path / "x").exists(), "the old index lies beside new data"
        moved.append(target.name)
        source.rename(target)

    monkeypatch.setattr("data_tools.indexed.os.replace", replace)
    write(tmp_path / "x", [[[2, 3]]])
    assert moved == ["x.bin", "x.idx"]


def test_description_belongs_to_its_pair(tmp_path):
    description = {"documents": 1, "tokens": 2, "tokenizer": {"sha256": "f00"}}
    write(tmp_path / "x", [[[1, 2]]], description=description)
    assert IndexedReader(tmp_path / "x").description == description
    stale = description_path(tmp_path / "x").read_bytes()
    write(tmp_path / "x", [[[1, 2, 3]]])
    assert IndexedReader(tmp_path / "x").description is None
    description_path(tmp_path / "x").write_bytes(stale)  # as if another tool had rewritten the pair alone
    assert IndexedReader(tmp_path / "x").description is None


def test_torn_files_are_refused(tmp_path):
    prefix = tmp_path / "x"
    with pytest.raises(IndexedError, match="no such file"):
        IndexedReader(prefix)
    write(prefix, [[[1, 2, 3]], [[4]]])
    whole, data = idx_path(prefix).read_bytes(), bin_path(prefix).read_bytes()
    for torn in (b"", whole[:20], whole[:-1], whole + b"xyz", b"X" + whole[1:], whole[:17] + b"\x09" + whole[18:], whole[:-8] + b"\x01" + whole[-7:]):
        idx_path(prefix).write_bytes(torn)
        with pytest.raises(IndexedError):
            IndexedReader(prefix)
    idx_path(prefix).write_bytes(whole)
    bin_path(prefix).write_bytes(data[:-2])
    with pytest.raises(IndexedError, match="6 bytes where the .idx speaks of 8"):
        IndexedReader(prefix)
    bin_path(prefix).write_bytes(data)
    with pytest.raises(IndexError):
        IndexedReader(prefix).get(2)


@pytest.mark.parametrize(
    ("at", "format", "value", "what"),
    [
        (34 + 12 * 3 + 8, "<q", 2**46, "a document ends before it begins"),
        (34 + 12 * 3 + 8, "<q", -1, "a document ends before it begins"),
        (34, "<ii", (-2, 5), "a sequence has a length below 0"),
        (34 + 4 * 3, "<q", 8, "sequence 0 lies outside the .bin"),
        (34 + 4 * 3, "<q", -4, "sequence 0 lies outside the .bin"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused_where_it_is_read(tmp_path, at, format, value, what):
    write(tmp_path / "p", [[[1]], [[2, 3]], [[4]]])
    with open(idx_path(tmp_path / "p"), "r+b") as file:
        file.seek(at)
        file.write(struct.pack(format, *np.atleast_1d(value)))
    with pytest.raises(IndexedError, match=what):
        if "outside" in what:
            IndexedReader(tmp_path / "p").get(0)
        summarize(tmp_path / "p")
    if "outside" not in what:
        with pytest.raises(IndexedError, match=what):
            merge([tmp_path / "p"], tmp_path / "merged")
        assert not list(tmp_path.glob("merged*"))


def test_two_writers_of_one_output(tmp_path):
    """The second is refused with the first's pid; when the first is gone, in whatever way, it may."""
    code = "import sys; from data_tools.indexed import IndexedWriter as W; w = W(sys.argv[1], '<u2'); print('held', flush=True); sys.stdin.read()"
    job = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"held\n"
    with pytest.raises(DataError, match=f"another process is writing this output: pid {job.pid}"):
        IndexedWriter(tmp_path / "x", np.uint16)
    IndexedWriter(tmp_path / "y", np.uint16).close()
    job.kill()
    job.communicate()
    write(tmp_path / "x", [[[1]]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_a_lock_that_its_holder_removes_as_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    first = Lock(tmp_path / "x.lock")
    flock = fcntl.flock

    def after_the_release(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.release()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", after_the_release)
    second = Lock(tmp_path / "x.lock")
    with pytest.raises(DataError, match=f"pid {os.getpid()}"):
        Lock(tmp_path / "x.lock")
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_sample_of_the_ids(tmp_path):
    write(tmp_path / "x", [[[5, 1, 2, 9, 3, 4, 7]]])
    reader = IndexedReader(tmp_path / "x")
    assert [reader.sampled_id_range(n) for n in (1, 2, 4, 100)] == [(5, 7), (1, 7), (1, 9), (1, 9)]


def test_a_full_disk_keeps_nothing(tmp_path):
    """Here a limit on the size of files, which fails as a full disk does: at the write, and again when closing."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with pytest.raises(OSError), IndexedWriter(tmp_path / "x", "<u2") as writer:
            for _ in range(20):
                writer.add_document(range(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []
