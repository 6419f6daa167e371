"""Lines of many MB are read and encoded piece by piece, and come out as if they were not."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import encode, long_lines
from data_tools.errors import InputError
from data_tools.long_lines import json_texts, line_text
from data_tools.preprocess import preprocess
from data_tools.tokenizers import base
from tests.data_tools.samples import HARD_TEXTS
from tests.data_tools.test_preprocess import documents

TEXT = st.lists(st.sampled_from([*HARD_TEXTS[:6], '"', "\\", "\\n", "😀", "今天", "a", " ", "\n", "\0", "x" * 9]), max_size=9).map("".join)


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Everything is long."""
    for place, name in ((long_lines, "_PIECE"), (long_lines, "_KEPT"), (encode, "_BATCH_BYTES"), (encode, "_LONG_LINE"), (encode, "LONG"), (base, "LONG")):
        monkeypatch.setattr(place, name, 20)


@settings(max_examples=150, deadline=None)
@given(text=TEXT, title=TEXT, ascii=st.booleans())
def test_the_texts_of_an_object_are_those_of_the_json_reader(text, title, ascii):
    record = {"title": title, "more": [{"text": "another", "deep": title}], "n": 5, "text": text, title + "key": title}
    line = (json.dumps(record, ensure_ascii=ascii) + "\n").encode()
    found = json_texts(line, ["text", "title"])
    if found is None:  # which a key as long as that comes to
        assert len(json.dumps(title + "key", ensure_ascii=ascii).encode()) > 20
    else:
        assert ["".join(one) for one in found] == [text, title]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "' + b"x" * 50 + b'\xff"}',
        b'{"text": "' + b"x" * 50 + b"\n" + b'"}',
        b'{"text": "' + b"x" * 50,
        b'{"text": "' + b"x" * 50 + b'\\ud83d and \\ude00"}',
        b'{"text": "' + b"x" * 50 + b'", "other": "' + b"y" * 50 + b'\\q"}',
        b'{"text": ["' + b"x" * 50 + b'"]}',
        b'{"text": {"\\u0000long": 7}, "other": "' + b"y" * 50 + b'"}',
        b'{"body": "' + b"x" * 50 + b'"}',
        b'["' + b"x" * 50 + b'"]',
    ],
)
def test_what_is_odd_is_left_to_the_other_reader(line):
    assert json_texts(line, ["text"]) is None


def test_plain_text():
    assert ["".join(one) for one in line_text("  今天 \\ud83d is no escape here 😀\r\n".encode())] == ["  今天 \\ud83d is no escape here 😀"]
    assert line_text(("\u3000" * 40 + "\n").encode()) is None and line_text(b"x" * 40 + b"\xff") is None


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.txt"])
def test_long_documents_are_the_same_in_pieces(tmp_path, gpt2, monkeypatch, name):
    texts = [" ".join(HARD_TEXTS[i % 6].split("\n") * (1 + 9 * (i % 3 == 0))).replace("\r", "") for i in range(12)]
    records = [{"text": text, "title": text[: 7 * i]} for i, text in enumerate(texts)]
    keys = ["text"] if name == "in.txt" else ["text", "title"]
    lines = {"in.jsonl": "\n".join(map(json.dumps, records)), "in.json": json.dumps(records), "in.txt": "\n".join(texts)}
    (tmp_path / name).write_text(lines[name], encoding="utf-8")
    counts = preprocess(tmp_path / name, tmp_path / "cut", gpt2, json_keys=keys, append_eod=True)
    assert counts["text"].documents == len(texts)
    monkeypatch.undo()
    preprocess(tmp_path / name, tmp_path / "whole", gpt2, json_keys=keys, append_eod=True)
    for key in keys:
        assert documents(tmp_path / f"cut_{key}_document") == documents(tmp_path / f"whole_{key}_document")


def test_a_bad_long_line_is_named(tmp_path, gpt2):
    (tmp_path / "in").write_bytes(b'{"text": "1"}\n{"text": "' + b"word " * 50 + b'\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8 at byte 261") as caught:
        preprocess(tmp_path / "in", tmp_path / "out", gpt2)
    assert caught.value.where == f"{tmp_path / 'in'}:2"
