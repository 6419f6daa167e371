"""GPT-2's byte-level BPE out of vocab.json and merges.txt, by Hugging Face's `tokenizers`."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import settings_beside
from data_tools.tokenizers.huggingface import LibraryTokenizer

END_OF_TEXT = "<|endoftext|>"


class GPT2BPETokenizer(LibraryTokenizer):
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
    is_local = True

    def __init__(self, vocab_file: Path, merge_file: Path, plain_special_tokens: bool = False, use_gigatoken: bool | None = None):
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

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
        self.special_tokens = {END_OF_TEXT: self.eod}
        self.files = {"vocab_file": vocab_file, "merge_file": merge_file}
        self.companions = settings_beside(vocab_file)
        self.options = {"plain_special_tokens": plain_special_tokens}
        self.settings = {"use_gigatoken": use_gigatoken}
