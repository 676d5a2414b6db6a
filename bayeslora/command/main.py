"""The entry of the command line: one command, its exit code, and what ends it early."""

import argparse
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from bayeslora.command.flags import as_flags
from bayeslora.command.options.idle import refuse_idle
from bayeslora.command.parser import build_parser
from bayeslora.command.terminal import READER_LEFT, any_encoding, discard_output
from bayeslora.errors import InputError, StorageError, TrainingDivergedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, 2 and one line for a mistake the user can mend, or 141 when nobody reads on."""
    with any_encoding():
        try:
            try:
                return _run(argv)
            finally:
                if sys.stdout is not None:  # >&-
                    sys.stdout.flush()
        except BrokenPipeError:  # | head
            discard_output()
            return READER_LEFT
        except OSError as error:
            if error.errno is None:  # not of the file system: of a library's own making
                raise
            discard_output()
            print(f"bayeslora: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
            return 2


def _run(argv: Sequence[str] | None) -> int:
    # PEFT and transformers announce each other's deprecations, which a user of this command cannot act on
    warnings.filterwarnings("ignore", category=FutureWarning)
    arguments = argparse.Namespace(command="")
    try:
        arguments = build_parser().parse_args(argv)
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        arguments.command_line = shlex.join(["bayeslora", *words])
        refuse_idle(arguments)
        with _stopping_when_terminated():
            given = _resolve(arguments.check)(arguments) if arguments.check else ()
            _resolve(arguments.run)(arguments, *given)
    except (InputError, StorageError, TrainingDivergedError) as error:
        of_file = getattr(arguments, "study", None)  # whose entries have the names that Python has
        said = str(error) if of_file else as_flags(str(error), arguments)
        print(f"bayeslora: {' '.join(said.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        go_on = _GO_ON.get(arguments.command, "")
        print(f"bayeslora: {arguments.command} interrupted{go_on}", file=sys.stderr)
        return 130
    return 0


_GO_ON = {
    "fit": "; the same command with --resume continues it",
    "compare": "; the same command continues it",
    "predict": "; with --input, the same command continues it",
    "tune": "; the adapter is as it was",
    "report": "; what stood at --output is as it was",
}


@contextmanager
def _stopping_when_terminated() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: processes it has started end too, and locks are released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _resolve(name: str) -> Callable[..., Any]:
    """The function behind ``module:function``: what a command needs is loaded when it is called."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


if __name__ == "__main__":
    sys.exit(main())
