"""`yuan doctor`: one screen of what this machine has and whether it works, for a bug report."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from launcher.console import columns, hanging
from launcher.doctor import machine, ranks
from launcher.doctor.finding import Finding

HEAD = 20  # columns of a line's head
COLUMNS = 100  # at most


def doctor(
    count: Annotated[
        Optional[int], typer.Option("--ranks", min=0, metavar="N", help="Processes to start; 0: none. Default: one per GPU, or 2.")
    ] = None,
) -> None:
    """Versions, devices, fast paths, disk, and a small computation in real processes. Exit code 1 where something is broken."""
    broken = _show(machine.findings())
    count = ranks.default_ranks() if count is None else count
    if count:
        broken |= _show(ranks.findings(count))
    raise typer.Exit(1 if broken else 0)


def _show(findings: list[Finding]) -> bool:
    """Print them as they come. Whether one is broken."""
    width = min(COLUMNS, columns(sys.stdout) or COLUMNS)
    for one in findings:
        mark = "BROKEN " if one.broken else ""
        typer.echo(hanging(f"{one.name:<{HEAD}}", f"{mark}{one.text}", width))
        if one.mend:
            typer.echo(hanging(" " * HEAD + "mend: ", one.mend, width))
    return any(one.broken for one in findings)
