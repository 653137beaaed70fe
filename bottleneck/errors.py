"""The one exception that means "the user can fix this": shown as a single line, exit code 2."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where (config key or file), and what is allowed."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
