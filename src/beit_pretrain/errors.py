"""The one exception that the command line shows as a line of text instead of a traceback."""


class UserError(Exception):
    """Something the user can mend (a wrong path, a bad value): printed as `error: <one line>`, exit code 2."""
