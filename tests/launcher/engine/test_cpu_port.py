"""The redirections belong to one minor version of megatron-core, and stand nowhere else."""

import ast
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import launcher
from launcher.engine.cpu_port import MEGATRON_CORE

THEIRS = ("torch", "megatron")


def test_it_was_made_for_the_installed_megatron_core():
    assert version("megatron-core").startswith(MEGATRON_CORE + ".")


def patched(source: str) -> list[str]:
    """The names of torch's and megatron's, modules and what was imported from them, that a file assigns to or deletes."""
    tree = ast.parse(source)
    names = set(imported(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr") and root(node.args[0]) in names:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and root(node) in names:
            found.append(ast.unparse(node))
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """The names under which a file has torch, megatron and what is in them."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                if (getattr(node, "module", None) or alias.name).partition(".")[0] in THEIRS:
                    yield alias.asname or alias.name.partition(".")[0]


def root(node: ast.AST) -> str | None:
    """`a` of a.b.c."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def test_nothing_else_patches_torch_or_megatron():
    """data.py alone puts two functions of torch.distributed's aside, for as long as it builds the sample index."""
    engine = Path(launcher.__file__).parent
    found = {path.relative_to(engine).as_posix(): patched(path.read_text()) for path in engine.rglob("*.py")}
    guilty = {name: names for name, names in found.items() if names}
    assert guilty.pop("engine/cpu_port.py")
    assert guilty == {"engine/data.py": ["torch.distributed.is_initialized", "torch.distributed.get_rank"] * 2}


@pytest.mark.parametrize("line", [
    "torch.cuda.x = 1", "torch.a, b = 1, 2", "for torch.a in b: pass", "dist.y: int = 1", "State.x += 1", "setattr(torch.cuda, 'x', 1)", "del dist.x",
])  # fmt: skip
def test_a_patch_is_seen_however_it_is_written(line):
    imports = "import torch, torch.distributed as dist\nfrom megatron.core import parallel_state as State\n"
    assert len(patched(imports + line)) == 1 and not patched(imports + line.replace("torch.", "ours.").replace("dist.", "ours.").replace("State.", "ours."))
