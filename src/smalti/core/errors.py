"""The exceptions that speak to the person at the keyboard."""


class UserError(ValueError):
    """Something the caller can mend. The message is one line: what is wrong, with the offending value, and what to do.

    Commands print it and exit with status 2; any other exception is a bug and keeps its traceback.
    """


def require_at_least_one(config: object, *names: str) -> None:
    """Refuses a config of which one of these numbers is below 1.

    Raises:
        UserError: naming it.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")


class OneProcessError(UserError):
    """A `UserError` that other processes of the run need not share, such as full memory: each that has it says so."""
