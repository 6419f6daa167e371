"""A recipe's tokenizer, and the copy of its files that goes with every checkpoint."""

import shutil
from pathlib import Path

import pytest

from launcher.engine.checkpoint import copy_tokenizer
from launcher.recipe.load import load
from launcher.recipe.schema import Recipe, Tokenizer
from launcher.recipe.tokenizer import tokenizer_of, with_copies
from tests.data_tools.samples import small_gpt2, yuan_model
from tests.data_tools.tokenizers.conftest import huggingface_folder, rank_file


def settings_of(kind: str, folder: Path) -> Tokenizer:
    """`folder` is filled with what the tokenizer needs, and more."""
    (folder / "README.md").write_text("not needed")
    if kind == "GPT2BPETokenizer":
        return Tokenizer(**{key: str(path) for key, path in small_gpt2(folder).items()})
    if kind.startswith("HuggingFaceTokenizer"):
        model = huggingface_folder(folder) / ("tokenizer.json" if kind.endswith("file") else "")
        return Tokenizer("HuggingFaceTokenizer", str(model))
    if kind.startswith("YuanTokenizer"):
        (folder / "tokenizer.model").write_bytes(yuan_model())
        return Tokenizer("YuanTokenizer", str(folder / ("tokenizer.model" if kind.endswith("file") else "")))
    ranks = rank_file(folder / "cl100k_base.tiktoken", {bytes([byte]): byte for byte in range(256)})
    return Tokenizer("TikTokenizer", str(ranks))


@pytest.mark.parametrize("kind", [
    "GPT2BPETokenizer", "HuggingFaceTokenizer, a file", "HuggingFaceTokenizer, a folder", "YuanTokenizer, a file", "YuanTokenizer, a folder",
    "TikTokenizer",
])  # fmt: skip
def test_the_copy_alone_makes_the_same_tokenizer(kind, tmp_path):
    (original := tmp_path / "original").mkdir()
    recipe = Recipe(tokenizer=settings_of(kind, original))
    before = tokenizer_of(recipe.tokenizer)
    hash_before = before.hash()
    copy_tokenizer(recipe, tmp_path / "tokenizer")
    shutil.rmtree(original)
    after = tokenizer_of(with_copies(recipe.tokenizer, tmp_path / "tokenizer"))
    assert not (tmp_path / "tokenizer" / "README.md").exists()
    assert after.hash() == hash_before and after.eod == before.eod and after.encode("to be") == before.encode("to be")


def test_keys_of_a_recipe_reach_the_tokenizer(tmp_path):
    folder = huggingface_folder(tmp_path)
    words = ["recipe=preprocess", "tokenizer.type=HuggingFaceTokenizer", f"tokenizer.tokenizer_model={folder}", "tokenizer.eod_token=<tool>"]
    recipe = load([*words, "tokenizer.tokenizer_hf_include_special_tokens=true", "tokenizer.use_gigatoken=false"]).recipe
    tokenizer = tokenizer_of(recipe.tokenizer)
    assert (tokenizer.eod, tokenizer.encode("")) == (400, [0]) and recipe.derived.vocab_size == 402
    ranks = rank_file(tmp_path / "bytes.tiktoken", {bytes([byte]): byte for byte in range(256)})
    words = ["recipe=preprocess", "tokenizer.type=TikTokenizer", f"tokenizer.tokenizer_model={ranks}", "tokenizer.tiktoken_pattern=r50k_base"]
    by_name = load([*words, "tokenizer.tiktoken_special_tokens=[<|endoftext|>,<x>]"]).recipe
    assert tokenizer_of(by_name.tokenizer).special_tokens == {"<|endoftext|>": 256, "<x>": 257}
    by_id = load([*words, "tokenizer.tiktoken_special_tokens={<|endoftext|>: 300}"]).recipe
    assert tokenizer_of(by_id.tokenizer).eod == 300 and by_id.derived.vocab_size == 301


def test_what_lies_beside_the_tokenizer_of_the_weights_goes_along(tmp_path):
    weights, other = tmp_path / "weights", tmp_path / "other"
    for folder in (weights, other):
        folder.mkdir()
        huggingface_folder(folder)
        for name in ("config.json", "added_tokens.json", "tokenizer.model", "model.safetensors"):
            (folder / name).write_text("{}")
    recipe = Recipe(tokenizer=Tokenizer("HuggingFaceTokenizer", str(weights / "tokenizer.json")))
    recipe.checkpoint.load = str(weights)
    copy_tokenizer(recipe, tmp_path / "tokenizer")
    kept = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert kept >= {"tokenizer.json", "added_tokens.json", "tokenizer.model"} and not kept & {"config.json", "model.safetensors"}
    recipe.tokenizer.tokenizer_model = str(other / "tokenizer.json")  # of another model: nothing says what the others are
    copy_tokenizer(recipe, tmp_path / "tokenizer")
    assert "added_tokens.json" not in {path.name for path in (tmp_path / "tokenizer").iterdir()}
