"""Rows as people write them: who says what in each, and what is refused."""

import re

import pytest

from data_tools.conversations import Turn, conversation
from data_tools.records import BadLine

ASKED = (Turn("user", "q"), Turn("assistant", "a"))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "content": "a"},
        {"instruction": "q", "output": "a", "content": "", "id": 7},
        {"prompt": "q", "completion": "a"},
        {"query": "q", "response": "a"},
        {"question": "q", "answer": "a", "input": None},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "q<sep>a",
        {"messages": None, "prompt": "q", "completion": "a"},
    ],
)
def test_every_form_says_the_same(row):
    assert conversation(row) == ASKED


def test_input_history_and_system():
    assert conversation({"instruction": "q", "context": "c", "output": "a"})[0] == Turn("user", "q", "c")
    assert Turn("user", "q", "c").whole == "q\nc" and Turn("user", "", "c").whole == "c"
    row = {"system": "s", "history": [["q1", "a1"]], "instruction": "q", "output": "a"}
    assert conversation(row) == (Turn("system", "s"), Turn("user", "q1"), Turn("assistant", "a1"), *ASKED)
    listed = {"system": "s", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]}
    assert conversation(listed) == (Turn("system", "s"), *ASKED)
    assert conversation({"instruction": "", "input": "", "content": "text"}) == (Turn("user", ""), Turn("assistant", "text"))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"instruction": "q", "output": " \n"}, "an empty answer"),
        ({"instruction": "q", "reply": "a"}, "no answer in this row, which has instruction, reply"),
        ({"output": "a"}, "no question"),
        ({"instruction": "q", "output": "a", "response": "b"}, "text under 'output' and 'response', which mean the same"),
        ({"instruction": ["q"], "output": "a"}, "'instruction' is not text but"),
        ({"instruction": "q", "output": "\ud800"}, "half of a surrogate pair"),
        ({"instruction": "q", "history": ["x"], "output": "a"}, "'history' has no pair at 1"),
        ({"instruction": "q", "history": 5, "output": "a"}, "'history' is no list but 5"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}, "message 2 has a weight"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "output": "b"}, "'output' beside a list of messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 is by \"tool\""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'content' of message 1 is not text"),
        ({"messages": [{"role": "user", "content": "q"}]}, "the last message is no answer"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "do not take turns: assistant"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}] * 2}, r"an empty answer \(message 2\)"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}]}, "a system's message after the first"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "message 2 has 'tool_calls', which is not read"),
        ({"instruction": "q", "output": "a", "tools": [{"name": "f"}]}, "the row has 'tools', which is not read"),
        ("only text", "no <sep>"),
        ("q<sep>a<sep>b", "2 times <sep>"),
        (["q", "a"], "not an object"),
        (None, "not an object"),
    ],
)
def test_what_is_refused(row, what):
    with pytest.raises(BadLine) as caught:
        conversation(row)
    assert re.search(what, caught.value.what) and caught.value.fix
