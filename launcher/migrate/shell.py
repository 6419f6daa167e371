"""A shell script's commands with their variables filled in, without running anything.

Understood: assignments (also `export`), quotes, `$X`, `${X}`, `${X:-y}`, `$1`, arrays, `$((...))` on whole numbers, line
continuation, `shift`, `if` on strings and numbers, `case` on strings. Anything else is noted with its line. A variable that nothing
sets stays as `$X`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from launcher.migrate.expand import BLANK, NAME, PLACEHOLDER, Variables, closing, expand

ASSIGNMENT = re.compile(rf"({NAME})(\+?)=(.*)", re.S)
REDIRECT = re.compile(r"(?:\d*|&)(?:>>|>&|>|<)(?:&?\d)?")
PROMPT = re.compile(r"^(?:\([\w.-]+\)\s*)?[\w.-]+@[\w.-]+:[^\s#$]*\s*[#$]\s+", re.M)
OPENERS = {"for": "done", "while": "done", "until": "done", "case": "esac", "select": "done", "{": "}", "function": "}"}
DECLARE = {"export", "local", "readonly", "declare", "typeset"}
COMPARE = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-gt": operator.gt,
    "-ge": operator.ge,
    "-lt": operator.lt,
    "-le": operator.le,
}


@dataclass(frozen=True)
class Command:
    """One simple command: its words, the line it begins on, the variables set before it, and which of them it inherits."""

    words: list[str]
    line: int = 0
    variables: dict[str, str] = field(default_factory=dict)
    inherited: frozenset[str] = frozenset()


@dataclass
class Script:
    """What reading a script gave.

    Attributes:
        commands: in their order.
        notes: (line, text) of what was not understood and left out.
        variables: as they stand at the end.
    """

    commands: list[Command] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    variables: Variables = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)


def read_script(text: str, variables: Variables | None = None, arguments: list[str] | None = None) -> Script:
    """Read a script's text, or commands pasted from a terminal with their prompts.

    Args:
        text: the script.
        variables: set before it starts.
        arguments: its `$1`, `$2`, …
    """
    script = Script(variables=dict(variables or {}), exported=set(variables or {}))
    _give(script.variables, list(arguments or []))
    _Reader(script).read(PROMPT.sub("", text.replace("\r\n", "\n")))
    return script


def _give(variables: Variables, arguments: list[str]) -> None:
    """`$1`, `$2`, … and `$@`."""
    for name in [name for name in variables if name.isdigit()]:
        del variables[name]
    variables |= {str(number): word for number, word in enumerate(arguments, 1)} | {"@": arguments}


@dataclass
class _Statement:
    line: int
    tokens: list[str]
    joined: str  # what stands before it: newline ; & && || |


def _statements(text: str, script: Script) -> Iterator[_Statement]:
    """Cut at newlines, `;`, `&&`, `||`, `|`, `&`; tokens keep their quotes."""
    tokens, joined, at, started = [], "\n", 0, 0
    while at <= len(text):
        rest = text[at:]
        if blank := re.match(r"\\[ \t]+\n", rest):
            line = text.count("\n", 0, at) + 1
            script.notes.append((line, "a blank after the backslash: a shell ends the command here; read as if it went on"))
            at += blank.end()
        elif skip := re.match(r"(?:[ \t]|\\\n)+", rest):
            at += skip.end()
        elif comment := re.match(r"#[^\n]*", rest):
            at += comment.end()
        elif not rest or (cut := re.match(r"&&|\|\||;;|[;\n&|](?!>)", rest)):
            if tokens:
                yield _Statement(text.count("\n", 0, started) + 1, tokens, joined)
            ended = joined == ";;" and not tokens  # also where the next pattern stands on a line of its own
            joined, tokens = (";;" if ended else cut.group() if rest else ""), []
            at += max(1, cut.end() if rest else 1)
        elif (redirect := REDIRECT.match(rest)) and redirect.group() and not PLACEHOLDER.match(rest):
            at += redirect.end()
            at += re.match(r"[ \t]*", text[at:]).end()
            if not re.search(r"&\d$", redirect.group()):
                at = _token_end(text, at)
        else:
            started = started if tokens else at
            end = _token_end(text, at)
            tokens.append(text[at:end])
            at = end


def _token_end(text: str, at: int) -> int:
    """Where the token that begins at `at` ends: at a blank or sign outside of quotes and brackets."""
    start = at
    while at < len(text):
        rest = text[at:]
        if hit := PLACEHOLDER.match(rest):
            at += hit.end()
        elif hit := re.match(r"'[^']*'|\"(?:\\.|[^\"\\])*\"|`[^`]*`|\$\{[^}]*\}|\\.", rest, re.S):
            if hit.group() == "\\\n":
                return at
            at += hit.end()
        elif rest.startswith("$("):
            at = closing(text, at + 1)
        elif rest[0] == "(" and re.fullmatch(rf"{NAME}\+?=", text[start:at]):
            at = closing(text, at)
        elif rest[0] in " \t\n;&|<>" or (rest[0] in "()" and at > start):
            return at
        else:
            at += 1
            if rest[0] in "()":
                return at
    return at


class _Reader:
    """Walks the statements; `blocks` are the open ifs and loops."""

    def __init__(self, script: Script):
        self.script, self.blocks = script, []

    def read(self, text: str) -> None:
        for statement in _statements(text, self.script):
            self._one(statement)

    def _note(self, line: int, text: str) -> None:
        self.script.notes.append((line, text))

    @property
    def _live(self) -> bool:
        return all(block["live"] for block in self.blocks)

    def _one(self, statement: _Statement) -> None:
        tokens, head = statement.tokens, statement.tokens[0]
        closing = self.blocks[-1]["end"] if self.blocks else None
        if closing == "esac" and (self.blocks[-1]["state"] == "pattern" or statement.joined == ";;" or head == "esac"):
            self._pattern(statement)
        elif closing not in (None, "fi", "esac"):  # inside of a loop: only its end matters
            self.blocks[-1]["depth"] += head in OPENERS and OPENERS[head] == closing
            if head == closing or (closing == "}" and tokens[-1] == "}"):
                self.blocks[-1]["depth"] -= 1
                if self.blocks[-1]["depth"] == 0:
                    self.blocks.pop()
        elif head == "case" and len(tokens) > 2:
            self._case(statement)
        elif head in OPENERS or tokens[1:3] == ["(", ")"] or head == "(":
            if self._live:
                self._note(statement.line, f"`{' '.join(tokens)[:40]}`: loops and functions are not read")
            end = ")" if head == "(" else OPENERS.get(head, "}")
            self.blocks.append({"end": end, "live": False, "depth": 1})
        elif head == "if":
            self.blocks.append({"end": "fi", "live": self._live, "state": "test", "tests": [], "done": False, "depth": 1})
            self._test(statement, tokens[1:])
        elif closing == "fi" and head in ("elif", "else", "then", "fi"):
            self._branch(statement, head, tokens[1:])
        elif closing == "fi" and self.blocks[-1]["state"] == "test":
            self._test(statement, tokens)
        elif self._live:
            self._command(statement)

    def _case(self, statement: _Statement) -> None:
        tokens = statement.tokens
        words = expand(tokens[1], self.script.variables, split=False)
        word = words[0] if words else ""
        known = not re.search(r"[$`]", word)
        if self._live and not known:
            self._note(statement.line, f"`case {word} in`: what is set nowhere here decides, and what depends on it is left out")
        block = {"end": "esac", "live": False, "state": "pattern", "word": word, "patterns": [], "done": not (known and self._live)}
        self.blocks.append(block)
        if tokens[3:]:
            self._pattern(_Statement(statement.line, tokens[3:], "\n"))

    def _pattern(self, statement: _Statement) -> None:
        """`a|b) commands`, of which the first that fits the word counts; or `esac`."""
        block, tokens = self.blocks[-1], statement.tokens
        if tokens[0] == "esac":
            self.blocks.pop()
            return
        block["state"], block["live"] = "pattern", False
        end = tokens.index(")") if ")" in tokens else len(tokens)
        block["patterns"] += [self._text(token) for token in tokens[:end] if token != "("]
        if end == len(tokens):  # `a|`
            return
        fits = not block["done"] and any(fnmatchcase(block["word"], pattern) for pattern in block["patterns"])
        block |= {"state": "body", "live": fits, "done": block["done"] or fits, "patterns": []}
        if tokens[end + 1 :]:
            self._one(_Statement(statement.line, tokens[end + 1 :], "\n"))

    def _test(self, statement: _Statement, tokens: list[str]) -> None:
        joined = statement.joined if statement.joined in ("&&", "||") else "&&"
        self.blocks[-1]["tests"].append((joined, self._holds(tokens), statement.line))

    def _branch(self, statement: _Statement, head: str, rest: list[str]) -> None:
        block = self.blocks[-1]
        if head == "fi":
            self.blocks.pop()
            return
        outer = all(one["live"] for one in self.blocks[:-1])
        if head == "then":
            held: bool | None = True
            for joined, value, _ in block["tests"]:
                unknown = value is None or held is None
                held = None if unknown else (held and value) if joined == "&&" else (held or value)
            if held is None and outer and not block["done"]:
                self._note(block["tests"][0][2], "this `if` is not understood: what depends on it is left out")
                block["done"] = True
            block |= {"state": "body", "live": outer and not block["done"] and bool(held), "tests": []}
            block["done"] = block["done"] or bool(held)
        elif head == "else":
            block |= {"state": "body", "live": outer and not block["done"]}
        else:
            block |= {"state": "test", "live": outer}
            self._test(statement, rest)
            return
        if rest:
            self._one(_Statement(statement.line, rest, "\n"))

    def _holds(self, tokens: list[str]) -> bool | None:
        """`[ "$A" == x ]` and kin; None where it cannot be told."""
        words = [self._text(token) for token in tokens]
        if len(words) < 3 or words[0] not in ("[", "[[", "test"):
            return None
        words = words[1:] if words[0] == "test" else words[1:-1]
        if any(word.startswith("$(") for word in words):
            return None
        if len(words) == 2 and words[0] in ("-z", "-n"):
            return (words[1] == "") == (words[0] == "-z")
        if len(words) == 3 and words[1] in ("=", "==", "!="):
            return (words[0] == words[2]) == (words[1] != "!=")
        if len(words) == 3 and words[1] in COMPARE and all(re.fullmatch(r"-?\d+", words[i]) for i in (0, 2)):
            return COMPARE[words[1]](int(words[0]), int(words[2]))
        return None

    def _text(self, token: str) -> str:
        """A token as one word; what nothing sets is empty, as in a shell."""
        return re.sub(rf"\$(?:{NAME}|\d+)", "", " ".join(expand(token, self.script.variables)))

    def _command(self, statement: _Statement) -> None:
        tokens, variables = list(statement.tokens), self.script.variables
        if statement.joined == "|":
            return
        declared = tokens[0] in DECLARE
        if declared:
            exports, tokens = tokens[0] == "export", [token for token in tokens[1:] if not token.startswith("-")]
            self.script.exported |= {re.match(rf"{NAME}|", token).group() for token in tokens if exports}
        before: Variables = {}
        while tokens and (hit := ASSIGNMENT.fullmatch(tokens[0])):
            name, adds, raw = hit.groups()
            value = _assigned(raw, variables)
            old = variables.get(name, [] if isinstance(value, list) else "")
            before[name] = old + value if adds and type(old) is type(value) else value
            tokens.pop(0)
        if not tokens or declared:
            variables |= before
            return
        words = [word for token in tokens for word in expand(token, variables)]
        if words[:1] == ["shift"] and len(words) < 3 and "".join(words[1:]).isdigit() is (len(words) == 2):
            _give(variables, variables["@"][int((words[1:] or ["1"])[0]) :])
        elif words:
            flat = {**variables, **before}
            known = {name: value if isinstance(value, str) else " ".join(value) for name, value in flat.items()}
            inherited = frozenset(self.script.exported | before.keys())
            self.script.commands.append(Command([word.replace(BLANK, " ") for word in words], statement.line, known, inherited))


def _assigned(raw: str, variables: Variables) -> str | list[str]:
    raw = PLACEHOLDER.sub(lambda hit: hit.group().replace(" ", "_"), raw)  # one word, wherever it is used
    if raw.startswith("(") and raw.endswith(")"):
        inner = Script(variables=variables)
        items = [token for one in _statements(raw[1:-1], inner) for token in one.tokens]
        return [word for token in items for word in expand(token, variables)]
    return " ".join(expand(f'"{raw}"' if not re.search(r"[\"'`\\]", raw) else raw, variables, split=False))
