"""The run that the command line's tests have fitted."""

from tests.command.conftest import data, model, run  # noqa: F401
