"""From text to answers on this machine: a corpus, a tokenizer, token ids, a trained model, its answers.

    python examples/quickstart.py [key=value ...]

Every step is printed as the command that one would type, then run in the current folder. What is there already is kept,
and a training that was stopped goes on where it stood; `make clean` removes it all. A key=value overrides a value of
recipes/quickstart.yaml, for example training.train_iters=50.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from launcher.engine.generate.records import unescape

HERE = Path(os.path.relpath(Path(__file__).parent))
CORPUS, TOKENIZER, IDS = Path("quickstart/corpus.jsonl"), Path("quickstart/tokenizer"), Path("quickstart/data_text_document.idx")
QUESTIONS, ANSWERS = HERE / "pred_input.jsonl", Path("output.txt")


def main(overrides: list[str]) -> None:
    started = time.monotonic()
    say("1 Text: Python's own documentation, one document per line")
    run("python", HERE / "make_corpus.py", CORPUS, makes=CORPUS)
    say("2 Tokenizer: learn 4,096 pieces of words from that text")
    model = TOKENIZER.with_suffix(".model")
    run("yuan", "tokenizer", "train", "--input", CORPUS, "--output-prefix", TOKENIZER, "--vocab-size", "4096", makes=model)
    say("3 Token ids: the text in Megatron's .bin and .idx")
    run("yuan", "preprocess", "recipe=quickstart", makes=IDS)
    say("4 Training: two processes, each with half of every batch; watch the loss fall")
    run("yuan", "pretrain", "recipe=quickstart", *overrides)
    say("5 Answers: the model goes on from each line of the questions")
    run("yuan", "generate", "--input", QUESTIONS, "--output", ANSWERS, "--repetition-penalty", "1.2")
    say(f"Done in {time.monotonic() - started:.0f} s: {QUESTIONS} and what the model made of it ({ANSWERS})")
    show_answers()


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*words: str | Path, makes: Path | None = None) -> None:
    """Print and run one command; a step whose product is there already is passed over."""
    print(f"$ {shlex.join(map(str, words))}", flush=True)
    if makes and makes.exists():
        print(f"{makes} is there already", flush=True)
        return
    # `yuan` and `python` are those of the environment that runs this file, activated or not
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    process = subprocess.Popen([str(word) for word in words], env=environment)
    stopped = False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # Ctrl-C went to the command as well: it saves what it has and ends by itself
            stopped = True
    if stopped or process.returncode == 130:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if process.returncode:
        sys.exit(process.returncode)


def show_answers() -> None:
    """Each question with its answer behind it, line ends and all."""
    questions = [json.loads(line)["query"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    answers = ANSWERS.read_text(encoding="utf-8").splitlines()
    for question, answer in zip(questions, answers, strict=True):
        print(f"\n[{question}]{unescape(answer).rstrip()}")


if __name__ == "__main__":
    main(sys.argv[1:])
