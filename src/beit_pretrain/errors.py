"""The one exception that the command line shows as a line of text instead of a traceback."""


class UserError(Exception):
    """Something the user can mend (a wrong path, a bad value): printed as `error: <one line>`, exit code 2."""

    def __init__(self, message: str):
        # A loader worker's error comes back as the text of its whole traceback: what was said stands at its end.
        super().__init__(str(message).rsplit(f"{__name__}.UserError: ", 1)[-1].strip())


def first_line(error: BaseException) -> str:
    """The first line of an exception's message (torch's and Hydra's run over pages)."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
