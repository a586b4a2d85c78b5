"""Errors that a user can mend: one line that names the file, flag or value and the way out."""


class FastleError(Exception):
    """What was asked for cannot be done; the commands print the message without a traceback and exit with 1."""


class DataError(FastleError):
    """The images are missing, unreadable or not in a layout that fastle knows."""


class SaidByAnother(FastleError):
    """What went wrong has been said by another rank; the message is empty."""

    def __init__(self) -> None:
        super().__init__("")
