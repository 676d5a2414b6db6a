"""The errors a user can do something about."""


class InputError(ValueError):
    """A mistake in what the user gave us: it names the thing, what was expected, and what to do.

    The command line prints its message on one line and exits with code 2.
    """


class FolderInUseError(InputError):
    """Another process works in the folder: wait for it, stop it, or take another folder."""


class TrainingDivergedError(RuntimeError):
    """The loss, a gradient or a parameter became NaN or infinite; the last good checkpoint is kept."""


class StorageError(RuntimeError):
    """A file could not be written, because the disk is full for one; the last good checkpoint is kept."""
