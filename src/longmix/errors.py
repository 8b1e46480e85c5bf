"""Errors a user can cause and cure.

Each is raised once, close to where the user made the choice, with a message that names the cause and the cure. The
entry points print that message alone and exit with `exit_code`; any other exception is a defect of longmix and keeps
its traceback.
"""


class LongmixError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_code = 2


class ConfigError(LongmixError):
    """A setting is unknown, missing or impossible; the message names its key."""


class DataError(LongmixError):
    """A corpus, tokenizer or token file is missing, damaged or does not fit the rest."""


class CheckpointError(LongmixError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class StorageError(LongmixError):
    """A folder cannot be written or the disk is full; nothing that was complete before is touched."""


class NonFiniteError(LongmixError):
    """A loss or a gradient became infinite or NaN and the run was stopped."""

    exit_code = 3


class Interrupted(LongmixError):
    """A signal ended the run after its state was saved; running again with `resume=auto` continues it."""

    exit_code = 75
