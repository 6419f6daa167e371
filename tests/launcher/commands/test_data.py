"""`yuan data` as typed: what it shows, what it writes, what it refuses; the sample index that a training then finds."""

import json
import shutil

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_tools.indexed import IndexedReader, bin_path, idx_path
from tests.data_tools.samples import write_jsonl
from tests.data_tools.test_indexed import write
from tests.launcher.commands.test_preprocess import defaults, yuan  # noqa: F401  fixtures
from tests.launcher.engine.runs import SMALL, losses
from tests.launcher.engine.runs import yuan as typed


@pytest.fixture
def corpus(yuan, defaults, tmp_path):  # noqa: F811
    """data/my-gpt2_text_document with 40 documents, one of them empty, from the packaged recipe `preprocess`."""
    texts = ["To be, or not to be\n" * i + "\x1b[31m今天" for i in range(39)] + [""]
    write_jsonl(tmp_path / "data" / "corpus.jsonl", [{"text": text} for text in texts])
    assert yuan("preprocess --workers 1")[0] == 0
    return "data/my-gpt2_text_document"


def test_inspect_shows_counts_lengths_and_a_document(yuan, corpus):  # noqa: F811
    reader = IndexedReader(corpus)
    code, out, err = yuan(f"data inspect {corpus} --document 2")
    assert code == 0, err
    assert f"40 documents (1 of them empty), 39 sequences, {reader.tokens:,} tokens" in out
    assert "GPT2BPETokenizer, 300 ids" in out and "every document ends with 299" in out and "made of    data/corpus.jsonl, under text" in out
    assert "uint16, largest id 299" in out
    text = out.split("document 2:")[1]
    assert text.count("To be, or not to be\n") == 2 and r"\x1b[31m今天<|endoftext|>" in text and "\x1b" not in out
    assert f"{len(reader.document(2)[0])} tokens" in text
    assert max(map(len, out.split("\n"))) <= 100
    rows = [line.split() for line in out.split("document 2:")[0].split("percentiles")[1].split("\n")[1:-1]]
    counted = {row[0].replace(",", ""): int(row[-1].replace(",", "")) for row in rows}
    lengths = [sum(map(len, reader.document(i))) for i in range(40)]
    for name, count in counted.items():
        low, _, high = name.partition("-")
        assert count == sum(int(low) <= length <= int(high or low) for length in lengths), name
    assert sum(counted.values()) == 40
    assert f"50 % {sorted(lengths)[20]:,}," in out and f"{max(lengths):,} at most" in out


def test_inspect_without_a_manifest_and_with_another_tokenizer(yuan, corpus):  # noqa: F811
    (bin_path(corpus).with_suffix(".json")).unlink()
    code, out, _ = yuan(f"data inspect {corpus}.idx")
    assert code == 0 and "left no manifest" in out and "as text with its tokenizer" in out
    first = IndexedReader(corpus).document(0)[0].tolist()
    assert f"  {' '.join(map(str, first))}\n" in out
    assert "今天<|endoftext|>" in yuan(f"data inspect {corpus} recipe=345m_1dp")[1]
    code, _, err = yuan(f"data inspect {corpus} --tokenizer-type NullTokenizer --vocab-size 5")
    assert code == 2 and "this NullTokenizer has 6 ids" in err
    code, _, err = yuan(f"data inspect {corpus} --document 40")
    assert code == 2 and "--document 0 to 39" in err
    code, out, _ = yuan(f"data inspect {corpus} recipe=345m_1dp --document 39")
    assert code == 0 and out.endswith("document 39: 0 tokens\n")


def test_a_long_document_is_cut_and_shown_whole_when_asked(yuan, corpus):  # noqa: F811
    length = len(IndexedReader(corpus).document(38)[0])
    code, out, _ = yuan(f"data inspect {corpus} --document 38")
    assert code == 0 and f"... {length - 32:,} more (--all)" in out
    code, out, _ = yuan(f"data inspect {corpus} --document 38 --all")
    assert "more (--all)" not in out and out.split("document 38:")[1].count("To be, or not to be\n") == 38


def test_verify_names_each_fault_and_ends_with_2(yuan, corpus):  # noqa: F811
    code, out, err = yuan(f"data verify {corpus} --inputs")
    assert (code, err) == (0, "") and f"whole      {corpus}: 40 documents" in out
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus}{suffix}", f"data/torn{suffix}")
    with open("data/torn.bin", "r+b") as file:
        file.truncate(100)
    code, out, err = yuan("data verify data")
    assert code == 2 and f"whole      {corpus}" in out and "not whole  data/torn: 1 fault" in out
    assert "where: data/torn.bin" in err and "100 bytes where the .idx speaks of" in err and "yuan data repair" in err
    code, _, err = yuan(f"data verify {corpus} --vocab-size 299")
    assert code == 2 and "39 ids outside the vocabulary of 299, the first is 299" in err
    assert yuan("data verify nothing")[0] == 2


def test_repair_asks_before_it_loses(yuan, corpus):  # noqa: F811
    with open(f"{corpus}.bin", "r+b") as file:
        file.truncate(100)
    code, _, err = yuan(f"data repair {corpus} --output data/new")
    assert code == 2 and "not all can be kept" in err and "--accept-loss" in err and not idx_path("data/new").exists()
    code, out, _ = yuan(f"data repair {corpus} --output data/new --accept-loss")
    assert code == 0 and "lost       the .bin is cut off, 100 of" in out
    code, out, _ = yuan("data verify data/new")
    assert code == 0 and "whole" in out
    assert "repaired   the .bin is cut off" in yuan("data inspect data/new")[1]
    code, _, err = yuan("data repair data/new --output data/newer")
    assert code == 2 and "nothing to mend" in err
    code, _, err = yuan("data repair data/new --output data/new.idx")
    assert code == 2 and "only copy" in err


