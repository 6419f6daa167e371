"""How one machine's part of a job ended, and how the whole did: the worst of its parts, the first cause first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

# Later ones explain earlier ones: ranks fail because a machine was lost; where a signal killed ranks that had no
# handler yet (cut), their peers' failures follow from it.
KINDS = ("done", "stopped", "failed", "lost", "cut", "mistake", "killed")


@dataclass
class Outcome:
    """
    Attributes:
        kind: done; stopped: by a signal, in order; failed: a rank failed; lost: nothing is heard of the machine; cut: a
            signal ended ranks that were not up yet; mistake: the user's; killed: by a second Ctrl-C.
        machine: the machine's number.
        text: what happened, in one line.
        order: sorts failures of several machines, the first cause first.
        mistakes: fields of UserErrors.
        again: the job is to be started again.
    """

    kind: str
    machine: int = 0
    text: str = ""
    order: list[Any] = field(default_factory=list)
    mistakes: list[dict[str, str]] = field(default_factory=list)
    again: bool = False

    @property
    def breaks(self) -> bool:
        """Whether the other machines' ranks cannot go on."""
        return self.kind not in ("done", "stopped")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def worst(parts: Iterable[Outcome]) -> Outcome:
    """The part that tells how the whole ended."""
    parts = list(parts)
    kind = max((one.kind for one in parts), key=KINDS.index)
    return min((one for one in parts if one.kind == kind), key=lambda one: (one.order, one.machine))
