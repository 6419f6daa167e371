"""`yuan preprocess` beside Megatron-LM's way of doing it and beside the tokenizer libraries alone. Part of `make bench`.

All of them encode the same corpus with GPT-2's vocabulary on the same cores, taking turns; the bytes written are compared.

    python -m tests.benchmarks.preprocess [CORPUS.jsonl]   without a file, 50 MB of the Python code that is installed here
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from data_tools.preprocess import preprocess
from data_tools.tokenizers import Tokenizer, build_tokenizer, train_sentencepiece
from tests.data_tools.samples import SHARED

ROUNDS, CORPUS_BYTES = 3, 50_000_000
TURNS = 3  # of what takes half a second, in a round with what takes fifteen
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    files = {"vocab_file": SHARED / "data" / "gpt2-vocab.json", "merge_file": SHARED / "data" / "gpt2-merges.txt"}
    if not files["vocab_file"].is_file():
        print(f"no GPT-2 vocabulary in {SHARED / 'data'}: nothing to measure (set YUAN_TEST_SHARED)")
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(sys.argv[1]) if len(sys.argv) > 1 else make_corpus(Path(folder) / "corpus.jsonl")
        megabytes = corpus.stat().st_size / 1e6
        print(f"{corpus.name}: {megabytes:.1f} MB; {CORES} cores, {ROUNDS} rounds, medians\n")
        byte_level(corpus, megabytes, Path(folder), build_tokenizer("GPT2BPETokenizer", **files))
        sentencepiece(corpus, megabytes, Path(folder))


def make_corpus(path: Path) -> Path:
    """Installed Python sources, one document a file, until there is enough."""
    size = 0
    with path.open("w", encoding="utf-8") as out:
        for source in sorted(Path(json.__file__).parents[1].rglob("*.py")) + sorted(Path(sys.prefix).rglob("*.py")):
            try:
                size += out.write(json.dumps({"text": source.read_text(encoding="utf-8")}) + "\n")
            except (UnicodeError, OSError):
                continue
            if size > CORPUS_BYTES:
                break
    return path


def byte_level(corpus: Path, megabytes: float, folder: Path, tokenizer: Tokenizer) -> None:
    seconds: dict[str, list[float]] = {"gigatoken alone, all cores": [], "yuan preprocess": [], "Megatron-LM's way": []}
    library, yuan, megatron = seconds.values()
    for _ in range(ROUNDS):
        for _ in range(TURNS):
            library.append(apart(gigatoken_alone, corpus, tokenizer))
            yuan.append(apart(yuan_preprocess, corpus, folder / "yuan", tokenizer))
        megatron += [apart(megatron_lms_way, corpus, folder / "megatron", tokenizer)] * TURNS
    same = all((folder / f"yuan_text_document.{s}").read_bytes() == (folder / f"megatron.{s}").read_bytes() for s in ("bin", "idx"))
    print(f"GPT-2's byte-level BPE, {CORES} processes; the bytes of both tools are {'the same' if same else 'DIFFERENT'}")
    report(seconds, megabytes, "yuan preprocess")


def sentencepiece(corpus: Path, megabytes: float, folder: Path) -> None:
    import sentencepiece

    texts = [json.loads(line)["text"] for line in corpus.open(encoding="utf-8")]
    (folder / "sp.model").write_bytes(train_sentencepiece(texts[:300], 8000))
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=folder / "sp.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    seconds = rounds(
        {
            "sentencepiece alone, all cores": lambda: processor.encode(texts, num_threads=CORES),
            "yuan preprocess": lambda: preprocess(corpus, folder / "sp", tokenizer, append_eod=True, workers=CORES),
        }
    )
    print(f"SentencePiece (BPE, 8,000 pieces), {CORES} processes")
    report(seconds, megabytes, "yuan preprocess")


def rounds(contestants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each in each round, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def report(seconds: dict[str, list[float]], megabytes: float, ours: str) -> None:
    for name, took in seconds.items():
        ratio = statistics.median(other / own for other, own in zip(took, seconds[ours], strict=True))
        print(f"  {name:<32} {megabytes / statistics.median(took):8.2f} MB/s   {ratio:6.2f} x yuan's time")
    print()


_worker: Tokenizer


def _start(tokenizer: Tokenizer) -> None:
    global _worker
    _worker = tokenizer


def _encode(line: str) -> list[int]:
    ids = _worker.encode(json.loads(line)["text"])
    return [*ids, _worker.eod] if ids else []


def apart(way: Callable[..., float], *arguments: object) -> float:
    """Seconds of one of these in a process of its own: what others leave in memory slows forking (0.56 s became 0.74), torch
    keeps from it, and a tokenizer that was used knows the words. It is built there, in 0.3 s that nobody's time holds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(way, *arguments).result()


def gigatoken_alone(corpus: Path, tokenizer: Any) -> float:
    import gigatoken

    texts = [json.loads(line)["text"] for line in corpus.open(encoding="utf-8")]
    library = gigatoken.Tokenizer.from_json(tokenizer._backend.to_str())
    library.encode_batch(["x"], parallel=False)  # the first time takes 0.17 s
    started = time.perf_counter()
    library.encode_batch(texts, parallel=True)
    return time.perf_counter() - started


def yuan_preprocess(corpus: Path, prefix: Path, tokenizer: Tokenizer) -> float:
    tokenizer.engine
    _forget(prefix)
    started = time.perf_counter()
    preprocess(corpus, prefix, tokenizer, append_eod=True, workers=CORES)
    return time.perf_counter() - started


def _forget(prefix: Path) -> None:
    """Remove what was written before: replacing files of 20 MB takes 0.02 s more than making them."""
    for path in prefix.parent.glob(f"{prefix.name}*"):
        path.unlink()


def megatron_lms_way(corpus: Path, prefix: Path, tokenizer: Tokenizer) -> float:
    """What preprocess_data.py does, without its imports' 9 s: lines to a pool, 32 at a time, Hugging Face's tokenizers
    document by document, and megatron-core's builder."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    _forget(prefix)
    started = time.perf_counter()
    with multiprocessing.Pool(CORES, _start, (tokenizer,)) as pool, corpus.open(encoding="utf-8") as lines:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)] if ids else [])
        builder.finalize(f"{prefix}.idx")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
