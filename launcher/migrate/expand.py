"""The words that a token of a shell script stands for: quotes, variables, arrays, arithmetic."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
PLACEHOLDER = re.compile(r"<[A-Za-z](?:[^<>\n|&;]*[^<>\n|&;\s])?>")  # `DATA_PATH=<Specify path>`, as examples have it
BLANK = "\ue000"  # a blank inside of `$(date +%s)`, until the words are cut
ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip

Variables = dict[str, "str | list[str]"]


def expand(token: str, variables: Variables, split: bool = True) -> list[str]:
    """The words that a token with its quotes and variables stands for; unquoted variables are cut at blanks."""
    fields: list[str] = []
    current: str | None = None
    at = 0

    def add(text: str) -> None:
        nonlocal current
        current = (current or "") + text

    def flush() -> None:
        nonlocal current
        if current is not None:
            fields.append(current)
        current = None

    def splice(value: str | list[str], quoted: bool) -> None:
        """Put a variable's value in: quoted as it is, an array's items as fields; unquoted cut at blanks."""
        for position, part in enumerate(value if isinstance(value, list) else [value]):
            if position:
                flush()
            if quoted or not split:
                add(part)
                continue
            for piece in re.findall(r"[ \t\n]+|[^ \t\n]+", part):
                flush() if piece.isspace() else add(piece)

    while at < len(token):
        rest = token[at:]
        if hit := re.match(r"'([^']*)'", rest):
            add(hit.group(1))
        elif hit := re.match(r'"((?:\\.|[^"\\])*)"', rest, re.S):
            inner = re.sub(r"\\\n", "", hit.group(1))
            pieces = [(_value(text, variables) if kind else re.sub(r'\\([$`"\\])', r"\1", text)) for kind, text in _pieces(inner)]
            if [] not in pieces or any(pieces):  # "$@" without arguments is no word, not an empty one
                add("")
            for piece in filter(None, pieces):
                splice(piece, True)
        elif hit := re.match(r"\\(.?)", rest, re.S):
            add("" if hit.group(1) == "\n" else hit.group(1))
        elif piece := _variable(rest):
            splice(_value(piece, variables), False)
            at += len(piece)
            continue
        else:
            hit = PLACEHOLDER.match(rest) or re.match(r".", rest, re.S)
            add(hit.group() if len(hit.group()) == 1 else hit.group().replace(" ", "_"))
        at += hit.end()
    flush()
    return fields


def _pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Plain text (False) and variables (True) in turn."""
    at = begin = 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
        elif piece := _variable(text[at:]):
            yield False, text[begin:at]
            yield True, piece
            at = begin = at + len(piece)
        else:
            at += 1
    yield False, text[begin:]


def _variable(text: str) -> str:
    """The variable, arithmetic or command substitution that `text` begins with; empty where there is none."""
    if text.startswith("$("):
        return text[: closing(text, 1)]
    hit = re.match(rf"\$\{{[^}}]*\}}|\${NAME}|\$[0-9@*#?$!-]|`[^`]*`", text)
    return hit.group() if hit else ""


def _value(piece: str, variables: Variables) -> str | list[str]:
    if piece.startswith("$((") and piece.endswith("))"):
        number = _arithmetic(piece[3:-2], variables)
        return _whole(piece) if number is None else str(number)
    if piece.startswith(("$(", "`")):
        return _whole(piece)
    inner = piece[2:-1] if piece.startswith("${") else piece[1:]
    if hit := re.fullmatch(rf"({NAME}|\d+)(?::?[-=](.*))?", inner, re.S):
        name, default = hit.groups()
        value = variables.get(name)
        if default is not None and not value:
            return " ".join(expand(f'"{default}"', variables))
        return f"${name}" if value is None else value if isinstance(value, str) else (value or [""])[0]
    if hit := re.fullmatch(rf"({NAME})\[[@*]\]", inner):
        value = variables.get(hit.group(1), f"${hit.group(1)}")
        return value if isinstance(value, list) else [value]
    if inner in ("@", "*", "#") and "@" in variables:
        words = variables["@"]
        return words if inner == "@" else " ".join(words) if inner == "*" else str(len(words))
    return "$" + inner  # without braces: OmegaConf would take `${...}` for an expression of its own


def _whole(piece: str) -> str:
    """What is not known stays one word, also where a variable that holds it is cut at blanks."""
    return re.sub(r"\s", BLANK, piece)


def _arithmetic(text: str, variables: Variables) -> int | None:
    """Whole numbers with + - * / % and brackets; None where there is more to it."""
    filled = re.sub(rf"\$\{{({NAME})\}}|\$?({NAME})", lambda hit: str(variables.get(hit.group(1) or hit.group(2), "?")), text)

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError(text)

    try:
        return value(ast.parse(filled.strip().replace("/", "//"), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def closing(text: str, at: int) -> int:
    """Behind the bracket that closes the one at `at`; comments and quotes inside do not count."""
    depth = 0
    while at < len(text):
        if hit := re.match(r"'[^']*'|\"(?:\\.|[^\"\\])*\"|\\.|(?<=\s)#[^\n]*", text[at:], re.S):
            at += hit.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
        if depth == 0:
            break
    return at
