"""A small English corpus out of Python's own documentation as it lies on every machine.

    python examples/make_corpus.py data/corpus.jsonl [--max-mb 4]

Its texts are the help topics of `pydoc` and the docstrings of the standard library, whose sources are read and never
imported. Each is one line {"text": ...} of the output; the same Python makes the same file.
"""

import argparse
import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST = 200  # characters; shorter docstrings say little more than a name
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write, one JSON object per line")
    parser.add_argument("--max-mb", type=float, default=4.0, help="stop at this size (default: 4)")
    arguments = parser.parse_args()

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    part = arguments.output.with_name(arguments.output.name + ".part")
    seen: set[str] = set()
    size = 0
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        for text in documents():
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            if size + len(line.encode()) > arguments.max_mb * 1e6:
                break
            if text not in seen:
                seen.add(text)
                size += len(line.encode())
                file.write(line)
    part.replace(arguments.output)
    print(f"{arguments.output}: {len(seen):,} documents, {size / 1e6:.1f} MB")


def documents() -> Iterator[str]:
    """Help topics by name, then each module's docstrings by path, one document per class or module."""
    for name in sorted(topics):
        yield topics[name].strip()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not SKIPPED & set(path.relative_to(library).parts):
            yield from docstrings(path)


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its functions and classes; those of a class's methods follow their class's own."""
    try:
        module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # some files of the library are templates or broken on purpose
    for node in module, *(node for node in ast.walk(module) if isinstance(node, ast.ClassDef)):
        functions = [child for child in node.body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))]
        texts = [text for one in (node, *functions) if (text := described(one))]
        document = "\n\n".join(texts)
        if len(document) >= SHORTEST:
            yield document


def described(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The docstring under the line that it documents, or nothing."""
    text = ast.get_docstring(node)
    if not text:
        return ""
    if isinstance(node, ast.Module):
        return inspect.cleandoc(text)
    head = f"class {node.name}:" if isinstance(node, ast.ClassDef) else f"def {node.name}({ast.unparse(node.args)}):"
    return head + "\n" + "\n".join(f"    {line}".rstrip() for line in inspect.cleandoc(text).splitlines())


if __name__ == "__main__":
    main()
