"""Tokenizers of Hugging Face's library `tokenizers`: a tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import CONFIG, TEMPLATE, content_of, read_config
from data_tools.tokenizers.gigatoken import GigatokenBatches

# One thread per process: preprocessing has its workers, and threads do not survive the data loader's fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_CONFIGS = (CONFIG, "special_tokens_map.json")


class LibraryTokenizer(GigatokenBatches):
    """What every tokenizer of the library does alike.

    A text of 10 MB without a space takes the library 1.0 GiB and gigatoken 0.4; time grows with the length x its logarithm.

    Attributes:
        _backend: the library's own `Tokenizer`.
        _adds: whether the template of its post-processor is filled in (a beginning of sentence, for most).
    """

    library = "tokenizers"
    _backend: Any
    _adds = False

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=self._adds).ids

    def encode_plain(self, text: str, begins: bool = True) -> list[int]:
        backend = self._backend if begins else self._within
        backend.encode_special_tokens = True  # the library's word for encoding them as text
        try:
            return backend.encode(text, add_special_tokens=False).ids
        finally:
            backend.encode_special_tokens = False

    @cached_property
    def _within(self) -> Any:
        """Where only the first text gets a space before it (Metaspace, prepend_scheme "first"): the same without that."""
        state = json.loads(self._backend.to_str())
        pre = state["pre_tokenizer"] or {}
        first = [one for one in [pre, *pre.get("pretokenizers", [])] if one.get("prepend_scheme") == "first"]
        for one in first:
            one["prepend_scheme"] = "never"
        return type(self._backend).from_str(json.dumps(state)) if first else self._backend

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The fast variant leaves out the offsets that nobody asked for.
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=self._adds)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def _make_gigatoken(self, factory: Any) -> Any:
        return factory.from_json(self._backend.to_str())


class HuggingFaceTokenizer(LibraryTokenizer):
    """A tokenizer.json, id for id what `transformers` makes of it with add_special_tokens=False, as megatron-core 0.16 does.

    Its tokenizer_config.json and special_tokens_map.json are read where they lie beside it: for the end of document,
    which is their eos_token, and for tokens that only they add.

    Args:
        tokenizer_model: the tokenizer.json.
        eod_token: the token that ends documents, instead of eos_token.
        tokenizer_hf_include_special_tokens: fill in the template of the tokenizer, mostly a beginning of sentence before
            every text (Megatron-LM's option of that name; its main branch does so unless told otherwise).
        use_gigatoken: encode large batches by gigatoken, for byte-level BPE.

    Raises:
        TokenizerError: a file is broken, or nothing says which token ends a document.
    """

    type = "HuggingFaceTokenizer"

    def __init__(
        self,
        tokenizer_model: Path,
        eod_token: str | None = None,
        tokenizer_hf_include_special_tokens: bool = False,
        use_gigatoken: bool | None = None,
    ):
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(str(tokenizer_model))
        except Exception as error:  # the library raises bare Exception
            fix = "give the tokenizer.json of a model, or the folder that holds it"
            raise TokenizerError(f"not a tokenizer.json: {error}", str(tokenizer_model), fix) from error
        backend.no_truncation()  # either may be stored in the file, and cuts texts or fills them up
        backend.no_padding()
        self.companions = tuple(path for name in (*_CONFIGS, TEMPLATE) if (path := tokenizer_model.with_name(name)).is_file())
        config = _read_configs([path for path in self.companions if path.name != TEMPLATE])
        self._added = _add_tokens(backend, config.get("added_tokens_decoder") or {}, tokenizer_model)
        self._backend, self._adds = backend, tokenizer_hf_include_special_tokens
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.special_tokens = {str(token): i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        eod_token = eod_token or content_of(config.get("eos_token"))
        self.eod = _find_eod(vocab, eod_token, tokenizer_model, self.special_tokens)
        self.special_tokens[str(eod_token)] = self.eod
        bos = vocab.get(content_of(config.get("bos_token")) or "")
        self.bos = bos if bos in self.special_ids and bos != self.eod else None
        self.files = {"tokenizer_model": tokenizer_model}
        self.options = {"eod_token": eod_token, "tokenizer_hf_include_special_tokens": tokenizer_hf_include_special_tokens}
        self.settings = {"use_gigatoken": use_gigatoken}

    @cached_property
    def is_local(self) -> bool:  # type: ignore[override]
        return json.loads(self._backend.to_str())["model"]["type"] == "BPE"

    def _identity(self) -> dict[str, Any]:
        return self.options | ({"added": self._added} if self._added else {})

    def _make_gigatoken(self, factory: Any) -> Any:
        if not _is_byte_level(json.loads(self._backend.to_str())):
            raise TokenizerError("gigatoken is for byte-level BPE alone: merged SentencePiece vocabularies tie, and come out wrong")
        return super()._make_gigatoken(factory)


def _is_byte_level(state: dict[str, Any]) -> bool:
    model, pre = state["model"], state["pre_tokenizer"] or {}
    kinds = {one["type"] for one in [pre, *pre.get("pretokenizers", [])] if "type" in one}
    return model["type"] == "BPE" and not model.get("byte_fallback") and "ByteLevel" in kinds and "Metaspace" not in kinds


def _read_configs(paths: Sequence[Path]) -> dict[str, Any]:
    """The values of the files; what an earlier one says counts."""
    found: dict[str, Any] = {}
    for path in paths:
        found = {**{key: value for key, value in read_config(path).items() if value is not None}, **found}
    return found


def _add_tokens(backend: Any, listed: dict[str, dict[str, Any]], path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Add the tokens that tokenizer_config.json alone has, which `transformers` adds too. They decide ids: returned in order."""
    from tokenizers import AddedToken

    added = []
    for i, token in sorted((int(i), token) for i, token in listed.items()):
        if backend.token_to_id(token["content"]) is None:
            flags = {key: bool(token.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized")}
            backend.add_tokens([AddedToken(token["content"], special=bool(token.get("special")), **flags)])
            added.append((i, {"content": token["content"], **flags}))
        if backend.token_to_id(token["content"]) != i:
            what = f"{token['content']!r} is {backend.token_to_id(token['content'])} by tokenizer.json and {i} by tokenizer_config.json"
            raise TokenizerError(what, str(path), "take both files of the same model")
    return added


def _find_eod(vocab: dict[str, int], token: str | None, path: Path, special_tokens: dict[str, int]) -> int:
    some = ", ".join(list(special_tokens)[:8]) or "none is marked as special"
    if token is None:
        fix = f"name the token that ends a document: tokenizer.eod_token=TOKEN; the tokenizer has {some}"
        raise TokenizerError("no tokenizer_config.json beside it says which is the eos_token", str(path), fix)
    if token not in vocab:
        raise TokenizerError(f"no token {token!r} to end documents with", str(path), f"tokenizer.eod_token=TOKEN; the tokenizer has {some}")
    return vocab[token]
