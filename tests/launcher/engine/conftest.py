import shutil

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter
from tests.data_tools.samples import SHARED
from tests.launcher.engine.runs import REFERENCE, SMALL, layout, yuan


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A folder with Megatron-LM's data and the recipe `reference` of its curves."""
    folder = tmp_path_factory.mktemp("reference")
    if not (SHARED / "reference").is_dir():
        pytest.skip(f"Megatron-LM's reference curves are not in {SHARED} (set YUAN_TEST_SHARED)")
    for name in ("shakespeare_text_document.bin", "shakespeare_text_document.idx"):
        shutil.copy(SHARED / "reference" / name, folder)
    return _with_recipe(folder, "reference", REFERENCE)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with recipe `small` and its data: 60 documents in which the next id is 1 to 3 further."""
    folder = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    writer = IndexedWriter(folder / "ids", np.uint16)
    for _ in range(60):
        steps = random.integers(1, 4, size=random.integers(40, 200))
        writer.add_document(np.cumsum(steps) % 255)
    writer.finish()
    return _with_recipe(folder, "small", SMALL)


@pytest.fixture(scope="session")
def straight(small):
    """Runs of `small` from start to end without a break, once each: `straight("name", words...)` gives the run's name."""
    done = set()

    def run(name: str, *words: str) -> str:
        if name not in done:
            yuan(small, "pretrain", "recipe=small", f"run.name={name}", *(words or layout()))
            done.add(name)
        return name

    return run


def _with_recipe(folder, name, text):
    (folder / "recipes").mkdir()
    (folder / "recipes" / f"{name}.yaml").write_text(f"# {name}\n{text}")
    return folder
