"""Mistakes that a user can mend."""


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

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)
