"""Errors a user can cause or must act on. The command line prints them as one sentence each.

Everything else that goes wrong is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """Base of the errors below: shown without a traceback.

    ``exit_code`` is 2 for a mistake in what the user typed or wrote, 1 for a run that failed.
    """

    exit_code = 2


class ConfigError(UserError):
    """A config file, an override or the layout asked for is wrong."""


class DataError(UserError):
    """A corpus, tokenizer or data set on disk is missing, damaged or does not fit the config."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit the config."""


class ProofError(UserError):
    """The live attention module differs from the fp64 reference: training would be wrong."""

    exit_code = 1


class TrainingError(UserError):
    """Training stopped by itself: non-finite loss, out of memory."""

    exit_code = 1


class Stopped(UserError):
    """Not an error: the run stopped as it was asked to, and everything is saved."""

    exit_code = 0