def test_shards_merged_are_the_whole_and_megatrons(yuan, corpus):  # noqa: F811
    for i in range(3):
        assert yuan(f"preprocess --workers 1 --shard {i}/3 --output-prefix shards/sh")[0] == 0
    code, out, err = yuan("data merge shards --output merged/all")
    assert code == 0, err
    assert "merging    3 pairs, shards/sh_00000-of-00003_text_document to shards/sh_00002-of-00003_text_document" in out
    theirs = IndexedDatasetBuilder("theirs.bin", dtype=np.uint16)
    for i in range(3):
        theirs.add_index(f"shards/sh_{i:05d}-of-00003_text_document")
    theirs.finalize("theirs.idx")
    for path in (bin_path, idx_path):
        assert path("merged/all").read_bytes() == path(corpus).read_bytes() == path("theirs").read_bytes()
    assert yuan("data verify merged/all --inputs")[0] == 0
    assert "merged     3 pairs" in yuan("data inspect merged/all")[1]
    code, _, err = yuan("data merge shards/sh_00000-of-00003_text_document shards/sh_00002-of-00003_text_document --output x")
    assert code == 2 and "1 of 3 shards missing: shards/sh_00001-of-00003_text_document" in err and "--shard 1/3" in err


@pytest.fixture
def small(yuan, tmp_path):  # noqa: F811
    """The small recipe and data for it, made by `yuan preprocess recipe=small`, which indexes them too; what that said."""
    (tmp_path / "recipes").mkdir()
    recipe = SMALL.replace("data_path: ids", "data_path: ids_text_document") + "preprocess: {input: c.jsonl, output_prefix: ids, workers: 1}\n"
    (tmp_path / "recipes" / "small.yaml").write_text(recipe)
    write_jsonl(tmp_path / "c.jsonl", [{"text": " ".join(str((i + j) % 255) for j in range(60))} for i in range(60)])
    code, out, err = yuan("preprocess recipe=small")
    assert code == 0, err
    return out


def test_preprocess_builds_the_index_of_its_recipe(yuan, small, tmp_path):  # noqa: F811
    assert "index      cache/" in small and "built in" in small and small.index("index") < small.index("next")
    assert len(list(tmp_path.glob("cache/*/*"))) == 3 * 4 + 1 and not list(tmp_path.glob("cache/*.part"))
    assert "(built)" in yuan("check recipe=small")[1] and "(built)" in yuan("pretrain recipe=small --dry-run")[2]
    assert "it is there" in yuan("data index recipe=small")[1]
    for other in ("training.seq_length=16", "training.seed=5", "data.split=80,10,10", "training.train_iters=9"):
        assert "not there yet" in yuan(f"check recipe=small {other}")[1], other
    shutil.move("ids_text_document.bin", "other.bin")
    shutil.move("ids_text_document.idx", "other.idx")
    write(tmp_path / "ids_text_document", [[list(range(61))] for _ in range(60)])
    assert "not there yet" in yuan("check recipe=small")[1]  # other lengths under the same name


def test_a_torn_index_is_built_anew(yuan, small, tmp_path):  # noqa: F811
    torn = next(tmp_path.glob("cache/*/*train-sample_index.npy"))
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-4])
    assert "not there yet" in yuan("check recipe=small")[1]
    assert "built in" in yuan("data index recipe=small")[1] and torn.read_bytes() == whole
    [note] = torn.parent.glob("*.json")
    assert list(json.loads(note.read_text())) == sorted(path.name for path in torn.parent.iterdir() if path != note)


def test_a_training_finds_the_index_of_its_blend(yuan, small, tmp_path):  # noqa: F811
    def files() -> dict:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("blend/*/*")}

    write(tmp_path / "sevens", [[[7] * 100] for _ in range(60)])
    words = ["recipe=small", "data.data_path=[0.5,ids_text_document,0.5,sevens]", "data.data_cache_path=blend"]
    assert "built in" in yuan(f"data index {' '.join(words)}")[1]
    before = files()
    assert sum("BlendedDataset" in path.name for path in before) == 3 * 3
    done = typed(tmp_path, "pretrain", *words, "run.name=found")
    assert "(built)" in done.stderr and files() == before
    shutil.rmtree("blend")  # and the training is the same one where it builds the index itself
    done = typed(tmp_path, "pretrain", *words, "run.name=made")
    assert "not there yet" in done.stderr and set(files()) == set(before) and losses(tmp_path, "made") == losses(tmp_path, "found")


def test_what_cannot_be_indexed_says_why(yuan, tmp_path):  # noqa: F811
    write(tmp_path / "two", [[[1, 2, 3]], [[4]]])
    words = "model.num_layers=1 tokenizer.type=NullTokenizer tokenizer.vocab_size=50 tokenizer.vocab_file=null tokenizer.merge_file=null"
    code, _, err = yuan(f"data index recipe=345m_1dp data.data_path=two {words}")
    assert code == 2 and "comes to no token" in err and "Traceback" not in err
    code, _, err = yuan(f"data index recipe=345m_1dp {words}")
    assert code == 2 and "no such file: data/my-gpt2_text_document.bin" in err
    (tmp_path / "file").write_text("")
    write(tmp_path / "many", [[[1, 2, 3] * 50] for _ in range(2000)])
    line = "data index recipe=345m_1dp data.data_path=many data.data_cache_path=file/x training.train_iters=10 optimizer.lr_decay_iters=null"
    code, _, err = yuan(f"{line} {words}")
    assert code == 2 and "the sample index cannot be written" in err and "data.data_cache_path=ANOTHER_FOLDER" in err
