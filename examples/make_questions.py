"""Questions about Python's functions with their answers, out of the standard library's docstrings.

    python examples/make_questions.py data/questions.jsonl data/questions_valid.jsonl

Each line is {"instruction": "What does os.path.basename do?", "output": "Returns the final component of a pathname."}: the first
paragraph of a function's docstring, where it is one short sentence or two. Every twentieth goes into the second file. The
library's sources are read and never imported; the same Python makes the same files.
"""

import argparse
import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from make_corpus import SKIPPED

LONGEST = 160  # characters of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="file to write, one row per line")
    parser.add_argument("valid", type=Path, help="file for every twentieth row")
    arguments = parser.parse_args()
    rows = list(dict(questions()).items())
    for path, some in ((arguments.train, [row for i, row in enumerate(rows) if i % 20]), (arguments.valid, rows[::20])):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"instruction": question, "output": answer}, ensure_ascii=False) + "\n" for question, answer in some)
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(some):,} rows")


def questions() -> Iterator[tuple[str, str]]:
    """(question, answer) for each public function and method that says in a sentence what it does."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        try:
            module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # some files of the library are templates or broken on purpose
        yield from within(module, ".".join(part for part in parts if part != "__init__"))


def within(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from within(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            answer = " ".join(inspect.cleandoc(ast.get_docstring(child) or "").split("\n\n")[0].split())
            if answer.endswith(".") and len(answer) <= LONGEST:
                yield f"What does {name}.{child.name} do?", answer


if __name__ == "__main__":
    main()
