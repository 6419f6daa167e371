"""`yuan tokenizer train | show` as typed, and the example corpus that the quickstart trains one on."""

import base64
import gzip
import hashlib
import json
import subprocess
import sys

import pytest

from data_tools.tokenizers import build_tokenizer
from tests.data_tools.samples import HARD_TEXTS, ROOT, write_jsonl, yuan_model


def yuan(*words, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launcher.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONUTF8": "1"})


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_train_then_show(tmp_path, suffix):
    if suffix == "jsonl":
        write_jsonl(tmp_path / "in.jsonl", [{"body": text} for text in HARD_TEXTS])
    else:
        (tmp_path / "in.txt").write_text("\n".join(HARD_TEXTS), encoding="utf-8", newline="")
    words = ["--input", f"in.{suffix}", "--output-prefix", "new/sp", "--vocab-size", 330, "--json-key", "body"]
    trained = yuan("tokenizer", "train", *words, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "yuan preprocess --tokenizer-type SentencePieceTokenizer --tokenizer-model new/sp.model" in trained.stdout
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=tmp_path / "new" / "sp.model")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sp.model"]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in HARD_TEXTS] == HARD_TEXTS

    words = ["tokenizer.type=SentencePieceTokenizer", "--tokenizer-model", "new/sp.model", "--text", "be  好\n"]
    shown = yuan("tokenizer", "show", *words, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert tokenizer.hash() in shown.stdout and "vocab_size  330\n" in shown.stdout and "eod         2\n" in shown.stdout
    assert [int(line.split()[0]) for line in shown.stdout.splitlines() if line.startswith("  ")] == tokenizer.encode("be  好\n")
    assert "comes back as it was" in shown.stdout


def test_train_byte_level_bpe_from_several_compressed_inputs_then_show(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in HARD_TEXTS[:5]])
    (tmp_path / "rest.txt.gz").write_bytes(gzip.compress("\n".join(HARD_TEXTS[5:]).encode()))
    words = ["--input", "in.jsonl", "--input", "rest.txt.gz", "--output-prefix", "new/bpe", "--vocab-size", 330]
    trained = yuan("tokenizer", "train", "--tokenizer-type", "GPT2BPETokenizer", *words, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    files = {"vocab_file": "new/bpe/vocab.json", "merge_file": "new/bpe/merges.txt"}
    assert f"--vocab-file {files['vocab_file']} --merge-file {files['merge_file']} --input in.jsonl --input rest.txt.gz" in trained.stdout
    folder = tmp_path / "new" / "bpe"
    assert sorted(path.name for path in folder.iterdir()) == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    tokenizer = build_tokenizer("GPT2BPETokenizer", **{key: tmp_path / path for key, path in files.items()})
    assert [tokenizer.decode(tokenizer.encode(text)) for text in HARD_TEXTS] == HARD_TEXTS

    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "new/bpe", "parallel.tensor_model_parallel_size=2"]
    shown = yuan("tokenizer", "show", *words, "--text", "to be<|endoftext|>", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for line in ("HuggingFaceTokenizer by gigatoken", "padded      512, a multiple of 128 x TP 2", "special         329 <|endoftext|>"):
        assert line in shown.stdout
    assert "    329 '<|endoftext|>'\n" in shown.stdout


def test_show_tells_yuans_special_ids(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(yuan_model())
    shown = yuan("tokenizer", "show", "--tokenizer-type", "YuanTokenizer", "--tokenizer-model", ".", "--text", "a<sep>b", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "special         369 <sep>\n" in shown.stdout and "special         486 <FIM_MIDDLE>\n" in shown.stdout
    assert "    369 '<sep>'\n" in shown.stdout and "comes back as it was" in shown.stdout


def test_a_long_list_of_special_ids_is_cut_short(tmp_path):
    tokens = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": ""} for i in range(256)]
    (tmp_path / "bytes.json").write_text(json.dumps(tokens))
    shown = yuan("tokenizer", "show", "--tokenizer-type", "TikTokenizer", "--tokenizer-model", "bytes.json", "--text", "a", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "TikTokenizer by tiktoken" in shown.stdout and "and 976 more, to 999" in shown.stdout and "   1097 'a'" in shown.stdout


def test_refusals(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    (tmp_path / "in.txt").write_bytes(b"fine\ncaf\xe9\n")
    for source, says in (("no.jsonl", "no such file: no.jsonl"), ("in.jsonl", "where: in.jsonl:2"), ("in.txt", "where: in.txt:2")):
        refused = yuan("tokenizer", "train", "--input", source, "--output-prefix", "sp", cwd=tmp_path)
        assert refused.returncode == 2 and says in refused.stderr and "Traceback" not in refused.stderr
    small = yuan("tokenizer", "train", "--input", "in.jsonl", "--vocab-size", 32000, "--output-prefix", "sp", cwd=tmp_path)
    assert small.returncode == 2
    assert not list(tmp_path.glob("sp*"))
    bad = yuan("tokenizer", "show", "--tokenizer-type", "NullTokenizer", "--vocab-size", 5, "--text", "9", cwd=tmp_path)
    assert bad.returncode == 2 and "id 9 is outside the vocabulary" in bad.stderr
    half = yuan("tokenizer", "show", "--tokenizer-type", "NullTokenizer", "--vocab-size", 5, "--text", "a\udcff", cwd=tmp_path)
    assert half.returncode == 2 and "half of a surrogate pair" in half.stderr


def test_example_corpus_is_reproducible_and_within_its_limit(tmp_path):
    digests = []
    for name in ("a", "b"):
        command = [sys.executable, ROOT / "examples" / "make_corpus.py", tmp_path / name, "--max-mb", "0.6"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    texts = [json.loads(line)["text"] for line in (tmp_path / "a").read_text(encoding="utf-8").splitlines()]
    assert digests[0] == digests[1]
    assert len(set(texts)) == len(texts) and f"{len(texts):,} documents" in said
    assert 0.5e6 < (tmp_path / "a").stat().st_size <= 0.6e6
    assert any("Boolean operations" in text for text in texts)  # a topic of `help()`
