"""A conversion that is killed at any moment, and the one after it; several processes and several machines: the bytes are always
those of one process that nobody disturbed."""

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from checkpoints import journal  # noqa: E402
from checkpoints.convert import Wanted, convert, open_source  # noqa: E402
from checkpoints.folder import CheckpointError  # noqa: E402
from checkpoints.formats import base, hf, torch_dist_target  # noqa: E402
from checkpoints.part import Part, Stopped  # noqa: E402
from checkpoints.quantize import Quantized  # noqa: E402
from checkpoints.recognise import recognise  # noqa: E402
from data_tools.lock import Lock  # noqa: E402
from launcher.cli import app  # noqa: E402
from launcher.errors import UserError  # noqa: E402
from tests.checkpoints import mindspore_fixtures  # noqa: E402
from tests.checkpoints.folders import LLAMA, llama_tensors, write  # noqa: E402

torch.cat([torch.empty(2, device="meta")] * 2)  # once here, and not in each process: the first takes 0.4 s
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
KINDS = {
    "hf": Wanted("hf"), "torch": Wanted("torch", tensor=2, pipeline=2), "torch_dist": Wanted("torch_dist"),
    "mindspore": Wanted("mindspore", tensor=2, fused_layout="concat"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch):
    _small_and_fast(monkeypatch.setattr)


def _small_and_fast(set_) -> None:
    """Several files of each format; every tensor is noted at once. Flushing takes most of the time, and saves nothing from a kill."""
    set_(os, "fsync", lambda file: None)
    set_(hf, "_SHARD_BYTES", 1500)
    set_(torch_dist_target, "_FILE_BYTES", 3000)
    set_(journal, "SYNC_SECONDS", 0.0)


def _source(folder: Path):
    return open_source(recognise(folder / "hf"))


def _carry(weights: Path) -> None:
    with open(weights / "note.txt", "w") as file:
        file.write("what goes with the weights")


def _convert(folder: Path, kind: str, name: str = "out", **more):
    return convert(_source(folder), folder / name, KINDS[kind], _carry, **more)


def _killed_at(moment: int, folder: Path, kind: str) -> None:
    """Convert, and be killed before the file system is touched for the `moment`-th time in the target's folder."""
    torch.set_num_threads(1)
    _small_and_fast(setattr)
    seen, write_at = itertools.count(1), os.pwrite

    def count() -> None:
        if next(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def pwrite(*arguments) -> int:
        count()
        return write_at(*arguments)

    os.pwrite = pwrite
    sys.addaudithook(lambda event, arguments: count() if event in EVENTS and str(folder / "out") in str(arguments[0]) else None)
    _convert(folder, kind)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment_and_run_again(tmp_path, apart, kind):
    write(tmp_path / "hf", LLAMA, llama_tensors(), shards=2)
    _convert(tmp_path, kind, "whole")
    whole, kept = _files(tmp_path / "whole"), []
    assert len([name for name in whole if name.endswith((".safetensors", ".pt", ".distcp", ".ckpt"))]) > 1 and "note.txt" in str(whole)
    for moment in range(1, 1000, 5):  # there are some 160 to 370
        if apart(_killed_at, moment, tmp_path, kind) == 0:
            break
        if (tmp_path / "out").exists():
            assert _files(tmp_path / "out") == whole, moment
        else:
            told = []
            _convert(tmp_path, kind, tell=lambda *words: told.append(words))
            kept += [text for what, text in told if what == "kept"]
            assert _files(tmp_path / "out") == whole, moment
            assert not (tmp_path / "out.part").exists(), moment
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "out.part", ignore_errors=True)
    assert 100 < moment < 999 and len(set(kept)) > 3, (moment, kept)


def _yuan(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["convert", *map(str, words)])
    if isinstance(done.exception, Exception) and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_ctrl_c_and_the_same_command_again_or_another(tmp_path, monkeypatch):
    source = write(tmp_path / "hf", LLAMA, llama_tensors())
    put, puts = base.Target.put, []

    def until(count: int):
        def stopped(self, tensor, whole) -> None:
            if len(puts) == count:
                raise KeyboardInterrupt
            puts.append(tensor.name)
            put(self, tensor, whole)

        return stopped

    monkeypatch.setattr(base.Target, "put", until(6))
    assert "what is written is kept in" in _yuan(source, tmp_path / "out", code=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out.part"]
    monkeypatch.setattr(base.Target, "put", until(99))
    for words, mend, told in (
        ((), None, "kept       6 of 15 tensors, 0.0 MB"),
        (("--dtype", "bf16"), None, "anew       dtype was None, and is bf16"),
        ((), lambda: os.utime(source / "model.safetensors", (1, 1)), "model.safetensors has changed since"),
    ):
        shutil.copytree(tmp_path / "out.part", tmp_path / "left")
        if mend:
            mend()
        puts.clear()
        assert told in _yuan(source, tmp_path / "out", *words)
        assert len(puts) == (9 if "kept" in told else 15)
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "left").rename(tmp_path / "out.part")


def test_a_file_that_was_lost_and_a_line_that_was_cut_off(tmp_path):
    write(tmp_path / "hf", LLAMA, llama_tensors())
    _convert(tmp_path, "torch", "whole")

    def stop(what: str, count: int) -> None:
        if next(calls) == 5:
            raise KeyboardInterrupt

    calls = itertools.count()
    with pytest.raises(KeyboardInterrupt):
        _convert(tmp_path, "torch", progress=stop)
    noted = tmp_path / "out.part" / ".written.0-of-1"
    noted.write_bytes(noted.read_bytes()[:-5])
    told = []
    shutil.copytree(tmp_path / "out.part", tmp_path / "again.part")
    _convert(tmp_path, "torch", tell=lambda *words: told.append(words))
    assert [what for what, _ in told] == ["kept"] and told[0][1].startswith("4 of 15")
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    (tmp_path / "again.part" / "checkpoint" / "release" / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    _convert(tmp_path, "torch", "again", tell=lambda *words: told.append(words))
    assert told[-1] == ("anew", "mp_rank_01_001/model_optim_rng.pt was being written, and is gone")
    assert _files(tmp_path / "again") == _files(tmp_path / "whole")


def test_what_reads_back_otherwise_than_written_begins_anew(tmp_path, monkeypatch):
    write(tmp_path / "hf", LLAMA, llama_tensors())
    written = base.Target.put
    monkeypatch.setattr(base.Target, "put", lambda self, tensor, whole: written(self, tensor, whole + 1 if "layers.1" in tensor.name else whole))
    with pytest.raises(CheckpointError, match="layers.1.* and 4 more read back otherwise|read back otherwise than written"):
        _convert(tmp_path, "torch_dist")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_shares_on_several_machines(tmp_path):
    write(tmp_path / "hf", LLAMA, llama_tensors())
    _convert(tmp_path, "torch", "whole")
    told = []
    for shard in ((2, 3), (0, 3)):
        assert _convert(tmp_path, "torch", shard=shard, tell=lambda *words: told.append(words)) is None
        assert not (tmp_path / "out").exists()
    assert told[-1][0] == "shares" and "of 15 tensors are written; the share that ends last" in told[-1][1]
    shutil.copytree(tmp_path / "out.part", tmp_path / "other.part")
    assert len(_convert(tmp_path, "torch", shard=(1, 3))) == 15
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    # One machine was lost: another, which writes all there is, takes what the others have written.
    busy = Lock(tmp_path / "other.1-of-3.lock")
    with pytest.raises(CheckpointError, match="another process is writing share 1/3"):
        _convert(tmp_path, "torch", "other")
    with pytest.raises(CheckpointError, match="another process is writing this output.*share 1/3"):
        _convert(tmp_path, "torch", "other", shard=(1, 3))
    busy.release()
    _convert(tmp_path, "torch", "other", tell=lambda *words: told.append(words))
    assert told[-1][0] == "kept" and _files(tmp_path / "other") == _files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "other", "out", "whole"]


def test_a_share_that_waited_until_all_was_done_begins_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("whole")
    part = Part(tmp_path / "out", (1, 2))
    with pytest.raises(CheckpointError, match="out is there already"), part.begun({}, lambda what, text: None):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_workers_write_the_same_bytes_and_int8_becomes_bf16(tmp_path, monkeypatch):
    """Two processes, of weights that are quantized on the way: a scale is made with its weight, whoever writes it."""
    monkeypatch.setattr(torch_dist_target, "_FILE_BYTES", 4 << 30)  # the workers know of no smaller ones
    source = write(tmp_path / "hf", LLAMA, {name: one.bfloat16() for name, one in llama_tensors().items()})
    _yuan(source, tmp_path / "one" / "int8", "--quantize", "int8")
    said = _yuan(source, tmp_path / "two" / "int8", "--quantize", "int8", "--workers", 2)
    assert _files(tmp_path / "one") == _files(tmp_path / "two") and "error      |w - scale q| / |w|" in said
    said = _yuan(tmp_path / "one" / "int8", tmp_path / "bf16", "--to", "hf")
    assert "warning" in said and "int8 weights, which hf has not" in said and "rounded to bf16" in said
    numbers = Quantized(_source(tmp_path))
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    wanted = (numbers.read(name).float() * numbers.read(name + "_scale")[:, None]).bfloat16()
    assert torch.equal(open_source(recognise(tmp_path / "bf16")).read(name), wanted)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_room_is_that_of_what_is_written(tmp_path, monkeypatch):
    write(tmp_path / "hf", LLAMA, llama_tensors())
    needed = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    usage = partial(type("Usage", (), {}))
    usage.free = needed * 3 // 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="the converted checkpoint takes .*, and .* are free in|are free there"):
        _yuan(tmp_path / "hf", tmp_path / "out", "--to", "hf")
    _yuan(tmp_path / "hf", tmp_path / "half", "--to", "hf", "--dtype", "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "hf"]


def test_a_source_that_is_read_otherwise_begins_anew(tmp_path, monkeypatch):
    """Stopped with a wrong word for how query, key and value lie: no tensor of that reading is kept."""
    whole = mindspore_fixtures.parts()
    source = mindspore_fixtures.write(
        tmp_path / "ms", [mindspore_fixtures.rank(whole, "concat", i, 2) for i in range(2)], config=mindspore_fixtures.config(4, 4, 40)
    )
    put, calls = base.Target.put, itertools.count()

    def stopped(self, tensor, whole) -> None:
        if next(calls) == 8:
            raise KeyboardInterrupt
        put(self, tensor, whole)

    monkeypatch.setattr(base.Target, "put", stopped)
    _yuan(source, tmp_path / "out", "--source-fused-layout", "grouped", code=3)
    assert "anew       source_fused_layout was grouped, and is concat" in _yuan(source, tmp_path / "out", "--source-fused-layout", "concat")
    assert "0 differ" in _yuan(source, tmp_path / "out", "--verify", "--source-fused-layout", "concat")
    for words, why in ((("--shard", "0/2"), "--workers and --shard"), (("--tolerance", "1"), "--tolerance is of")):
        with pytest.raises(UserError, match=why):
            _yuan(source, tmp_path / "out", "--verify", *words)


@pytest.mark.parametrize("dies", [False, True], ids=["", "and the worker that reads it dies"])
def test_a_source_that_is_rewritten_meanwhile(tmp_path, monkeypatch, dies):
    source = write(tmp_path / "hf", LLAMA, llama_tensors())
    weights, put = source / "model.safetensors", base.Target.put

    def rewrite(self, tensor, whole) -> None:
        put(self, tensor, whole)
        if tensor.layer == 0:
            with open(weights, "r+b") as file:  # in place: where a file that is mapped gets shorter, the system kills who reads it
                file.seek(-2000, os.SEEK_END)
                file.write(bytes(2000))
            if dies:
                raise Stopped("a worker process died", "fewer --workers")

    monkeypatch.setattr(base.Target, "put", rewrite)
    with pytest.raises(CheckpointError, match="was changed while it was read: model.safetensors"):
        _convert(tmp_path, "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_what_stands_in_the_way_at_the_end_costs_nothing(tmp_path):
    write(tmp_path / "hf", LLAMA, llama_tensors())

    def get_in_the_way(what: str, count: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "log.txt").touch()

    with pytest.raises(CheckpointError, match="log.txt is in the way"):
        _convert(tmp_path, "hf", progress=get_in_the_way)
    shutil.rmtree(tmp_path / "out")
    told = []
    _convert(tmp_path, "hf", tell=lambda *words: told.append(words))
    assert told[0][0] == "kept" and told[0][1].startswith("15 of 15")


def test_what_another_share_has_written_stays(tmp_path, monkeypatch):
    """Neither another's wrong option, nor a folder that is mounted elsewhere, nor a tensor that reads back otherwise removes it."""
    write(tmp_path / "hf", LLAMA, llama_tensors())
    _convert(tmp_path, "torch", "whole")
    _convert(tmp_path, "torch", shard=(0, 2))
    noted = (tmp_path / "out.part" / ".written.0-of-2").read_bytes()
    for shard in ((1, 2), (0, 1)):
        with pytest.raises(CheckpointError, match="share 0/2 of it is written of something else: dtype was None, and is bf16"):
            convert(_source(tmp_path), tmp_path / "out", replace(KINDS["torch"], dtype="bf16"), _carry, shard=shard)
    shutil.copytree(tmp_path / "hf", tmp_path / "mounted" / "hf")
    Lock(tmp_path / "out.7-of-9.lock")._file.close()  # a share that was killed
    put = base.Target.put
    monkeypatch.setattr(base.Target, "put", lambda self, tensor, whole: put(self, tensor, whole + 1 if tensor.layer == 1 else whole))
    elsewhere = partial(convert, _source(tmp_path / "mounted"), tmp_path / "out", KINDS["torch"], _carry, shard=(1, 2))
    with pytest.raises(CheckpointError, match="layers.1.* read back otherwise than written"):
        elsewhere()
    monkeypatch.setattr(base.Target, "put", put)
    assert (tmp_path / "out.part" / ".written.0-of-2").read_bytes() == noted
    elsewhere()
    made, whole = _files(tmp_path / "out"), _files(tmp_path / "whole")
    said = made["release/conversion.json"].replace(str(tmp_path / "mounted" / "hf").encode(), str(tmp_path / "hf").encode())
    assert {**made, "release/conversion.json": said} == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mounted", "out", "whole"]
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    with pytest.raises(CheckpointError, match="has no locks"):
        _convert(tmp_path, "torch", "another", shard=(1, 2))
