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
