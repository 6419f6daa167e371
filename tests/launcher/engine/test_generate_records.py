"""Prompts in, answers out: every line keeps its place, and what is written can be read back."""

import json
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.engine.generate.records import Line, escape, read_lines, unescape, write_lines
from launcher.errors import UserError
from launcher.workers.generate import write


@given(st.text() | st.text(alphabet="\\nru0a\n\r\v\f\x1c\x85\u2028\u2029"))
def test_an_escaped_answer_is_one_line_and_comes_back(text):
    assert len(f"{escape(text)}.".splitlines()) == 1
    assert unescape(escape(text)) == text


def test_the_usual_escapes_are_the_plain_ones():
    assert escape("a\nb\r\\n\u2028") == r"a\nb\r\\n\u2028"


@pytest.mark.parametrize(
    "line, prompt",
    [
        ('{"query": "q"}', "q"),
        ('{"prompt": "p", "id": 1}', "p"),
        ('{"text": "t"}', "t"),
        ('{"instruction": "i", "input": "x", "output": "gold"}', "i\nx"),
        ('{"instruction": "i", "input": ""}', "i"),
        ('{"instruction": "i"}', "i"),
        ('{"text": "t", "query": "q"}', "q"),
        ('{"query": ""}', ""),
        ('  {"query": "Größe 中"} \r', "Größe 中"),
    ],
)
def test_prompts(tmp_path, line, prompt):
    (tmp_path / "in.jsonl").write_text(line, encoding="utf-8", newline="")
    (read,) = read_lines(tmp_path / "in.jsonl")
    assert (read.prompt, read.error) == (prompt, None)


@pytest.mark.parametrize(
    "line, error",
    [
        (b"not json", "not JSON: Expecting value at column 1"),
        (b'["query"]', "not a JSON object"),
        (b'{"question": "q"}', "none of the keys query, prompt, text, instruction (keys: question)"),
        (b'{"query": null}', "query is not text: null"),
        (b'{"instruction": "i", "input": 3}', "input is not text: 3"),
        (b'{"query": "\xff"}', "not UTF-8 at byte 12"),
        (b'{"query": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_a_bad_line_has_its_error_and_keeps_its_place(tmp_path, line, error):
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"query": "a"}\n\n' + line + b'\n{"query": "b"}\n')
    lines = read_lines(tmp_path / "in.jsonl")
    assert [one.number for one in lines] == [1, 2, 3, 4]
    assert [one.prompt for one in lines] == ["a", None, None, "b"]
    assert [one.error is not None for one in lines] == [False, False, True, False]
    assert error in lines[2].error
    write_lines(lines, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text().split("\n")[2].startswith("[error] line 3: ")
    write_lines(lines, tmp_path / "out.jsonl")
    written = (tmp_path / "out.jsonl").read_text().split("\n")
    assert written[1] == "" and written[4:] == [""]
    record = json.loads(written[2])
    assert (record["finish_reason"], record["output"], record["completion_tokens"]) == ("error", "", 0)
    assert error in record["error"]


def test_a_record_keeps_what_it_had(tmp_path):
    record = {"query": "q", "output": "gold", "id": 7}
    line = Line(1, record, "q", output="a\nb", finish_reason="stop", prompt_tokens=1, completion_tokens=3)
    write_lines([line], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "query": "q", "input_output": "gold", "id": 7,
        "output": "a\nb", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 3,
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


def test_a_file_that_was_there_is_replaced_whole(tmp_path):
    (tmp_path / "out.txt").write_text("an older, longer answer\nand another\n")
    write_lines([Line(1, {}, "q", output="new\\")], tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "new\\\\\n"


def test_answers_that_the_disk_does_not_take_are_kept_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "out.txt").mkdir()  # as a full disk: everything up to the last step works
    with pytest.raises(UserError, match="the answers cannot be written: Is a directory") as told:
        write([Line(1, {"query": "q"}, "q", output="an answer")], tmp_path / "out.txt")
    kept = next(tmp_path.glob("yuan-answers-*/out.txt"))
    assert kept.read_text() == "an answer\n" and str(kept) in told.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.txt", kept.parent.name]  # and no part of one
