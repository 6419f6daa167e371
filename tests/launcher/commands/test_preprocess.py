"""`yuan preprocess` as typed: what it says, what it writes, what it refuses before it starts."""

import shlex
import sys

import numpy as np
import pytest

from data_tools.indexed import IndexedReader
from launcher import cli
from tests.data_tools.samples import small_gpt2, write_jsonl


@pytest.fixture
def yuan(tmp_path, monkeypatch, capfd):
    """Types a command in an empty folder and gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["yuan", *shlex.split(line)])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        return ending.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture
def defaults(tmp_path):
    """The files that the packaged recipe expects: data/corpus.jsonl and GPT-2's two files."""
    data = tmp_path / "data"
    data.mkdir()
    files = small_gpt2(data)
    files["vocab_file"].rename(data / "gpt2-vocab.json")
    files["merge_file"].rename(data / "gpt2-merges.txt")
    write_jsonl(data / "corpus.jsonl", [{"text": "To be", "title": "Hamlet"}, {"text": "or not"}])
    write_jsonl(data / "both.jsonl", [{"text": "To be", "title": "Hamlet"}, {"text": "or not", "title": ""}])


def test_defaults_fit_together(yuan, defaults):
    code, out, _ = yuan("preprocess preprocess.workers=1")
    assert code == 0, out
    reader = IndexedReader("data/my-gpt2_text_document")
    assert reader.documents == 2 and [reader.get(i)[-1] for i in range(2)] == [299, 299]  # --append-eod by default
    assert "data/corpus.jsonl" in out and "GPT2BPETokenizer by gigatoken, 300 ids" in out and f"{reader.tokens:,} tokens" in out
    assert "yuan pretrain recipe=345m_1dp data.data_path=data/my-gpt2_text_document\n" in out


def test_the_seeds_own_command(yuan, defaults):
    """The command of Megatron-LM's users, with options that it has dropped since."""
    code, out, err = yuan(
        "preprocess --input data/corpus.jsonl --output-prefix out/my-gpt2 --vocab-file data/gpt2-vocab.json --dataset-impl mmap"
        " --tokenizer-type GPT2BPETokenizer --merge-file data/gpt2-merges.txt --append-eod --workers 2 --chunk-size 25 --log-interval 10"
    )
    assert code == 0, err
    assert IndexedReader("out/my-gpt2_text_document").documents == 2
    for ignored in ("--dataset-impl mmap", "--chunk-size 25", "--log-interval 10"):
        assert f"note: {ignored} has no effect" in err


@pytest.mark.parametrize(
    "keys", ["--json-keys text title", "--json-keys text,title", "--key text --key title", "'preprocess.json_keys=[text,title]'"]
)
def test_several_keys_as_people_type_them(yuan, defaults, keys):
    code, _, err = yuan(f"preprocess {keys} --input data/both.jsonl --workers 1 --no-append-eod")
    assert code == 0, err
    assert IndexedReader("data/my-gpt2_text_document").documents == 2
    title = IndexedReader("data/my-gpt2_title_document")
    assert (title.documents, title.sequences) == (2, 1)


def test_null_tokenizer_and_what_to_type_next(yuan, defaults, tmp_path):
    write_jsonl(tmp_path / "data" / "ids.jsonl", [{"text": "5 70000"}])
    code, out, err = yuan("preprocess recipe=345m_4dp --input data/ids.jsonl --tokenizer-type NullTokenizer --vocab-size 70001 --workers 1")
    assert code == 0, err
    reader = IndexedReader("data/my-gpt2_text_document")
    assert reader.dtype == np.int32 and reader.get(0).tolist() == [5, 70000, 70001]
    assert "yuan pretrain recipe=345m_4dp data.data_path=data/my-gpt2_text_document tokenizer.type=NullTokenizer tokenizer.vocab_size=70001\n" in out


def test_after_a_share_comes_the_merge_and_what_it_says_works(yuan, defaults):
    for share in "0/2", "1/2":
        code, out, err = yuan(f"preprocess --workers 1 --shard {share}")
        assert code == 0, err
    command = out.splitlines()[-1].partition("next       the other shares, then: yuan ")[2]
    assert yuan(command)[0] == 0 and IndexedReader("data/my-gpt2_text_document").documents == 2


def test_rows_stopped_by_ctrl_c_go_on_and_what_comes_next_has_all_words(yuan, defaults, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1+1", "completion": "2"}])
    line = "preprocess recipe=345m_1dp data.data_path=null data.train=rows.jsonl tokenizer.chat_template=plain --format jsonl"

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("data_tools.sft.prepare", stopped)
        code, out, err = yuan(line)
    assert (code, out, err) == (3, "", "stopped    what is prepared is kept in cache; the same command goes on\n")
    code, out, err = yuan(line)
    assert code == 0 and out.splitlines()[-1] == (
        "next       yuan sft recipe=345m_1dp data.data_path=null data.train=rows.jsonl tokenizer.chat_template=plain preprocess.format=jsonl"
    ), err


def test_everything_missing_is_named_at_once(yuan, tmp_path):
    code, out, err = yuan("preprocess")
    assert code == 2 and out == "" and not list(tmp_path.iterdir())
    assert "no such file: data/corpus.jsonl" in err and "python examples/make_corpus.py data/corpus.jsonl" in err
    assert "no such file: data/gpt2-vocab.json" in err and "openai-community/gpt2" in err and "yuan tokenizer train" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--tokenizer-model x.model", "tokenizer.tokenizer_model is of no use to GPT2BPETokenizer"),
        ("--tokenizer-type NullTokenizer", "NullTokenizer needs a vocab_size"),
        ("--tokenizer-type SentencePieceTokenizer", "tokenizer.tokenizer_model is not given"),
        ("--tokenizer-type BertTokenizer", "tokenizer.type must be"),
        ("preprocess.output_prefix=null", "preprocess.output_prefix is not given"),
        ("--input nothing", "no such file: nothing"),
        ("preprocess.workers=-1", "preprocess.workers must be at least 1, not -1"),
        ("--json-keys text text", "each key once"),
        ("--key headline", "no key 'headline'"),
        ("preproces.input=x", "unknown key preproces.input"),
    ],
)
def test_refusals(yuan, defaults, tmp_path, words, says):
    code, _, err = yuan(f"preprocess {words}" + ("" if "workers" in words else " --workers 1"))
    assert code == 2 and says in err and "fix:" in err and "Traceback" not in err
    assert not list(tmp_path.glob("data/my-gpt2*"))


def test_a_bad_line_leaves_the_old_output(yuan, defaults, tmp_path):
    assert yuan("preprocess --workers 1")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("data/my-gpt2*")}
    with open("data/corpus.jsonl", "a") as file:
        file.write("not json\n")
    code, out, err = yuan("preprocess --workers 1")
    assert code == 2 and "replaces the one there" in out
    assert "where: data/corpus.jsonl:3" in err and "not json" in err
    assert {path: path.read_bytes() for path in tmp_path.glob("data/my-gpt2*")} == before
