"""What a conversion is refused for before a weight is read."""

import re
import shutil
from types import SimpleNamespace

import pytest

from checkpoints.adapters import note_of, write_note
from launcher.recipe import load
from launcher.recipe.check import check
from launcher.recipe.frozen import write_frozen
from tests.launcher.recipe.conftest import BASE

LARGE = ["model.num_layers=48", "model.hidden_size=2048"]  # 2.4 billion numbers: the message tells tenths of GB


@pytest.fixture
def training(workspace, write_recipe):
    """training(name, *words): the folder of a training's checkpoint, without weights."""

    write_recipe("base", BASE)

    def made(name: str, *words: str):
        checkpoint = workspace / name / "iter_0000001"
        checkpoint.mkdir(parents=True)
        for file in ("metadata.json", "__0_0.distcp"):
            (checkpoint / file).write_text("{}")
        write_frozen(load(["recipe=base", *words]).recipe, checkpoint / "recipe.yaml")
        (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("1")
        return checkpoint.parent

    return made


def _problems(source, target, **more):
    values = {f"convert.{key}": (str(value), "command line") for key, value in {"source": source, "target": target, **more}.items()}
    loaded = load([], values, default="", checked=True)
    return [one.what for one in check(loaded.recipe, loaded.sources, "convert")]


def test_room_of_a_training_is_bytes_a_number(training, workspace, monkeypatch):
    """As measured of what a training saves (`test_the_size_of_a_checkpoint`): 14 in bf16; 12 in fp32, 16 with a distributed optimizer."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    found = {}
    for precision in ("bf16", "fp32"):
        for form in ("false", "true"):
            source = training(f"{precision}_{form}", f"training.precision={precision}", f"parallel.use_distributed_optimizer={form}", *LARGE)
            for optimizer in ("none", "plain", "distributed", "keep"):
                (what,) = [one for one in _problems(source, workspace / "out", optimizer=optimizer) if "are free in" in one]
                found[precision, form, optimizer] = float(re.search(r"takes ([\d.,]+) GB", what)[1].replace(",", ""))
    none = found["fp32", "false", "none"] / 4
    for (precision, form, optimizer), size in found.items():
        distributed = optimizer == "distributed" or optimizer == "keep" and form == "true"
        wanted = {"bf16": 2, "fp32": 4}[precision] + (0 if optimizer == "none" else 8 if precision == "fp32" and not distributed else 12)
        assert size / none == pytest.approx(wanted, rel=0.02), (precision, form, optimizer)


def test_a_target_inside_what_the_adapters_stand_beside(training, workspace):
    frozen = training("frozen")
    run = training("run", "checkpoint.load=frozen", "lora.rank=4")
    write_note(run / "iter_0000001", note_of(frozen, 4, 8.0, ["linear_qkv"]))
    inside = [what for what in _problems(run, frozen / "iter_0000001" / "merged") if "one in the other" in what]
    assert inside and "adapters are of" in inside[0]
    assert not [what for what in _problems(run, workspace / "merged") if "one in the other" in what]
