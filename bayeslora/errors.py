"""The errors a user can do something about."""

from typing import NamedTuple


class InputError(ValueError):
    """A mistake in what the user gave us: it names the thing, what was expected, and what to do.

    The command line prints its message on one line and exits with code 2.

    Example:
        >>> MonteCLoRAConfig(r=0)
        Traceback (most recent call last):
            ...
        bayeslora.errors.InputError: r ... got 0
    """


class Where(NamedTuple):
    """A row of a data set, for what is said about it."""

    dataset: str
    number: int

    def refused(self, why: str) -> InputError:
        return InputError(f"{self.dataset}, row {self.number}: {why}")


class FolderInUseError(InputError):
    """Another process works in the folder: wait for it, stop it, or take another folder."""


class TrainingDivergedError(RuntimeError):
    """The loss, a gradient or a parameter became NaN or infinite; the last good checkpoint is kept.

    Example:
        >>> try:
        ...     fit(bayes, dataset, output_dir="run", max_steps=9, learning_rate=1e30, progress=False)
        ... except TrainingDivergedError as error:
        ...     print(str(error).partition(" at step")[0])
        the loss became nan
    """


class StorageError(RuntimeError):
    """A file could not be written, because the disk is full for one; the last good checkpoint is kept."""
