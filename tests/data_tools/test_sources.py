"""Inputs of every kind give the same documents in the same order, wherever they are cut; broken ones are named."""

import bz2
import datetime
import gzip
import json
import lzma
import os
import tracemalloc
from functools import partial

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.compression import decompressed
from data_tools.errors import InputError
from data_tools.indexed import IndexedReader
from data_tools.preprocess import preprocess
from data_tools.sources import blocks, find_sources, passed_over
from data_tools.tokenizers import build_tokenizer
from tests.data_tools.samples import HARD_TEXTS, write_jsonl

NULL = build_tokenizer("NullTokenizer", vocab_size=1000)
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


def numbers(prefix) -> list[list[int]]:
    reader = IndexedReader(f"{prefix}_text_document")
    edges = reader.boundaries.tolist()
    return [[i for s in range(a, b) for i in reader.get(s).tolist()] for a, b in zip(edges, edges[1:], strict=False)]


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=30), size=st.integers(1, 40), n=st.integers(1, 4))
def test_blocks_and_shares_are_the_whole_file_once(tmp_path_factory, lines, size, n):
    path = tmp_path_factory.mktemp("b") / "in.txt"
    path.write_bytes(b"\n".join(lines))
    (source,) = find_sources(path)
    edges = [source.size * i // n for i in range(n + 1)]
    cut = [block for a, b in zip(edges, edges[1:], strict=False) for block in blocks(source, size, ["text"], a, b)]
    joined = b"".join(line for block in cut for line in block.read())
    assert joined == path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    at = 1
    for block in cut:
        assert block.place(0) == f"{path}:{at}"
        at += len(block.read())


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("workers", [1, 2])
def test_compressed_input_is_the_plain_one(tmp_path, suffix, workers):
    plain = "".join(json.dumps({"text": f"{i} {i}"}) + "\n" for i in range(300)).encode()
    (tmp_path / f"in.jsonl{suffix}").write_bytes(COMPRESS[suffix](plain[:2000]) + COMPRESS[suffix](plain[2000:]))  # two frames
    counts = preprocess(tmp_path / f"in.jsonl{suffix}", tmp_path / "out", NULL, workers=workers, part_bytes=500)
    assert numbers(tmp_path / "out") == [[i, i] for i in range(300)]
    assert counts["text"].bytes == (tmp_path / f"in.jsonl{suffix}").stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_torn_compressed_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"in.txt{suffix}"
    path.write_bytes(COMPRESS[suffix]("".join(f"{i % 1000}\n" for i in range(20000)).encode())[:-20])
    with pytest.raises(InputError, match="data cannot be read") as caught:
        preprocess(path, tmp_path / "out", NULL)
    assert caught.value.where == str(path) and not (tmp_path / "out_text_document.idx").exists()


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.sampled_from([*HARD_TEXTS, "]", '"', "\\", "a, {b}"]), min_size=1, max_size=8), indent=st.sampled_from([None, 1]))
def test_a_json_array_is_read_item_by_item(tmp_path_factory, texts, indent):
    path = tmp_path_factory.mktemp("a") / "in.json"
    items = [{"text": text, "more": {"text": [1, 2.5]}} for text in texts]
    path.write_text(json.dumps(items, ensure_ascii=False, indent=indent), encoding="utf-8")
    (source,) = find_sources(path)
    assert source.format == "json"
    assert [json.loads(line) for block in blocks(source, 30, ["text"]) for line in block.read()] == items


@pytest.mark.parametrize(("content", "what"), [
    ('[{"text": "1"}', "does not end with ]"),
    ('[{"text": "1"}, {"text": }]', "not JSON"),
    ('[{"text": "1"}]\n\n[{"text": "2"}]\n', "behind the end of the array: \\[{\"text\": \"2\"}\\]"),  # two files in one
    ("[" * 10**5, "nested too deep"),
])  # fmt: skip
def test_a_broken_array_is_refused(tmp_path, content, what):
    (tmp_path / "in.json").write_text(content)
    with pytest.raises(InputError, match=what):
        preprocess(tmp_path / "in.json", tmp_path / "out", NULL)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_follows_a_damaged_frame_is_not_left_out(tmp_path, suffix):
    first, second = (COMPRESS[suffix](f"{i}\n".encode()) for i in (1, 2))
    path = tmp_path / f"in.txt{suffix}"
    path.write_bytes(first + b"\1" + second[1:])
    with pytest.raises(InputError, match="data cannot be read"):
        preprocess(path, tmp_path / "out", NULL)
    path.write_bytes(first + bytes(8) + second if suffix in (".xz", ".gz") else first + second)
    preprocess(path, tmp_path / "out", NULL)
    assert numbers(tmp_path / "out") == [[1], [2]]


def test_a_file_that_becomes_shorter_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": str(i)} for i in range(100)])
    with pytest.raises(InputError, match="became shorter while it was read") as caught:
        preprocess(path, tmp_path / "out", NULL, part_bytes=100, progress=lambda _: os.truncate(path, 700))
    assert caught.value.where == str(path)


def test_text_that_repeats_itself_is_not_decompressed_at_once(tmp_path):
    packer = zstandard.ZstdCompressor().compressobj()
    with open(tmp_path / "in", "wb") as file:
        file.writelines([*(packer.compress(b"the same again\n" * 2**20) for _ in range(4)), packer.flush()])
    with open(tmp_path / "in", "rb") as file:
        tracemalloc.start()
        assert sum(map(len, iter(partial(decompressed("zstd", file).read, 1 << 20), b""))) == 15 * 2**22
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 30e6, peak  # of 63 MB


