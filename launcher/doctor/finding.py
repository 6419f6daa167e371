"""One line of the doctor's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Finding:
    """
    Attributes:
        name: the line's head.
        text: what there is.
        mend: what to do about it; shown below. May be empty.
        broken: runs will fail: `yuan doctor` ends with exit code 1.
    """

    name: str
    text: str
    mend: str = ""
    broken: bool = False
