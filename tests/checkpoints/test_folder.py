"""Folders of checkpoints: what counts as one, which is the newest, and that a death at any moment leaves a whole one."""

import shutil

import pytest

from checkpoints import folder as folders
from checkpoints.folder import TRACKER, CheckpointError, begin, commit, keep_last, newest_checkpoint, whole_checkpoints


def write(folder, iteration: int):
    part = begin(folder, iteration)
    (part / "weights").write_text(str(iteration))
    return commit(part)


def test_a_checkpoint_counts_when_it_is_whole(tmp_path):
    part = begin(tmp_path, 1000)
    (part / "weights").write_text("half")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path)
    assert whole_checkpoints(tmp_path) == []
    assert commit(part) == newest_checkpoint(tmp_path) == tmp_path / "iter_0001000"
    assert (tmp_path / TRACKER).read_text() == "1000"


@pytest.mark.parametrize("dies_in", ["flush_one", "Path.rename", "Path.replace"])
def test_a_writer_that_dies_leaves_the_one_before(tmp_path, monkeypatch, dies_in):
    write(tmp_path, 1)
    part = begin(tmp_path, 2)
    (part / "weights").write_text("2")

    def die(*_):
        raise KeyboardInterrupt

    owner, name = (folders.Path, dies_in.removeprefix("Path.")) if "." in dies_in else (folders, dies_in)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(KeyboardInterrupt):
            commit(part)
    assert newest_checkpoint(tmp_path).name == "iter_0000001"
    assert write(tmp_path, 2) == newest_checkpoint(tmp_path)
    assert (tmp_path / "iter_0000002" / "weights").read_text() == "2"


def test_a_path_may_be_a_run_a_folder_of_checkpoints_or_one_of_them(tmp_path):
    whole = write(tmp_path / "run" / "checkpoints", 7)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", whole):
        assert newest_checkpoint(path) == whole


def test_names_that_no_terminal_shows_are_told():
    assert str(CheckpointError("layers.\ud800\x1b[31m: é\n    层")) == "layers.\\ud800\\x1b[31m: é\n    层"


def test_megatron_lms_release_is_a_checkpoint(tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / TRACKER).write_text("release\n")
    assert newest_checkpoint(tmp_path).name == "release" and folders.iteration_of(newest_checkpoint(tmp_path)) == 0


@pytest.mark.parametrize(("text", "message"), [("12x", "holds '12x'"), ("9", r"iter_0000009, which is not there \(there: iter_0000001\)")])
def test_a_tracker_that_is_wrong_is_named(tmp_path, text, message):
    write(tmp_path, 1)
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        newest_checkpoint(tmp_path)


def test_keeping_the_last_never_removes_the_newest_whole_one(tmp_path):
    for iteration in (1, 2, 3, 10):
        write(tmp_path, iteration)
    assert [path.name for path in keep_last(tmp_path, 2)] == ["iter_0000001", "iter_0000002"]
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["iter_0000003", "iter_0000010"]
    (tmp_path / TRACKER).write_text("3")  # set back by a person: then this one stays too
    keep_last(tmp_path, 1)
    assert newest_checkpoint(tmp_path).name == "iter_0000003" and len(whole_checkpoints(tmp_path)) == 2
    shutil.rmtree(tmp_path / "iter_0000010")
    assert keep_last(tmp_path, 1) == []
