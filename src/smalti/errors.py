"""The one exception that speaks to the person at the keyboard."""


class UserError(ValueError):
    """Something the caller can mend. The message is one line: what is wrong, with the offending value, and what to do.

    Commands print it and exit with status 2; any other exception is a bug and keeps its traceback.
    """
