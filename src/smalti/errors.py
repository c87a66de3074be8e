"""The exceptions that speak to the person at the keyboard."""


class UserError(ValueError):
    """Something the caller can mend. The message is one line: what is wrong, with the offending value, and what to do.

    Commands print it and exit with status 2; any other exception is a bug and keeps its traceback.
    """


class OneProcessError(UserError):
    """A `UserError` that other processes of the run need not share, such as full memory: each that has it says so."""
