"""JSONL to .bin/.idx: Megatron-LM's own bytes, hard texts, hard lines, and endings that leave nothing half-made."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from data_tools.encode import PartFiles
from data_tools.errors import DataError, InputError
from data_tools.indexed import IndexedReader
from data_tools.preprocess import preprocess
from data_tools.tokenizers import build_tokenizer
from tests.data_tools.samples import HARD_TEXTS, ROOT, SHARED, needs_shared, small_gpt2, write_jsonl

NULL = build_tokenizer("NullTokenizer", vocab_size=100)


def documents(prefix) -> list[list[list[int]]]:
    """Documents of a pair, each a list of its sequences."""
    reader = IndexedReader(prefix)
    edges = reader.boundaries.tolist()
    return [[reader.get(i).tolist() for i in range(start, end)] for start, end in zip(edges, edges[1:], strict=False)]


@needs_shared
@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_are_megatron_lms(tmp_path, workers):
    pieces = [piece for piece in (SHARED / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n") if piece]
    texts = ["\n\n".join(pieces[i : i + 40]) for i in range(0, len(pieces), 40)]
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    files = {"vocab_file": SHARED / "data" / "gpt2-vocab.json", "merge_file": SHARED / "data" / "gpt2-merges.txt"}
    counts = preprocess(source, tmp_path / "out", build_tokenizer("GPT2BPETokenizer", **files), append_eod=True, workers=workers)

    digests = {suffix: hashlib.sha256((tmp_path / f"out_text_document.{suffix}").read_bytes()).hexdigest() for suffix in ("bin", "idx")}
    assert digests["bin"] == "8757a1c49dab6780829bce76729b8eec3653811ad7add0b92b14a3c300d362ae"
    assert digests["idx"] == "e1977d8cce03d4f8f6f2c95088b39d2528164ac2ad51f595c1b04295ed6ab65f"
    assert (counts["text"].documents, counts["text"].tokens, counts["text"].bytes) == (181, 675692 // 2, source.stat().st_size)


@pytest.mark.parametrize("workers", [1, 3])
def test_hard_texts_come_back_in_order(tmp_path, gpt2, workers):
    texts = [f"{i} {text}" for i, text in enumerate(HARD_TEXTS * 5)]
    source = write_jsonl(tmp_path / "in", [{"text": t} for t in texts])
    counts = preprocess(source, tmp_path / "out", gpt2, append_eod=True, workers=workers, part_bytes=40)  # nearly every line is a part
    sequences = [sequence for (sequence,) in documents(tmp_path / "out_text_document")]
    assert all(sequence[-1] == gpt2.eod for sequence in sequences)
    assert [gpt2.decode(sequence[:-1]) for sequence in sequences] == texts
    assert counts["text"].documents == len(texts) and counts["text"].largest_id == gpt2.eod


def test_several_keys_sentences_and_empty_texts(tmp_path):
    lines = [
        {"text": "1 2", "title": "9"},
        {"text": "", "title": ["3", "", "4 5"]},  # an empty document; an empty sentence is no sequence
        {"text": ["", ""], "title": ""},
        {"text": "6", "title": [], "other": None},
    ]
    preprocess(write_jsonl(tmp_path / "in", lines), tmp_path / "out", NULL, json_keys=["text", "title"], append_eod=True)
    assert documents(tmp_path / "out_text_document") == [[[1, 2, 100]], [], [], [[6, 100]]]
    assert documents(tmp_path / "out_title_document") == [[[9, 100]], [[3], [4, 5, 100]], [], []]
    preprocess(tmp_path / "in", tmp_path / "plain", NULL)
    assert documents(tmp_path / "plain_text_document") == [[[1, 2]], [], [], [[6]]]


def test_line_endings_and_byte_order_mark(tmp_path):
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf{"text": "1"}\r\n{"text": "2"}\n {"text":\t"3"} ')  # no newline at the end
    preprocess(tmp_path / "in", tmp_path / "out", NULL)
    assert documents(tmp_path / "out_text_document") == [[[1]], [[2]], [[3]]]


def test_escapes_and_separators_inside_a_line(tmp_path, gpt2):
    (tmp_path / "in").write_text('{"text": "\\ud83d\\ude00 \\u0000 a\\nb \u2028 \u0085"}\n', encoding="utf-8")
    preprocess(tmp_path / "in", tmp_path / "out", gpt2)
    assert [gpt2.decode(s) for (s,) in documents(tmp_path / "out_text_document")] == ["😀 \x00 a\nb \u2028 \x85"]


def test_description_names_the_tokenizer(tmp_path):
    preprocess(write_jsonl(tmp_path / "in", [{"text": "1 7"}]), tmp_path / "out", NULL, append_eod=True)
    description = IndexedReader(tmp_path / "out_text_document").description
    assert {key: description[key] for key in ("documents", "tokens", "largest_id", "append_eod", "tokenizer")} == {
        "documents": 1,
        "tokens": 3,
        "largest_id": 100,
        "append_eod": True,
        "tokenizer": {"type": "NullTokenizer", "sha256": NULL.hash(), "vocab_size": 101, "eod": 100},
    }


BAD_LINES = [
    (b'{"text": "1"', "not JSON"),
    (b"plain text", "not JSON (Expecting value: line 1 column 1 (char 0)): plain text"),
    (b'{"text": "' + b"x" * 100, "x" * 70 + " ..."),
    (b"", "a blank line"),
    (b"  \t", "a blank line"),
    (b'{"title": "1"}', "no key 'text'"),
    (b'["text"]', "not a JSON object"),
    (b'{"text": 5}', "'text' is not text but 5"),
    (b'{"text": null}', "'text' is not text but null"),
    (b'{"text": ["1", {}]}', "'text' is not text but {}"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
    (b'{"text": "caf\xe9"}', "not UTF-8 at byte 14"),
    (b'{"text": "a\\ud800b"}', "half of a surrogate pair"),
    (b'{"text": "1 x"}', "not 'x'"),
    (b'{"text": "101"}', "id 101 is outside the vocabulary"),
    (b"[" * 100000, "not JSON (nested too deep)"),
]


@pytest.mark.parametrize(("line", "what"), BAD_LINES, ids=[what[:30] for _, what in BAD_LINES])
def test_a_bad_line_is_refused_with_its_place(tmp_path, line, what):
    (tmp_path / "in").write_bytes(b'{"text": "1"}\n' * 6 + line + b'\n{"text": "2"}\n')
    with pytest.raises(InputError) as caught:
        preprocess(tmp_path / "in", tmp_path / "out", NULL, part_bytes=30)
    assert what in caught.value.what and caught.value.fix
    assert caught.value.where == f"{tmp_path / 'in'}:7"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.unfinished"]


def test_the_first_bad_line_is_named_whatever_the_workers(tmp_path):
    (tmp_path / "in").write_bytes(b'{"text": "1"}\n' * 300 + b"slow down " * 10000 + b"\n" + b"bad\n" * 300)
    with pytest.raises(InputError) as caught:
        preprocess(tmp_path / "in", tmp_path / "out", NULL, workers=3, part_bytes=200)
    assert caught.value.where == f"{tmp_path / 'in'}:301"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.unfinished"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "no documents"),
        (b'{"text": ""}\n{"text": []}\n', "2 documents and no text under 'text'"),
        (b"\x1f\x8b\x08\x00", "the gzip data cannot be read"),
        (b"\xfd7zXZ\x00\x00", "the xz data cannot be read"),
        (b"\x28\xb5\x2f\xfd\x00", "the zstd data cannot be read"),
    ],
)
def test_input_without_text_is_refused(tmp_path, content, what):
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(InputError, match=what):
        preprocess(tmp_path / "in", tmp_path / "out", NULL)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_keys_twice_or_none_are_refused(tmp_path):
    source = write_jsonl(tmp_path / "in", [{"text": "1"}])
    for keys in (["text", "text"], []):
        with pytest.raises(InputError, match="each key once"):
            preprocess(source, tmp_path / "out", NULL, json_keys=keys)


def test_what_has_no_keys_or_too_few_lines_for_the_shards_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "1"}])
    (tmp_path / "in.txt").write_text("1\n")
    with pytest.raises(InputError, match="a line of text is one text, and has no text and title"):
        preprocess([source, tmp_path / "in.txt"], tmp_path / "out", NULL, json_keys=["text", "title"])
    with pytest.raises(InputError, match="no documents in share 1 of 3") as refused:
        preprocess(source, tmp_path / "out", NULL, shard=(1, 3))
    assert refused.value.fix == "fewer shards"


def test_progress_counts_up_to_the_whole(tmp_path):
    source = write_jsonl(tmp_path / "in", [{"text": "1 2 3"}] * 50)
    seen = []
    def note(counts):
        seen.append((counts[0].documents, counts[0].bytes, counts[0].tokens))

    preprocess(source, tmp_path / "out", NULL, part_bytes=50, progress=note)
    assert len(seen) > 10 and seen == sorted(seen)
    assert seen[-1] == (50, source.stat().st_size, 150)


def _start(tmp_path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """`yuan preprocess` amid half a minute of work, its two workers up; an older output lies there."""
    files = small_gpt2(tmp_path)
    source = tmp_path / "in.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for i in range(150):
            file.write(json.dumps({"text": f"{i} the quick brown fox " * 15000}) + "\n")  # 54 MB
    (tmp_path / "out_text_document.bin").write_bytes(b"old")
    (tmp_path / "out_text_document.idx").write_bytes(b"old")
    command = [sys.executable, "-m", "launcher.cli", "preprocess", "--input", source, "--output-prefix", tmp_path / "out", "--workers", "2", "--no-gigatoken"]
    for name, path in files.items():
        command += ["--" + name.replace("_", "-"), path]
    log = open(tmp_path / "log", "w")
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    part, deadline = tmp_path / "out.unfinished" / "joined.0.bin", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size):  # the first result was written
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    return process, children


def _gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


@pytest.mark.parametrize(("end", "code"), [("interrupt", 3), ("kill a worker", 2), ("kill the parent", -signal.SIGKILL)])
def test_an_early_end_leaves_no_process_and_no_new_file(tmp_path, end, code):
    process, children = _start(tmp_path)
    assert len(children) == 2
    if end == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
    elif end == "kill a worker":
        children[0].kill()
    else:
        process.kill()
    assert process.wait(60) == code, (tmp_path / "log").read_text()
    assert _gone(children)
    outputs = {path.name: path for path in tmp_path.iterdir() if path.name.startswith("out")}
    assert outputs["out_text_document.bin"].read_bytes() == outputs["out_text_document.idx"].read_bytes() == b"old"
    if end != "kill the parent":  # whom nothing can clean up after; its .part files look like what they are
        assert sorted(outputs) == ["out.unfinished", "out_text_document.bin", "out_text_document.idx"]
    if end == "interrupt":
        assert "stopped    the same command goes on" in (tmp_path / "log").read_text()
    if end == "kill a worker":
        assert "error: a worker process died" in (tmp_path / "log").read_text()


def test_dead_worker_is_a_data_error(tmp_path):
    from data_tools.parallel import ordered_map

    with pytest.raises(DataError, match="a worker process died"):
        list(ordered_map(os._exit, [3], 2))
    assert list(ordered_map(str, range(30), 2)) == [str(i) for i in range(30)]


def test_importing_is_cheap():
    """The command line loads these before it knows whether they are needed."""
    code = "import sys, data_tools.preprocess; print([m for m in ('torch', 'sentencepiece', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("lost", ["the end of a file", "the machine went down"])
def test_a_stopped_run_goes_on_from_its_parts(tmp_path, monkeypatch, lost):
    source = write_jsonl(tmp_path / "in", [{"text": f"{i % 100} 7", "title": "3"} for i in range(200)])
    options = dict(json_keys=["text", "title"], append_eod=True, part_bytes=100)
    preprocess(source, tmp_path / "whole", NULL, **options)

    class Stop(Exception):
        pass

    def stop_after(parts):
        def progress(counts):
            if counts[0].documents >= parts * 5:
                raise Stop

        return progress

    for parts in (3, 12):
        with pytest.raises(Stop):
            preprocess(source, tmp_path / "out", NULL, progress=stop_after(parts), **options)
        assert [path.name for path in tmp_path.glob("out_*")] == []
    encoded = []
    monkeypatch.setattr(type(NULL), "encode", lambda self, text: encoded.append(text) or [int(word) for word in text.split()])
    if lost == "the end of a file":
        os.truncate(tmp_path / "out.unfinished" / "joined.1.bin", 200)  # a file system that lost what was written last
    else:  # which may have left holes in what is long enough
        boot = tmp_path / "boot"
        boot.write_text("another")
        monkeypatch.setattr("data_tools.preprocess._BOOT", boot)
    preprocess(source, tmp_path / "out", NULL, **options)
    if lost == "the end of a file":
        assert 0 < len(encoded) < 400 * 0.8 and "15 7" not in encoded[:5]
    else:
        assert len(encoded) == 400
    for name in ("text_document.bin", "text_document.idx", "title_document.bin", "title_document.idx"):
        assert (tmp_path / f"out_{name}").read_bytes() == (tmp_path / f"whole_{name}").read_bytes()
    assert not (tmp_path / "out.unfinished").exists()


def test_parts_of_another_text_or_plan_are_not_taken(tmp_path):
    source = write_jsonl(tmp_path / "in", [{"text": f"{i % 100}"} for i in range(50)] + [{"text": "x"}])
    with pytest.raises(InputError):
        preprocess(source, tmp_path / "out", NULL, part_bytes=100)
    write_jsonl(source, [{"text": f"{i % 50}"} for i in range(50)] + [{"text": "1"}])
    preprocess(source, tmp_path / "out", NULL, part_bytes=100)
    assert documents(tmp_path / "out_text_document") == [[[i % 50]] for i in range(50)] + [[[1]]]


def test_a_part_half_made_of_another_text_is_not_taken(tmp_path, monkeypatch):
    """Text A, then B of the same size, stopped between the tokens of a part and its record; then A again."""
    texts = {name: [{"text": f"{i * step % 90 + 10}"} for i in range(100)] for name, step in (("a", 1), ("b", 7))}
    write_jsonl(tmp_path / "in", texts["a"])
    preprocess(tmp_path / "in", tmp_path / "whole", NULL, part_bytes=100)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    def stopped():
        with pytest.raises(Stop):
            preprocess(tmp_path / "in", tmp_path / "out", NULL, part_bytes=100, progress=stop)

    stopped()
    write_jsonl(tmp_path / "in", texts["b"])
    with monkeypatch.context() as patch:
        patch.setattr(PartFiles, "write", stop)
        stopped()
    write_jsonl(tmp_path / "in", texts["a"])
    preprocess(tmp_path / "in", tmp_path / "out", NULL, part_bytes=100)
    assert (tmp_path / "out_text_document.bin").read_bytes() == (tmp_path / "whole_text_document.bin").read_bytes()


def test_runs_of_other_keys_do_not_share_unfinished_work(tmp_path):
    source = write_jsonl(tmp_path / "in", [{"text": "1", "title": "2"}] * 50)

    def second(counts):
        with pytest.raises(DataError, match="another process is writing this output"):
            preprocess(source, tmp_path / "out", NULL, json_keys=["title"])

    preprocess(source, tmp_path / "out", NULL, part_bytes=100, progress=second)
    assert sorted(path.name for path in tmp_path.glob("out*")) == [f"out_text_document.{suffix}" for suffix in ("bin", "idx", "json")]


def test_hard_lines_of_plain_text(tmp_path, gpt2):
    lines = ["a\x00b", "c\r", "\ufeffd", "w" * 300000, "e"]
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    preprocess(tmp_path / "in.txt", tmp_path / "out", gpt2, append_eod=True)
    found = [gpt2.decode(sequence[:-1]) for (sequence,) in documents(tmp_path / "out_text_document")]
    assert found == ["a\x00b", "c", "\ufeffd", "w" * 300000, "e"]
