"""The data tools at full length, by the command line: rate over time and the memory of all processes together.

Two inputs are made, each is preprocessed with GPT-2's vocabulary, and what came out is verified, inspected and indexed:
a long one of varied texts whose words keep changing (what libraries cache of words grows with those), and one of very many
documents of a few words.

    python -m tests.benchmarks.preprocess_scale FOLDER [GIGABYTES [MILLIONS]]   10 GB of texts and 20 million documents need 25 GB there
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import psutil

from data_tools.indexed import IndexedReader
from data_tools.preprocess import dataset_prefix
from data_tools.tokenizers import Tokenizer, build_tokenizer
from tests.data_tools.samples import ROOT, SHARED

FILES = {"vocab_file": SHARED / "data" / "gpt2-vocab.json", "merge_file": SHARED / "data" / "gpt2-merges.txt"}
OPTIONS = [word for name, path in FILES.items() for word in ("--" + name.replace("_", "-"), str(path))]
CORES = len(os.sched_getaffinity(0))
_CHECKED = 200  # documents compared with the input


def main() -> None:
    folder = Path(sys.argv[1])
    gigabytes, millions = (float(word) for word in (*sys.argv[2:], *(10, 20)[len(sys.argv) - 2 :]))
    folder.mkdir(parents=True, exist_ok=True)
    if gigabytes:
        case(folder, "long", long_lines(int(gigabytes * 1e9)))
    if millions:
        case(folder, "many", short_lines(int(millions * 1e6)))
        index = ["data", "index", "recipe=345m_1dp", f"data.data_path={folder}/many_text_document", f"data.data_cache_path={folder}/cache"]
        run([*index, *(f"tokenizer.{name}={path}" for name, path in FILES.items()), "launch.device=cpu"])


def case(folder: Path, name: str, lines: Iterator[bytes]) -> None:
    """One input from its making to its inspection."""
    source, started = folder / f"{name}.jsonl", time.perf_counter()
    with open(source, "wb") as out:
        out.writelines(lines)
    print(f"\n{name}: {source.stat().st_size / 1e9:.2f} GB of JSONL, made in {time.perf_counter() - started:.0f} s", flush=True)
    words = ["--input", str(source), "--output-prefix", str(folder / name), "--append-eod", "--workers", str(CORES)]
    run(["preprocess", *words, *OPTIONS])
    prefix = dataset_prefix(folder / name, "text")
    run(["data", "verify", prefix, "--inputs"])
    run(["data", "inspect", prefix])
    print(f"  {spot_checks(source, prefix, build_tokenizer('GPT2BPETokenizer', **FILES, use_gigatoken=False))}", flush=True)


def texts() -> list[str]:
    """Installed Python sources and documents, and translations, of at least 1,000 characters."""
    found = []
    roots = [Path(json.__file__).parents[1], Path(sys.prefix)]
    for path in sorted(path for root in roots for kind in ("*.py", "*.rst", "*.md", "*.txt", "*.po", "*.html") for path in root.rglob(kind)):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeError, OSError):
            continue
        if 1000 < len(text) < 1 << 20:
            found.append(text)
    return found


def long_lines(size: int) -> Iterator[bytes]:
    """`size` bytes of random cuts of `texts`, 0.1 to 40 thousand characters; two letters are swapped in every fourth."""
    choose, pool, made, number = random.Random(0), texts(), 0, 0
    while made < size:
        text = choose.choice(pool)
        start = choose.randrange(len(text) - 500)
        text = f"{choose.getrandbits(64):x} {text[start : start + int(100 * 400 ** choose.random())]}"
        if number % 4 == 0:
            a, b = choose.sample(string.ascii_lowercase, 2)
            text = text.translate({ord(a): b, ord(b): a})
        line = orjson.dumps({"id": number, "text": text}) + b"\n"
        made, number = made + len(line), number + 1
        yield line


def short_lines(count: int) -> Iterator[bytes]:
    """`count` documents of one to six words; every thousandth is empty."""
    choose = random.Random(1)
    words = sorted({word for text in texts()[::40] for word in re.findall(r"\w+", text)})
    for number in range(count):
        at = choose.randrange(len(words) - 6)
        text = " ".join(words[at : at + 1 + number % 6]) if number % 1000 else ""
        yield orjson.dumps({"text": text}) + b"\n"


def run(words: list[str]) -> None:
    """`yuan` with these words: seconds, memory, and what it says. Its seconds of CPU tell more where the machine is shared."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peaks = {"private and shared": 0, "without mapped files": 0}
    watch = threading.Thread(target=watch_memory, args=(process, peaks))
    watch.start()
    said = process.communicate()[0]
    watch.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    memory = ", ".join(f"{peak / 2**20:.0f} MiB {name}" for name, peak in peaks.items())
    print(f"$ yuan {' '.join(words[:3])} ...: {time.perf_counter() - started:.1f} s ({cpu:.1f} s of CPU), at most {memory}")
    print("".join(f"    {line}\n" for line in said.splitlines()), flush=True)
    if process.returncode:
        sys.exit(f"it ended with {process.returncode}")


def watch_memory(process: subprocess.Popen[str], peaks: dict[str, int]) -> None:
    """The most that the process and its children hold together, twice a second: PSS, and PSS without mapped files, which
    the kernel takes back when it likes."""
    while process.poll() is None:
        now = dict.fromkeys(peaks, 0)
        try:
            tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        for pid in tree:
            try:
                held = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))
            except OSError:
                continue
            now["private and shared"] += int(held.get("Pss", 0)) << 10
            now["without mapped files"] += int(held.get("Pss", 0)) - int(held.get("Pss_File", 0)) << 10
        for name in peaks:
            peaks[name] = max(peaks[name], now[name])
        time.sleep(0.5)


def spot_checks(source: Path, prefix: str, tokenizer: Tokenizer) -> str:
    """Some documents, encoded by Hugging Face's `tokenizers` one at a time, are those of the pair; the counts are those of the lines."""
    reader, checked = IndexedReader(prefix), 0
    choose = random.Random(2)
    with open(source, "rb") as lines:
        for number, line in enumerate(lines):
            if choose.random() * reader.documents < _CHECKED or number in (0, reader.documents - 1):
                ids = tokenizer.encode(json.loads(line)["text"])
                found = [i for sequence in reader.document(number) for i in sequence.tolist()]
                if found != ([*ids, tokenizer.eod] if ids else []):
                    sys.exit(f"document {number} is another")
                checked += 1
    if number + 1 != reader.documents:
        sys.exit(f"{number + 1} lines, and {reader.documents} documents")
    return f"{checked} documents compared with Hugging Face's tokenizers, {reader.documents:,} counted: the same"


if __name__ == "__main__":
    main()
