"""A run that is killed at any moment, and the run after it: what looks whole is whole, and the second run's bytes are those of a
run that nobody disturbed. Also a full disk, and two runs at once."""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.indexed import IndexedReader
from data_tools.preprocess import preprocess
from data_tools.tokenizers import build_tokenizer
from tests.data_tools.samples import write_jsonl

NULL = build_tokenizer("NullTokenizer", vocab_size=100)
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
OPTIONS = {"json_keys": ["text", "title"], "append_eod": True, "part_bytes": 500}


def _killed_at(moment: int, folder: Path) -> None:
    """Preprocess, and be killed before the file system is touched for the `moment`-th time in the folder."""
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda file: None  # which takes most of the time, and saves nothing from a kill
    sys.addaudithook(count)
    preprocess(folder / "in", folder / "out", NULL, **OPTIONS)


def _killed_after_two_parts(folder: Path) -> None:
    parts = itertools.count(1)
    preprocess(folder / "in", folder / "out", NULL, **OPTIONS, progress=lambda _: next(parts) == 2 and os.kill(os.getpid(), signal.SIGKILL))


def _files(folder: Path, prefix: str) -> dict[str, bytes]:
    return {path.name.removeprefix(prefix): path.read_bytes() for path in folder.glob(f"{prefix}_*") if path.suffix not in (".part", ".lock")}


def _write(folder: Path, name: str, second: int) -> None:
    write_jsonl(folder / name, [{"text": f"{i % 10} {second}", "title": f"{second}"} for i in range(40)])


def test_killed_at_any_moment_and_run_again(tmp_path, apart, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    _write(tmp_path, "in", 1)
    write_jsonl(tmp_path / "older", [{"text": "5", "title": "6"}])
    preprocess(tmp_path / "in", tmp_path / "whole", NULL, **OPTIONS)
    preprocess(tmp_path / "older", tmp_path / "old", NULL, **OPTIONS)
    whole, old = _files(tmp_path, "whole"), _files(tmp_path, "old")
    for moment in range(1, 1000):
        for name, content in old.items():
            (tmp_path / f"out{name}").write_bytes(content)
        if apart(_killed_at, moment, tmp_path) == 0:
            break
        here = _files(tmp_path, "out")
        for index in (name for name in here if name.endswith(".idx")):
            pair = (index, index.replace(".idx", ".bin"), index.replace(".idx", ".json"))
            assert [here.get(name) for name in pair] in ([whole[name] for name in pair], [old[name] for name in pair]), (moment, index)
        preprocess(tmp_path / "in", tmp_path / "out", NULL, **OPTIONS)
        assert _files(tmp_path, "out") == whole, moment
        assert not (tmp_path / "out.unfinished").exists(), moment
    assert 40 < moment < 999


def test_input_that_changed_between_killed_runs_is_not_mixed(tmp_path, apart, monkeypatch):
    """Of the same size, so that only the text tells: one text, killed late; another, killed at any moment; the first again."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    _write(tmp_path, "in", 1)
    first = (tmp_path / "in").read_bytes()
    preprocess(tmp_path / "in", tmp_path / "whole", NULL, **OPTIONS)
    whole = _files(tmp_path, "whole")
    assert apart(_killed_after_two_parts, tmp_path) == -signal.SIGKILL
    (tmp_path / "out.unfinished").rename(tmp_path / "before")
    assert len(list((tmp_path / "before").glob("0*.json"))) == 2
    for moment in range(1, 1000):
        shutil.rmtree(tmp_path / "out.unfinished", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "out.unfinished")
        _write(tmp_path, "in", 2)
        if apart(_killed_at, moment, tmp_path) == 0:
            break
        (tmp_path / "in").write_bytes(first)
        preprocess(tmp_path / "in", tmp_path / "out", NULL, **OPTIONS)
        assert _files(tmp_path, "out") == whole, moment
    assert 40 < moment < 999


def _in_little_space(folder: Path, largest: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        preprocess(folder / "in", folder / "out", NULL, part_bytes=2000)
    except OSError:
        sys.exit(3)


def test_a_full_disk_leaves_what_was_there_and_nothing_half_made(tmp_path, apart):
    write_jsonl(tmp_path / "older", [{"text": "5"}])
    write_jsonl(tmp_path / "in", [{"text": f"{i % 100} 7"} for i in range(2000)])
    preprocess(tmp_path / "in", tmp_path / "whole", NULL, part_bytes=2000)
    for largest in (300, 3000, 7999, 30000, 39999):  # a part's tokens, its sizes, the joined tokens (8,000), the index (40,000)
        preprocess(tmp_path / "older", tmp_path / "out", NULL)
        old = _files(tmp_path, "out")
        assert apart(_in_little_space, tmp_path, largest) == 3, largest
        assert _files(tmp_path, "out") == old, largest
        assert not list(tmp_path.glob("*.part")), largest
        preprocess(tmp_path / "in", tmp_path / "out", NULL, part_bytes=2000)
        assert IndexedReader(tmp_path / "out_text_document").tokens == 4000


def test_a_second_run_for_the_same_prefix_is_refused(tmp_path):
    """With other keys too, as what is unfinished is of the prefix."""
    _write(tmp_path, "in", 1)
    refused = []

    def meanwhile(counts):
        for keys in (["title"], ["text", "title"], ["text"]):
            with pytest.raises(DataError, match="another process is writing this output"):
                preprocess(tmp_path / "in", tmp_path / "out", NULL, json_keys=keys)
            refused.append(keys)

    preprocess(tmp_path / "in", tmp_path / "out", NULL, json_keys=["text"], part_bytes=1 << 20, progress=meanwhile)
    assert len(refused) == 3
    assert json.loads((tmp_path / "out_text_document.json").read_text())["documents"] == 40
