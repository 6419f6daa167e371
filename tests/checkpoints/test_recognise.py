"""The format of a checkpoint by the names of its files, and what is not whole."""

from pathlib import Path

import pytest

from checkpoints.folder import CheckpointError
from checkpoints.recognise import recognise


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")


@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (4, 1), (1, 16), (2, 3)])
@pytest.mark.parametrize("name", ["iter_0000007", "release"])
@pytest.mark.parametrize("file", ["model_optim_rng.pt", "model_rng.pt"])
def test_one_file_per_rank(tmp_path, tensor, pipeline, name, file):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7" if name != "release" else name)
    ranks = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "") for t in range(tensor) for p in range(pipeline)]
    write(*(tmp_path / name / rank / file for rank in ranks))
    for path in (tmp_path, tmp_path / name):
        found = recognise(path)
        assert (found.path, found.format, found.tensor, found.pipeline) == (tmp_path / name, "torch", tensor, pipeline)
        assert found.size == 5 * len(ranks)
    (tmp_path / name / ranks[-1] / file).rename(tmp_path / name / ranks[-1] / "model.pt")
    with pytest.raises(CheckpointError, match=ranks[-1]):
        recognise(tmp_path)


def test_the_distributed_optimizer_of_early_2023_is_no_stage(tmp_path):
    """Megatron-LM 23.04, and so Pai's v0.5: of one stage the optimizer's folders are named as stages are."""
    write(*(tmp_path / "release" / f"mp_rank_{t:02d}" / "model_rng.pt" for t in range(2)))
    write(*(tmp_path / "release" / f"mp_rank_{t:02d}_{d:03d}" / "optim.pt" for t in range(2) for d in range(4)))
    found = recognise(tmp_path / "release")
    assert (found.tensor, found.pipeline) == (2, 1)


def test_the_other_formats(tmp_path):
    write(tmp_path / "run/checkpoints/iter_0000002/metadata.json")
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    assert recognise(tmp_path / "run").format == "torch_dist"
    write(tmp_path / "hf/config.json", tmp_path / "hf/pytorch_model.bin")
    assert recognise(tmp_path / "hf").format == "hf"
    write(*(tmp_path / f"ms/rank_{rank}/llama{rank}.ckpt" for rank in range(4)))
    found = recognise(tmp_path / "ms")
    assert (found.format, found.tensor, found.pipeline, found.size) == ("mindspore", 4, 1, 20)
    (tmp_path / "ms/rank_1/llama1.ckpt").unlink()
    with pytest.raises(CheckpointError, match="rank_1 of its 4 ranks"):
        recognise(tmp_path / "ms")
    for name in ("rank_0_old", "rank_old", "rank_00"):
        write(tmp_path / name / "ms/rank_0/llama.ckpt", tmp_path / name / "ms" / name / "llama.ckpt", tmp_path / name / "alone" / name / "x.ckpt")
        for one in ("ms", "alone"):
            with pytest.raises(CheckpointError, match=f"a .ckpt in {name}, no rank's folder"):
                recognise(tmp_path / name / one)


def test_what_is_no_checkpoint(tmp_path):
    write(tmp_path / "file")
    write(tmp_path / "config_alone/config.json")
    write(tmp_path / "iter_0000001/weights.bin")
    write(tmp_path / "out.part/.conversion", tmp_path / "out.part/checkpoint/model.safetensors")
    cases = {"gone": "no such folder", "file": "is a file", "config_alone": "no whole checkpoint", "iter_0000001": "no known format", "out.part": "not ended"}
    for name, words in cases.items():
        with pytest.raises(CheckpointError, match=words):
            recognise(tmp_path / name)