def test_a_bad_item_of_an_array_is_named(tmp_path):
    (tmp_path / "in.json").write_text('[{"text": "1"}, {"text": 2}]')
    with pytest.raises(InputError) as caught:
        preprocess(tmp_path / "in.json", tmp_path / "out", NULL)
    assert caught.value.where == f"{tmp_path / 'in.json'}[1]"


def test_folders_and_patterns_by_name(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name, number in (("b/1.jsonl", 2), ("a.jsonl", 1), ("c.txt", 3)):
        text = f"{number}\n" if name.endswith(".txt") else json.dumps({"text": str(number)}) + "\n"
        (tmp_path / "in" / name).write_text(text)
    for name in (".hidden", "README.md", "b/made.bin"):
        (tmp_path / "in" / name).write_text("x")
    assert passed_over(tmp_path / "in") == [str(tmp_path / "in" / name) for name in ("README.md", "b/made.bin")]
    preprocess(tmp_path / "in", tmp_path / "out", NULL)
    assert numbers(tmp_path / "out") == [[1], [2], [3]]
    preprocess([str(tmp_path / "in/c.txt"), str(tmp_path / "in/*.jsonl")], tmp_path / "two", NULL)
    assert numbers(tmp_path / "two") == [[3], [1]]
    for bad, what in ((tmp_path / "nothing", "no such file"), (str(tmp_path / "*.zip"), "no file is named like"), ([str(tmp_path / "in/c.txt"), str(tmp_path / "in/./b/../c.txt")], "named twice")):
        with pytest.raises(InputError, match=what):
            preprocess(bad, tmp_path / "out", NULL)


def test_yuans_lines(tmp_path, gpt2):
    lines = ["<n>first<n>second", "", "  ", "<n><n>", "a[SEP]b▃c\r", "  spaces  "]
    (tmp_path / "in.txt").write_text("\n".join(lines), encoding="utf-8")
    counts = preprocess(tmp_path / "in.txt", tmp_path / "out", gpt2, format="yuan")
    reader = IndexedReader(tmp_path / "out_text_document")
    assert [gpt2.decode(reader.get(i)) for i in range(reader.sequences)] == ["first\nsecond", "a<sep>bc", "spaces"]
    assert counts["text"].blank == 3
    preprocess(tmp_path / "in.txt", tmp_path / "plain", gpt2)  # .txt is plain text by itself
    plain = IndexedReader(tmp_path / "plain_text_document")
    assert gpt2.decode(plain.get(0)) == "<n>first<n>second" and plain.documents == 4


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "in.parquet", text=[str(i) for i in range(50)], other=list(range(50)))
    preprocess(path, tmp_path / "out", NULL, part_bytes=100)
    assert numbers(tmp_path / "out") == [[i] for i in range(50)]
    write_parquet(path, text=[b"1", b"\xff", None, b"2"])  # as writers have it that do not say that bytes are text
    counts = preprocess(path, tmp_path / "out", NULL, max_bad=2)
    assert numbers(tmp_path / "out") == [[1], [2]] and counts["text"].bad == 2
    first, second = IndexedReader(tmp_path / "out_text_document").description["first_bad_lines"]
    assert f"{path}[1]: not UTF-8" in first and f"{path}[2]: 'text' is not text but null" in second
    write_parquet(path, text=[datetime.date(2026, 1, 2)])
    with pytest.raises(InputError, match="'text' is not text but {\"date\": \"2026-01-02\"}"):
        preprocess(path, tmp_path / "out", NULL)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="not a Parquet file"):
        preprocess(path, tmp_path / "out", NULL)


def test_a_row_group_of_parquet_is_read_little_by_little(tmp_path):
    path = write_parquet(tmp_path / "in.parquet", text=[os.urandom(200).hex() for _ in range(60000)])
    reading = blocks(find_sources(path)[0], 1 << 16, ["text"])
    tracemalloc.start()
    next(reading)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6, peak  # of 24 MB


def test_bad_lines_are_counted_shown_and_limited(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(('{"text": "%d"}\n' % i) if i % 10 else "broken\n" for i in range(100)))
    counts = preprocess(path, tmp_path / "out", NULL, max_bad=10, part_bytes=200)
    assert numbers(tmp_path / "out") == [[i] for i in range(100) if i % 10]
    assert counts["text"].bad == 10 and counts["text"].documents == 90
    manifest = IndexedReader(tmp_path / "out_text_document").description
    assert manifest["bad_lines"] == 10 and manifest["first_bad_lines"][1].startswith(f"{path}:11: not JSON")
    for part_bytes in (200, 10**6):
        with pytest.raises(InputError, match="more than 9 bad lines") as caught:
            preprocess(path, tmp_path / "few", NULL, max_bad=9, part_bytes=part_bytes)
        assert f"{path}:1: not JSON" in caught.value.what


@pytest.mark.parametrize("n", [1, 3])
def test_shares_one_after_another_are_the_whole(tmp_path, n):
    inputs = [write_jsonl(tmp_path / f"{k}.jsonl", [{"text": f"{k} {i}"} for i in range(20)]) for k in range(3)]
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "9 9"}\n'))
    inputs.append(tmp_path / "z.jsonl.gz")
    found = []
    for i in range(n):
        preprocess(inputs, tmp_path / "out", NULL, shard=(i, n), part_bytes=100)
        found += numbers(tmp_path / ("out" if n == 1 else f"out_{i:05d}-of-{n:05d}"))
    assert found == [[k, i] for k in range(3) for i in range(20)] + [[9, 9]]
