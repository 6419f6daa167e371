"""What several tests share: hard texts, a small GPT-2 tokenizer, and the folder of reference data."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("YUAN_TEST_SHARED", ROOT.parent / "shared"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "data" / "gpt2-vocab.json").is_file(), reason=f"no reference data in {SHARED} (set YUAN_TEST_SHARED)"
)

HARD_TEXTS = [
    "To be, or not to be",
    "  def f(x):\n        return  x\n\n\n\ttabs\t\tand trailing  \n",
    "windows\r\nlines\rand old ones",
    "今天天气很好，我们去公园。　全角空格",
    "emoji 😀👩‍👩‍👧‍👦 flags 🇨🇳, e\u0301 and é, \ufeff, \u2028, \xa0",
    "nul \x00 bell \x07 escape \x1b[0m",
    "w" * 5000,
    " ",
    "\n",
    "<s></s><unk> <0x0A> [MASK]",
]


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    """One record per line, text unescaped as far as UTF-8 can hold it."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def small_gpt2(folder: Path) -> dict[str, Path]:
    """GPT-2 style vocab.json and merges.txt with 300 ids, `<|endoftext|>` last."""
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(HARD_TEXTS[:4], vocab_size=299, min_frequency=1, show_progress=False)
    vocab = trainer.get_vocab()
    vocab["<|endoftext|>"] = len(vocab)
    trainer.save_model(str(folder))  # merges.txt, and a vocab.json without the special token
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return {"vocab_file": folder / "vocab.json", "merge_file": folder / "merges.txt"}


YUAN_SPECIALS = ["<eod>", "<n>", "<sep>", "<pad>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>",
                 "<empty_output>", "<commit_before>", "<commit_msg>", "<commit_after>"]  # fmt: skip


def yuan_model(words: str = "the cat sat on that mat return self hello world RLHF 今天天气很好 世界你好") -> bytes:
    """A SentencePiece model with the quirks of Yuan 2.0's: merged out of vocabularies, so that thousands of scores tie;
    special tokens that are ordinary pieces; bytes for what it does not know; a dummy prefix.

    Args:
        words: every part of one of these of up to four characters is a piece.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece
    names: set[str] = set()

    def add(piece: str, score: float, kind: int = kinds.NORMAL) -> None:
        if piece not in names:
            names.add(piece)
            model.pieces.add(piece=piece, score=score, type=kind)

    add("<unk>", 0.0, kinds.UNKNOWN)
    add("<s>", 0.0, kinds.CONTROL)
    add("</s>", 0.0, kinds.CONTROL)
    for byte in range(256):
        add(f"<0x{byte:02X}>", 0.0, kinds.BYTE)
    spelled = ["▁" + word for word in words.split()]
    parts = [word[i : i + size] for size in (2, 3, 4) for word in spelled for i in range(len(word) - size + 1)]
    for rank, part in enumerate(sorted(set(parts[: len(parts) // 3]))):
        add(part, -float(rank))  # the first vocabulary has its ranks as scores
    for part in sorted(set(parts)):
        add(part, -13.047 if "▁" in part else 0.0)  # those merged into it have one score each
    for token in YUAN_SPECIALS:
        add(token, 0.0)
    for code in [*range(33, 127), 0x2581, *sorted({ord(sign) for sign in words if ord(sign) > 126})]:
        add(chr(code), -100.0)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = model.trainer_spec.split_digits = True
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.escape_whitespaces = True
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()
