"""The exceptions that the command line shows as a line of text instead of a traceback."""

import errno


class UserError(Exception):
    """Something the user can mend (a wrong path, a bad value): printed as `error: <one line>`, exit code 2."""

    def __init__(self, message: str):
        # A loader worker's error comes back as the text of its whole traceback: what was said stands at its end.
        name = f"{type(self).__module__}.{type(self).__name__}: "
        super().__init__(str(message).rsplit(name, 1)[-1].strip())


class AllRanksError(UserError):
    """A UserError that every process of a run raises alike: only the first one says it."""


def stop_if_memory_was_short(error: BaseException, what: str) -> None:
    """Raise UserError if that is why `what` could not be decoded: no fault of the image, which nothing may replace.

    Python's and the system's words for it, and those of torch's allocator. Not Pillow's "out of memory error" of a
    decoder, which damaged files provoke.
    """
    if (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
    ):
        raise UserError(f"not enough memory to decode {what}; fewer workers need less") from None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message (torch's and Hydra's run over pages)."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
