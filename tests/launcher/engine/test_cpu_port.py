"""The redirections belong to one minor version of megatron-core, and stand nowhere else."""

import re
from importlib.metadata import version
from pathlib import Path

import launcher
from launcher.engine.cpu_port import MEGATRON_CORE


def test_it_was_made_for_the_installed_megatron_core():
    assert version("megatron-core").startswith(MEGATRON_CORE + ".")


def test_nothing_else_patches_torch_or_megatron():
    patch = re.compile(r"^\s*(setattr\(torch|torch\.[\w.]+ = |megatron\.[\w.]+ = )", re.MULTILINE)
    guilty = [path.name for path in Path(launcher.__file__).parent.rglob("*.py") if patch.search(path.read_text())]
    assert guilty == ["cpu_port.py"]
