"""The one exception that the command line turns into a sentence and exit code 2."""


class InputError(Exception):
    """Input that the user can correct; the message says what came, what was wanted and what to do."""
