"""Faults in a user's files. The commands print them as they print their own `UserError`."""


class DataError(ValueError):
    """Something is wrong with a file or its content, and the user can mend it.

    Args:
        what: what is wrong, naming the thing.
        where: the file, with its line where there is one.
        fix: what to do about it.
    """

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what, where, fix)  # all three, so that pickling between processes keeps them
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return " | ".join(part for part in (self.what, self.where, self.fix) if part)


class TokenizerError(DataError):
    """A tokenizer's files or options do not make a tokenizer."""


class InputError(DataError):
    """A JSONL file holds something that cannot be tokenized."""


class IndexedError(DataError):
    """A .bin/.idx pair is missing, torn or of another format."""
