"""The first rows of a file of questions and answers, as an array and as lines, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import sources
from data_tools.errors import InputError
from data_tools.rows import first_rows

numbers = st.integers(-(2**63), 2**64 - 1)  # beyond 64 bits orjson gives floats; text is what is read of rows
values = st.recursive(st.text(max_size=9) | numbers | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=5)
records = st.lists(st.dictionaries(st.text(max_size=9), values, max_size=4), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(records=records, count=st.integers(1, 10), ascii_only=st.booleans(), indent=st.sampled_from([None, 2]), read=st.integers(1, 40))
def test_the_first_rows_are_those_that_were_written(tmp_path_factory, records, count, ascii_only, indent, read):
    """However the array is laid out, and wherever a reading of it ends."""
    path = tmp_path_factory.getbasetemp() / "rows.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_READ", read)
        for text in (
            json.dumps(records, indent=indent, ensure_ascii=ascii_only),
            "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records),
        ):
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            try:
                got = [row for _, row in first_rows(path, count)]
            except InputError as error:  # half of a surrogate pair cannot be written as UTF-8
                assert "UTF-8" in error.what and not ascii_only
            else:
                assert got == records[:count]


@pytest.mark.parametrize("text", ['[{"a": 1},\n {"a": 2}]', '\ufeff[{"a": 1}, {"a": 2}', '{"a": 1}\n{"a": 2}\n{not json'])
def test_what_comes_later_is_not_read(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    found = list(first_rows(path, 2))
    assert [row for _, row in found] == [{"a": 1}, {"a": 2}]
    assert found[1][0] == (f"{path}:2" if text.startswith("{") else f"{path}[1]")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no rows"),
        (b" \n\n", "no rows"),
        (b"[ ]", "no rows"),
        (b'[{"a": 1}', "not JSON"),
        (b'[{"a": 1}, oops]', "not JSON"),
        (b'{"a": 1}\nbroken\n', "not JSON"),
        (b'{"a": 1}\nnull\n', "not an object but null"),
        (b'{\n  "a": 1\n}\n', "not JSON"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"\x1f\x8b\x08\x00\x00\x00", "gzip"),
    ],
)
def test_what_is_no_file_of_rows_is_refused(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        list(first_rows(path, 5))
    assert str(path) in caught.value.where and caught.value.fix
