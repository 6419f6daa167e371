"""What `yuan data inspect` shows, line by line; none is longer than 100 columns but for long paths."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

import typer

from launcher.console import human_size, plural
from launcher.errors import UserError

if TYPE_CHECKING:
    from data_tools.inspect import Summary
    from data_tools.tokenizers import Tokenizer

_WIDTH = 48  # of the longest bar; a line then fits into 80 columns
_SHOWN, _ROWS, _COLUMNS = 32, 12, 96  # of a document: tokens one by one, lines of text and their width


def counts(prefix: str, s: Summary) -> list[str]:
    """The files, and how much of what they hold."""
    share = "" if s.is_exact else " among the first and the last 4 million tokens"
    empty = f" ({s.empty:,} of them empty)" if s.empty else ""
    return [
        f"data       {prefix}.bin ({human_size(s.bin_bytes)}) and .idx ({human_size(s.idx_bytes)})",
        f"holds      {plural(s.documents, 'document')}{empty}, {plural(s.sequences, 'sequence')}, {plural(s.tokens, 'token')}",
        f"tokens     {s.dtype}, largest id {s.largest_id}{share}",
    ]


def made(s: Summary) -> list[str]:
    """What the manifest tells: tokenizer, inputs, lines left out, merges and repairs."""
    manifest = s.description
    if manifest is None:
        return ["made       by a tool that left no manifest"]
    lines = []
    tokenizer = manifest.get("tokenizer")
    if tokenizer:
        ending = f"every document ends with {tokenizer['eod']}" if manifest.get("append_eod") else "no end-of-document ids"
        lines.append(f"tokenizer  {tokenizer['type']}, {tokenizer['vocab_size']} ids, sha256 {tokenizer['sha256'][:12]}; {ending}")
    inputs = manifest.get("inputs") or [one for part in manifest.get("merged", []) for one in part.get("inputs") or []]
    if inputs:
        files = inputs[0]["path"] if len(inputs) == 1 else f"{len(inputs)} files, {inputs[0]['path']} to {inputs[-1]['path']}"
        shard = manifest.get("shard", [0, 1])
        share = f", share {shard[0]}/{shard[1]}" if shard[1] > 1 else ""
        how = f"in the template {manifest['template']}" if "template" in manifest else f"under {', '.join(manifest.get('json_keys', []))}"
        lines.append(f"made of    {files}{share}, {how}")
    if "merged" in manifest:
        lines.append(f"merged     {plural(len(manifest['merged']), 'pair')}, {manifest['merged'][0]['name']} to {manifest['merged'][-1]['name']}")
    for line in (manifest.get("repaired") or {}).get("mended", []) + (manifest.get("repaired") or {}).get("lost", []):
        lines.append(f"repaired   {line}")
    for name, noun in (("blank_lines", "blank line"), ("bad_lines", "bad line")):
        if manifest.get(name):
            lines.append(f"left out   {plural(manifest[name], noun)}")
    return lines + [f"           {line}" for line in manifest.get("first_bad_lines", [])]


def lengths(s: Summary) -> list[str]:
    """The histogram: bins that double, the longest bar _WIDTH characters."""
    if not s.documents:
        return []
    percentiles = ", ".join(f"{percent} % {length:,}" for percent, length in s.percentiles.items())
    lines = [f"lengths    {s.tokens / s.documents:,.0f} tokens a document on average, {s.longest:,} at most", f"           percentiles: {percentiles}"]
    most = max(count for *_, count in s.histogram)
    names = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high, _ in s.histogram]
    width = max(map(len, names))
    for name, (*_, count) in zip(names, s.histogram):
        lines.append(f"  {name:>{width}}  {_bar(count / most):<{_WIDTH}} {count:,}".rstrip())
    return lines


def _bar(share: float) -> str:
    """Whole blocks and a part of one, in eighths; `#` where the terminal's encoding has no blocks."""
    eighths = max(round(share * _WIDTH * 8), 1 if share else 0)
    bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    try:
        bar.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "#" * -(-eighths // 8)
    return bar


def document(sequences: list[Any], number: int, tokenizer: Tokenizer | None, everything: bool, mask: list[Any] | None = None) -> list[str]:
    """A document as text, where there is a tokenizer, and its tokens; the beginning of a long one unless `everything`. With
    a `mask`, sequence for sequence, what is trained is green, and its tokens are starred."""
    ids = [int(token) for sequence in sequences for token in sequence]
    trained = [bool(flag) for sequence in mask for flag in sequence] if mask is not None else [False] * len(ids)
    of = f" in {len(sequences)} sequences" if len(sequences) > 1 else ""
    of += f", {sum(trained):,} of them trained (green, *)" if mask is not None else ""
    lines = [f"document {number}: {plural(len(ids), 'token')}{of}"]
    shown = ids if everything else ids[:_SHOWN]
    if tokenizer is None:
        lines.append("  (as text with its tokenizer: recipe=NAME, or --tokenizer-type and its files)")
        words = [_green(str(i)) + "*" if flag else str(i) for i, flag in zip(shown, trained)]
        lines += [f"  {' '.join(words)}" + (" ..." if len(shown) < len(ids) else "")]
        return lines
    outside = [i for i in ids if i >= tokenizer.vocab_size]
    if outside:
        what = f"the document holds the id {outside[0]}, and this {tokenizer.type} has {tokenizer.vocab_size} ids"
        raise UserError(what, f"document {number}", "give the tokenizer that made the data")
    text = _text(ids if everything else ids[: 8 * _SHOWN], trained, tokenizer) if ids else []
    cut = not everything and (len(text) > _ROWS or len(ids) > 8 * _SHOWN)
    lines += [f"  {line}".rstrip() for line in (text[:_ROWS] if cut else text)] + ["  ..."] * cut
    tokens = [(f"{'*' if flag else ' '} {i:7} {tokenizer.decode([i])!r}", flag) for i, flag in zip(shown, trained)]
    lines += [_green(token) if flag else token for token, flag in tokens]
    return lines + [f"  ... {len(ids) - len(shown):,} more (--all)"] * (len(shown) < len(ids))


def _text(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> list[str]:
    """Lines of the text; of a document without trained tokens decoded as one, else run by run."""
    if not any(trained):
        return _wrapped(tokenizer.decode(ids))
    runs = [(flag, [i for i, _ in run]) for flag, run in groupby(zip(ids, trained), key=lambda pair: pair[1])]
    lines = [""]
    for flag, run in runs:
        first, *rest = _wrapped(tokenizer.decode(run))
        coloured = [_green(line) if flag and line else line for line in (first, *rest)]
        lines[-1] += coloured[0]
        lines += coloured[1:]
    return lines


def _green(text: str) -> str:
    return typer.style(text, fg="green", bold=True)  # typer.echo leaves it out where the output is no terminal


def _wrapped(text: str) -> list[str]:
    """Lines of at most _COLUMNS columns, without what a terminal would act upon."""
    from rich.cells import chop_cells

    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return [piece for line in text.split("\n") for piece in (chop_cells(line, _COLUMNS) or [""])]
