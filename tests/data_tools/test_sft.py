"""Rows prepared into tokens and masks, and packed into samples."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import InputError, TokenizerError
from data_tools.packing import Packed, pack
from data_tools.rows import row_sources
from data_tools.sft import Form, Rows, prepare, prepared_prefix
from data_tools.tokenizers import build_tokenizer
from tests.data_tools.samples import small_gpt2, write_jsonl

PLAIN = Form("plain")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return build_tokenizer("GPT2BPETokenizer", **small_gpt2(tmp_path_factory.mktemp("gpt2")))


def rows_of(folder, tokenizer, questions_and_answers, form=PLAIN, **options) -> Rows:
    source = write_jsonl(folder / "rows.jsonl", [{"instruction": q, "output": a} for q, a in questions_and_answers])
    prepare(source, folder / "x", tokenizer, form, **options)
    return Rows(folder / "x")


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_come_back_in_order(tmp_path, gpt2, workers):
    rows = [{"instruction": f"q{i}", "output": "a" * (i % 7 + 1)} for i in range(300)]
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    count = prepare(array, tmp_path / "x", gpt2, PLAIN, workers)
    found = Rows(tmp_path / "x")
    assert len(found) == count.documents == 300
    for i in (0, 1, 150, 299):
        row = found.row(i)
        assert gpt2.decode(row.ids.tolist()) == f"q{i}\n{'a' * (i % 7 + 1)}<|endoftext|>"
        assert gpt2.decode(row.ids[row.trained].tolist()) == "a" * (i % 7 + 1) + "<|endoftext|>"


def test_bad_rows_are_refused_or_counted(tmp_path, gpt2):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "a"}] * 3 + [{"instruction": "q", "output": ""}])
    with pytest.raises(InputError, match="empty answer") as caught:
        prepare(source, tmp_path / "x", gpt2, PLAIN)
    assert caught.value.where == f"{source}:4"
    assert prepare(source, tmp_path / "x", gpt2, PLAIN, max_bad=1).bad == 1
    with pytest.raises(TokenizerError, match="needs the special token"):
        prepare(source, tmp_path / "x", gpt2, Form("chatml"))


def test_prepared_names_follow_what_decides_the_tokens(tmp_path, gpt2):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "a"}])
    first = prepared_prefix(source, gpt2, PLAIN)
    assert first == prepared_prefix(source, gpt2, PLAIN) and first.parent == tmp_path / "cache"
    others = {prepared_prefix(source, gpt2, Form("alpaca")), prepared_prefix(source, gpt2, Form("plain", last_only=True))}
    write_jsonl(source, [{"instruction": "q", "output": "longer"}])
    others.add(prepared_prefix(source, gpt2, PLAIN))
    assert len({first, *others}) == 4


def test_a_folder_of_rows_is_read_again_without_what_was_made_of_it(tmp_path, gpt2):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "a"}])
    prepare(source, prepared_prefix(source, gpt2, PLAIN), gpt2, PLAIN)
    prepare(source, tmp_path / "beside", gpt2, PLAIN)
    assert [one.path for one in row_sources(tmp_path)] == [str(source)]


def test_yuans_lines(tmp_path, gpt2):
    source = tmp_path / "rows.txt"
    source.write_text("one<n>two[SEP]three\n\nfour<sep>five\n", encoding="utf-8")
    assert prepare(source, tmp_path / "x", gpt2, PLAIN).blank == 1
    texts = [gpt2.decode(Rows(tmp_path / "x").row(i).ids.tolist()) for i in range(2)]
    assert texts == ["one\ntwo\nthree<|endoftext|>", "four\nfive<|endoftext|>"]


def test_samples_say_what_is_trained(tmp_path, gpt2):
    """Three rows in one sample, by hand: inputs, labels one ahead within each row, masks, positions, the filling behind."""
    rows = rows_of(tmp_path, gpt2, [("q", "a"), ("w", "bc"), ("x" * 40, "lost")])
    packed = Packed(rows, 12)
    assert (len(packed), packed.rows_cut, packed.rows_left_out) == (1, 0, 1)
    sample = packed.sample(0, filling=7)
    first, second = (rows.row(i).ids.tolist() for i in (0, 1))
    size = len(first) + len(second) - 2
    assert sample["tokens"].tolist() == [*first[:-1], *second[:-1], *[7] * (12 - size)]
    assert sample["labels"].tolist() == [*first[1:], *second[1:], *[7] * (12 - size)]
    assert sample["document"].tolist() == [0] * (len(first) - 1) + [1] * (len(second) - 1) + [2] * (12 - size)
    assert sample["position_ids"].tolist() == [*range(len(first) - 1), *range(len(second) - 1), *range(12 - size)]
    trained = [token for token, mask in zip(sample["labels"].tolist(), sample["loss_mask"].tolist(), strict=True) if mask]
    assert trained == [*rows.row(0).ids[rows.row(0).trained], *rows.row(1).ids[rows.row(1).trained]] and len(trained) == packed.supervised
    assert packed.efficiency == size / 12


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=30), seq_length=st.integers(2, 40), packing=st.booleans())
def test_every_trained_token_that_fits_is_trained_once(tmp_path_factory, gpt2, sizes, seq_length, packing):
    folder = tmp_path_factory.mktemp("rows")
    rows = rows_of(folder, gpt2, [("q" * q, "".join(chr(97 + i % 5) for i in range(a))) for q, a in sizes])
    shutil.rmtree(folder)  # memory-mapped: it stays readable
    packed = Packed(rows, seq_length, packing)
    wanted = []
    for i in range(len(rows)):
        row = rows.row(i)
        wanted += row.ids[1 : seq_length + 1][row.trained[1 : seq_length + 1]].tolist()
    samples = [packed.sample(i, filling=0) for i in range(len(packed))]
    got = [token for s in samples for token in s["labels"][s["loss_mask"] > 0].tolist()]
    assert sorted(got) == sorted(wanted) and len(got) == packed.supervised
    for s in samples:
        for number in np.unique(s["document"]):
            here = s["document"] == number
            assert s["position_ids"][here].tolist() == list(range(here.sum()))
            if s["loss_mask"][here].any():
                assert s["labels"][here][:-1].tolist() == s["tokens"][here][1:].tolist()
            else:
                assert number == s["document"].max() and not s["tokens"][here].any()  # the filling


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_packs_hold_every_row_once(lengths):
    rows, starts = pack(np.array(lengths, dtype=np.int64), 50)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in rows[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert all(0 < one <= 50 for one in sums)
    assert sum(one <= 25 for one in sums) <= 1  # two half-empty packs would have been one


def test_lengths_that_do_not_go_into_a_pack():
    with pytest.raises(ValueError, match="lengths from 0 to 3"):
        pack(np.array([0, 3]), 2)
