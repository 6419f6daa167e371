"""What several folders of tests share."""

import pytest


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a run per model family (`gpt2`, `llama`: tiny, random weights), each with a checkpoint, and
    `result.json`: their greedy answers by whole forward passes."""
    from tests.launcher.engine.generate_worker import run, tiny

    path = tmp_path_factory.mktemp("generation") / "trained"
    run(path, tiny("make"))
    return path
