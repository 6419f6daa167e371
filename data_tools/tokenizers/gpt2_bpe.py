"""GPT-2's byte-level BPE out of vocab.json and merges.txt, by Hugging Face's `tokenizers`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import Tokenizer
from data_tools.tokenizers.gigatoken import Gigatoken

END_OF_TEXT = "<|endoftext|>"


class GPT2BPETokenizer(Tokenizer):
    """GPT-2's tokenizer, id for id that of Megatron-LM.

    Args:
        vocab_file: vocab.json, token to id.
        merge_file: merges.txt, one merge per line, best first.
        plain_special_tokens: how a literal `<|endoftext|>` in a text is read. False: as the end-of-document id, as
            Megatron-LM does since 0.16. True: as ordinary characters (7 tokens), as it did before.
        use_gigatoken: encode large batches by gigatoken: True, False, or None for where it gives the same ids.

    Raises:
        TokenizerError: a file is broken, or the vocabulary has holes or no `<|endoftext|>`.
    """

    type = "GPT2BPETokenizer"

    def __init__(self, vocab_file: Path, merge_file: Path, plain_special_tokens: bool = False, use_gigatoken: bool | None = None):
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        # One thread per process: preprocessing has its workers, and threads do not survive the data loader's fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        where = f"{vocab_file}, {merge_file}"
        try:
            backend = Backend(models.BPE.from_file(str(vocab_file), str(merge_file)))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"not GPT-2 tokenizer files: {error}", where, "see that both are whole, and not swapped") from error
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        vocab = backend.get_vocab()
        if END_OF_TEXT not in vocab or max(vocab.values()) >= len(vocab):
            fault = f"no {END_OF_TEXT}" if END_OF_TEXT not in vocab else "holes in its ids"
            raise TokenizerError(f"not GPT-2's vocabulary: {fault}", str(vocab_file), "use GPT-2's own vocab.json")
        if not plain_special_tokens:
            backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
        self._backend = backend
        self.eod = vocab[END_OF_TEXT]
        self.vocab_size = len(vocab)
        self.special_ids = {self.eod}
        self.files = {"vocab_file": vocab_file, "merge_file": merge_file}
        self.options = {"plain_special_tokens": plain_special_tokens}
        self.settings = {"use_gigatoken": use_gigatoken}

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The fast variant leaves out the offsets that nobody asked for.
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._fast.encode_arrays(texts) if self._fast else super().encode_arrays(texts)

    @cached_property
    def _fast(self) -> Gigatoken | None:
        if self.settings["use_gigatoken"] is False:
            return None
        try:
            return Gigatoken(self._backend.to_str(), self.encode_batch)
        except TokenizerError:
            if self.settings["use_gigatoken"]:
                raise
            return None

    @property
    def engine(self) -> str:
        return "gigatoken" if self._fast else "tokenizers"

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)
