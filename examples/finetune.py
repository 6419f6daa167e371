"""The quickstart's model, fine-tuned: what it says to questions before, and after it was shown how questions are answered.

    python examples/finetune.py [key=value ...]

After `make quickstart`, in the same folder. Every step is printed as the command that one would type, then run. A key=value
overrides a value of recipes/quickstart_sft.yaml, for example training.epochs=1.
"""

import json
import sys
import time
from pathlib import Path

from launcher.engine.generate.records import unescape
from quickstart import HERE, run, say

ROWS, VALID, ASKED = Path("quickstart/questions.jsonl"), Path("quickstart/questions_valid.jsonl"), Path("quickstart/asked.jsonl")
BEFORE, AFTER = Path("quickstart/before.txt"), Path("quickstart/after.txt")
QUESTIONS = 5


def main(overrides: list[str]) -> None:
    started = time.monotonic()
    if not Path("runs/quickstart/checkpoints").is_dir():
        sys.exit("error: there is no model to fine-tune in runs/quickstart\n  fix:   make quickstart, or python examples/quickstart.py, in this folder")
    say("1 Questions and answers: what Python's functions do, by their own documentation")
    run("python", HERE / "make_questions.py", ROWS, VALID, makes=VALID)
    held_out = [json.loads(line) for line in VALID.read_text(encoding="utf-8").splitlines()]
    asked = held_out[:: max(1, len(held_out) // QUESTIONS)][:QUESTIONS]
    ASKED.write_text("".join(json.dumps({"instruction": row["instruction"]}) + "\n" for row in asked), encoding="utf-8")
    say("2 Before: the model goes on from each question, as from any text")
    ask("runs/quickstart", BEFORE)
    say("3 Fine-tuning: loss on the answers alone")
    run("yuan", "sft", "recipe=quickstart_sft", *overrides)
    say("4 After: the same questions, in the form that it was trained in")
    ask("runs/quickstart_sft", AFTER)
    say(f"Done in {time.monotonic() - started:.0f} s")
    for row, before, after in zip(asked, *(path.read_text(encoding="utf-8").splitlines() for path in (BEFORE, AFTER)), strict=True):
        print(f"\n{row['instruction']}\n  before  {unescape(before).strip()[:160]!r}\n  after   {unescape(after).strip()!r}\n  true    {row['output']!r}")


def ask(model: str, output: Path) -> None:
    run("yuan", "generate", "--input", ASKED, "--output", output, "--load", model, "--max-new-tokens", "48", "launch.nproc_per_node=1")


if __name__ == "__main__":
    main(sys.argv[1:])
