import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.tokenizers import Tokenizer, build_tokenizer, train_sentencepiece
from tests.data_tools.samples import HARD_TEXTS, small_gpt2


@pytest.fixture(scope="package", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Which may take longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Tokenizer:
    return build_tokenizer("GPT2BPETokenizer", **small_gpt2(tmp_path_factory.mktemp("gpt2")))


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def sentencepiece(request, tmp_path_factory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("sp") / "sp.model"
    path.write_bytes(train_sentencepiece(HARD_TEXTS, 330, request.param))
    return build_tokenizer("SentencePieceTokenizer", tokenizer_model=path)
