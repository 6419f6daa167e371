"""Mistakes that a user can mend."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can mend: printed in a few plain lines, exit code 2, no traceback.

    Args:
        what: what is wrong, naming the thing (`training.lr is negative: -1.0`).
        where: the place to look at: a file with its line, a recipe key, an option. May be empty.
        fix: what to do about it, best as a line to type. May be empty.
    """

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    @property
    def each(self) -> Sequence[UserError]:
        """The mistakes one by one; here only this one."""
        return (self,)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class UserErrors(UserError):
    """Several mistakes found at once, so that a user mends them in one go."""

    def __init__(self, errors: Sequence[UserError]):
        super().__init__(f"{len(errors)} mistakes")
        self.errors = tuple(errors)

    @property
    def each(self) -> Sequence[UserError]:
        return self.errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def of_system(error: OSError, where: str = "", then: str = "") -> UserError:
    """What the system refused, at its file or else at `where`; `then` follows the mend."""
    return UserError(f"cannot read or write: {error.strerror or error}", str(error.filename or where), f"see to the space and the rights there{then}")


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise the one error as it is, several as one `UserErrors`, and nothing where there is none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserErrors(errors)
