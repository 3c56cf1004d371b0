"""The one error type that the command line shows as a sentence.

A StochaError's message is one sentence that names what was given, what was expected and what to do. `cli.run` prints
it and exits with status 2; any other exception is a bug and keeps its traceback.
"""


class StochaError(ValueError):
    """A user's mistake, or a source, folder or Hub that does not allow what was asked."""
