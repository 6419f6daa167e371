"""A folder in which a recipe finds all that it names, each thing as small as it can be."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter
from data_tools.tokenizers import train_sentencepiece
from launcher.recipe.load import Loaded
from tests.data_tools.samples import small_gpt2, yuan_model

ROW = {"instruction": "What is a list?", "input": "", "output": "A sequence."}


@pytest.fixture(scope="session")
def sentencepiece() -> bytes:
    return train_sentencepiece(["to be or not to be, that is the question\n" * 9], 290)


@pytest.fixture
def stand_in(tmp_path, monkeypatch, sentencepiece):
    """stand_in(loaded) makes what a recipe names, in the current folder, which is a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YUAN_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 50})())  # of the machine that it is meant for

    def make(loaded: Loaded) -> None:
        r = loaded.recipe
        if r.tokenizer.tokenizer_model:
            write(r.tokenizer.tokenizer_model, yuan_model() if r.tokenizer.type == "YuanTokenizer" else sentencepiece)
        if r.tokenizer.vocab_file:
            files = small_gpt2(tmp_path)
            write(r.tokenizer.vocab_file, files["vocab_file"].read_bytes())
            write(r.tokenizer.merge_file, files["merge_file"].read_bytes())
        if r.data.data_path:
            Path(r.data.data_path).parent.mkdir(parents=True, exist_ok=True)
            with IndexedWriter(r.data.data_path, np.dtype("<u2")) as writer:
                for _ in range(1000):
                    writer.add_document(np.arange(20))
                writer.finish()
        for path in (r.data.train, r.data.valid):
            if path:
                write(path, (json.dumps([ROW]) if path.endswith(".json") else json.dumps(ROW) + "\n").encode())
        for path in (r.preprocess.input, r.generate.input):
            if path:
                write(path, b'{"text": "to be", "query": "to be"}\n')
        for path in (r.checkpoint.load, r.generate.load):
            if path:
                checkpoint(path)
        if r.convert.source:
            source(loaded.name, r.convert.source)
        if r.convert.hf_config:
            write(f"{r.convert.hf_config}/config.json", b"{}")

    return make


def write(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def checkpoint(path: str) -> None:
    write(f"{path}/latest_checkpointed_iteration.txt", b"1")
    write(f"{path}/iter_0000001/metadata.json", b"{}")


def source(name: str, path: str) -> None:
    """The source of a conversion, in the format that the recipe's story has."""
    if "mindspore" in name:
        for rank in range(int(name.split("_")[-1].split("to")[0])):
            write(f"{path}/rank_{rank}/llama.ckpt", b"0")
    elif path.endswith("-hf"):
        write(f"{path}/config.json", b"{}")
        write(f"{path}/model-00001-of-00002.safetensors", b"0")
    elif path.endswith("_released"):
        write(f"{path}/latest_checkpointed_iteration.txt", b"1")
        stages = {"2b": 1, "51b": 16, "102b": 32}[path.split("_")[-2]]
        for stage in range(stages):
            rank = "mp_rank_00" + (f"_{stage:03d}" if stages > 1 else "")
            write(f"{path}/iter_0000001/{rank}/model_optim_rng.pt", b"0")
    else:
        checkpoint(path)
