"""A folder of its own for each test, with no recipes of the user's in reach."""

from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter

BASE = """
model: {num_layers: 8, hidden_size: 96, num_attention_heads: 4}
training: {seq_length: 16, micro_batch_size: 2, global_batch_size: 8, train_iters: 100}
optimizer: {lr: 1.0e-3}
tokenizer: {type: NullTokenizer, vocab_size: 50}
data: {data_path: data_text_document, split: '8,1,1'}
launch: {device: cpu}
"""


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty current folder and an empty config folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("YUAN_CONFIG_DIR", str(tmp_path / "config"))
    return here


@pytest.fixture
def write_recipe(workspace):
    """write_recipe(name, text, folder='recipes') writes a recipe below the current folder."""

    def write(name: str, text: str, folder: str | Path = "recipes") -> Path:
        path = workspace / folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_data(workspace):
    """write_data(prefix, [3, 0, 5]) writes documents of so many tokens as a .bin/.idx pair."""

    def write(prefix: str, lengths: list[int]) -> str:
        with IndexedWriter(prefix, np.dtype("<u2")) as writer:
            for length in lengths:
                writer.add_document(np.arange(length) % 50)
            writer.finish()
        return prefix

    return write
