"""One small tokenizer of every type."""

import base64
import json
from pathlib import Path

import pytest

from data_tools.tokenizers import Tokenizer, build_tokenizer, train_byte_level_bpe, train_sentencepiece
from tests.data_tools.samples import HARD_TEXTS, small_gpt2, yuan_model

TEXTS = [*HARD_TEXTS[:6], "I'll say we've THEY'RE 12 123 12345\n\n\t x = [1]\r\n" * 3]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def huggingface_folder(folder: Path, *, normalizer=None, pre_tokenizer=None, eos: object = "<|end|>") -> Path:
    """A tokenizer.json like Llama 3's, with a beginning of sentence in its template, a truncation that must not cut, a
    plain added token and one that takes the space before it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizer or pre_tokenizers.Sequence(list(split))
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|begin|>", "<|end|>"]))
    made.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<mask>", lstrip=True, special=True)])
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    made.enable_truncation(5)
    made.enable_padding(length=9)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "chat_template": "x"}), encoding="utf-8")
    return folder


def rank_file(path: Path, ranks: dict[bytes, int]) -> Path:
    """A .tiktoken file."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    path.write_text("".join(lines), encoding="ascii")
    return path


def ranks_of(vocab: dict[str, int]) -> dict[bytes, int]:
    """The bytes of GPT-2's tokens, with their ids: a byte that has no sign of its own is written as one from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = {chr(byte): byte for byte in shown}
    signs |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in shown)}
    return {bytes(signs[sign] for sign in token): i for token, i in vocab.items() if token != "<|endoftext|>"}


def vocabulary_file(path: Path, ranks: dict[bytes, int]) -> Path:
    """The bytes first, as Megatron-LM has them."""
    others = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    tokens = [bytes([byte]) for byte in range(256)] + others
    listed = [{"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")} for i, token in enumerate(tokens)]
    path.write_text(json.dumps(listed), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_ranks() -> dict[bytes, int]:
    return ranks_of(json.loads(train_byte_level_bpe(TEXTS, 420)["vocab.json"]))


@pytest.fixture(scope="session")
def yuan(tmp_path_factory) -> Tokenizer:
    (folder := tmp_path_factory.mktemp("yuan")).joinpath("tokenizer.model").write_bytes(yuan_model())
    return build_tokenizer("YuanTokenizer", tokenizer_model=folder)


@pytest.fixture(scope="session")
def of_every_type(tmp_path_factory, small_ranks, yuan) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("every")
    gpt2, ranks = small_gpt2(folder), rank_file(folder / "small.tiktoken", small_ranks)
    for kind in ("bpe", "unigram"):
        (folder / f"{kind}.model").write_bytes(train_sentencepiece(HARD_TEXTS, 330, kind))
    tik = {"tokenizer_model": ranks, "tiktoken_special_tokens": ["<|endoftext|>", "<sep>"]}
    hf = huggingface_folder(folder / "hf")
    vocabulary = {"tokenizer_model": vocabulary_file(folder / "megatron.json", small_ranks), "tiktoken_num_special_tokens": 9}
    given = {
        "gpt2": ("GPT2BPETokenizer", gpt2),
        "gpt2, library alone": ("GPT2BPETokenizer", gpt2 | {"use_gigatoken": False}),
        "huggingface": ("HuggingFaceTokenizer", {"tokenizer_model": hf}),
        "huggingface, library alone": ("HuggingFaceTokenizer", {"tokenizer_model": hf, "use_gigatoken": False}),
        "gpt-4": ("TikTokenizer", tik | {"tiktoken_pattern": "cl100k_base"}),
        "gpt-4o": ("TikTokenizer", tik | {"tiktoken_pattern": "o200k_base"}),
        "gpt-4, library alone": ("TikTokenizer", tik | {"tiktoken_pattern": "cl100k_base", "use_gigatoken": False}),
        "tiktoken of our own": ("TikTokenizer", tik | {"tiktoken_pattern": r"\s+|\S+", "plain_special_tokens": True}),
        "megatron's tiktoken": ("TikTokenizer", vocabulary),
        "sentencepiece bpe": ("SentencePieceTokenizer", {"tokenizer_model": folder / "bpe.model"}),
        "sentencepiece unigram": ("SentencePieceTokenizer", {"tokenizer_model": folder / "unigram.model"}),
    }
    return {name: build_tokenizer(kind, **arguments) for name, (kind, arguments) in given.items()} | {"yuan": yuan}
