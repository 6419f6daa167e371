"""Scripts that take their values by position: which order a command has, and where it went wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.errors import UserError, raise_all
from launcher.migrate.command import Call


@dataclass(frozen=True)
class Kind:
    """What values an argument can have."""

    fits: Callable[[str], bool]
    expected: str


def one_of(*words: str) -> Kind:
    """One of a few words."""
    return Kind(lambda text: text in words, " or ".join(words))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _path(text: str) -> bool:
    return bool(text) and _number(text) is None and text not in ("true", "false", "fp16", "bf16", "sel", "full", "dsw", "dlc")


WHOLE = Kind(lambda text: bool(re.fullmatch(r"[1-9]\d*", text)), "a whole number above 0")
COUNT = Kind(lambda text: bool(re.fullmatch(r"\d+", text)), "a whole number")
TOKENS = Kind(lambda text: (_number(text.replace("_", "")) or -1.0) >= 0 or text == "0", "a number of tokens")
NUMBER = Kind(lambda text: (_number(text) or 0.0) >= 0 and _number(text) is not None, "a number")
RATE = Kind(lambda text: 0 < (_number(text) or 0.0) < 1, "a learning rate such as 1e-5")
SWITCH = one_of("true", "false")
PATH = Kind(_path, "a path")


@dataclass(frozen=True)
class Order:
    """One order of a script's arguments: names with their kinds, and which release has it."""

    release: str
    arguments: tuple[tuple[str, Kind], ...]

    def faults(self, words: list[str]) -> list[int]:
        """Positions whose value does not fit."""
        return [at for at, ((_, kind), word) in enumerate(zip(self.arguments, words)) if not kind.fits(word)]


def order(release: str, names: str, kinds: dict[str, Kind]) -> Order:
    """An order from its names."""
    return Order(release, tuple((name, kinds[name]) for name in names.split()))


def read(call: Call, orders: list[Order]) -> tuple[Order, dict[str, tuple[int, str]]]:
    """The order whose values fit, and name → (number, value).

    Raises:
        UserError: too few or too many arguments, or values that fit no order; each with number, name and what was expected.
    """
    words = call.arguments
    fitting = [one for one in orders if len(one.arguments) == len(words)]
    if not fitting:
        raise _wrong_count(call, orders)
    best = min(fitting, key=lambda one: len(one.faults(words)))
    faults = best.faults(words)
    longer = [one for one in orders if len(one.arguments) == len(words) + 1]
    if faults and any(_missing(one, words) for one in longer):
        raise _wrong_count(call, longer)  # one argument is missing, and what is left has another release's number
    raise_all([_misfit(call, best, at) for at in faults] + _swapped(call, best, words))
    return best, {name: (at + 1, words[at]) for at, (name, _) in enumerate(best.arguments)}


def _misfit(call: Call, best: Order, at: int) -> UserError:
    name, kind = best.arguments[at]
    word = call.arguments[at]
    fix = f"argument {at + 1} in the order of {best.release} is {name}: {kind.expected}"
    if place := next(
        (i for i, (_, other) in enumerate(best.arguments) if i in best.faults(call.arguments) and i != at and other.fits(word)),
        None,
    ):
        fix += f"; the value fits argument {place + 1}, {best.arguments[place][0]}"
    return UserError(f"argument {at + 1} ({name}) is {word!r}, and must be {kind.expected}", call.place, fix)


def _swapped(call: Call, best: Order, words: list[str]) -> list[UserError]:
    """LR and MIN_LR the wrong way round look right one by one."""
    names = [name for name, _ in best.arguments]
    if "MIN_LR" not in names or best.faults(words):
        return []
    lr, low = names.index("LR"), names.index("MIN_LR")
    if float(words[low]) <= float(words[lr]):
        return []
    what = f"argument {low + 1} (MIN_LR) {words[low]} is above argument {lr + 1} (LR) {words[lr]}"
    return [UserError(what, call.place, "are the two swapped? LR is the peak, MIN_LR the floor")]


def _wrong_count(call: Call, orders: list[Order]) -> UserError:
    words = call.arguments
    wanted = sorted({len(one.arguments) for one in orders})
    what = f"{call.basename} takes {' or '.join(map(str, wanted))} arguments, and this has {len(words)}"
    nearest = min(orders, key=lambda one: abs(len(one.arguments) - len(words)))
    guesses: list[str] = []
    if len(words) == len(nearest.arguments) - 1:
        guesses = [text for one in orders for text in _missing(one, words)]
        if guesses:
            return UserError(what, call.place, f"the rest fits if this one is missing: {' or '.join(dict.fromkeys(guesses))}")
    elif len(words) == len(nearest.arguments) + 1:
        guesses = [f"{at + 1} {words[at]!r}" for at in range(len(words)) if not nearest.faults(words[:at] + words[at + 1 :])]
        if guesses:
            return UserError(what, call.place, f"the rest fits without argument {' or '.join(guesses)}")
    faults = nearest.faults(words)
    place = faults[0] if faults else min(len(words), len(nearest.arguments) - 1)
    name, kind = nearest.arguments[place]
    found = repr(words[place]) if place < len(words) else "nothing"
    return UserError(
        what, call.place, f"the first that does not fit is argument {place + 1}, {name}: {kind.expected}, not {found}"
    )


def _missing(one: Order, words: list[str]) -> list[str]:
    """The arguments without which the others fit."""
    found = []
    for at, (name, _) in enumerate(one.arguments):
        rest = Order(one.release, one.arguments[:at] + one.arguments[at + 1 :])
        if len(rest.arguments) == len(words) and not rest.faults(words):
            found.append(f"{at + 1} {name}")
    return found


def number(text: str) -> Any:
    """A number as YAML has it: whole where it is whole."""
    value = float(text)
    return int(value) if re.fullmatch(r"\d+", text) else value
