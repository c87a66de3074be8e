"""Exceptions whose message is meant for the user, and the checks of configs that raise them."""


class UserError(ValueError):
    """An error that the caller can fix. The message is one line: what is wrong, the offending value, and what to do.

    Commands print it and exit with status 2; any other exception is a bug and keeps its traceback.
    """


def require_at_least_one(config: object, *names: str) -> None:
    """Refuses a config in which one of the named numbers is below 1.

    Raises:
        UserError: naming the first such number.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")


class OneProcessError(UserError):
    """A `UserError` that may occur in only some processes of a run, such as full memory. Each of them prints it."""
