"""User errors: the command line prints them as one line instead of a traceback."""

import errno


class UserError(Exception):
    """An error that the user can fix (a wrong path, a bad value): printed as `error: <one line>`, exit code 2."""

    def __init__(self, message: str):
        # An error in a loader worker arrives as the text of its traceback; keep only the message at its end.
        name = f"{type(self).__module__}.{type(self).__name__}: "
        super().__init__(str(message).rsplit(name, 1)[-1].strip())


class AllRanksError(UserError):
    """A UserError that every process of a run raises: only rank 0 prints it."""


def stop_if_memory_was_short(error: BaseException, what: str) -> None:
    """Raise UserError if `error` means that there was too little memory to decode `what`; such an image is not corrupt.

    Recognises MemoryError, ENOMEM and torch's allocator. Pillow's "out of memory error" does not count, since damaged
    files cause it.
    """
    if (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
    ):
        raise UserError(f"not enough memory to decode {what}; fewer workers need less memory") from None


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message (messages of torch and Hydra can be very long)."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
