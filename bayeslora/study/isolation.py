"""A call in a process of its own: its peak memory is then the call's, and a crash ends nothing else."""

import contextlib
import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bayeslora.errors import FolderInUseError, InputError, StorageError, TrainingDivergedError

OUR_ERRORS = (FolderInUseError, InputError, TrainingDivergedError, StorageError)  # a subclass before its base


class Reply(NamedTuple):
    """What the process sends back: a result, or the error that ended it."""

    result: Any = None
    error: Exception | None = None


def call_isolated(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of a module in a fresh process; what it takes and returns is pickled.

    Raises:
        InputError, TrainingDivergedError, StorageError: what the function raised.
        RuntimeError: for any other error of it, and where its process died.
    """
    context: Any = multiprocessing.get_context(_start_method())
    here, there = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(there, function, args, options), daemon=True)
    worker.start()
    there.close()
    try:
        reply: Reply = here.recv()
    except EOFError:
        worker.join()
        raise RuntimeError(
            f"the cell's process died with exit code {worker.exitcode} (-9 is often a lack of memory)"
        ) from None
    except BaseException:  # asked to stop: an orphan would go on, and hold the cell's lock
        worker.terminate()
        raise
    finally:
        with contextlib.suppress(BaseException):
            worker.join()
        here.close()
    if reply.error is not None:
        raise reply.error
    return reply.result


def _work(pipe: Any, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What the process does."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        pipe.send(Reply(function(*args, **options)))
    except Exception as error:
        pipe.send(Reply(error=_portable(error)))
    finally:
        pipe.close()


def _portable(error: Exception) -> Exception:
    """The error as one that can be pickled, whatever it holds: of our class, or with its traceback as text."""
    for kind in OUR_ERRORS:
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def preload(modules: Sequence[str]) -> None:
    """Have the server that processes are forked from import these once; it passes over those that it cannot find."""
    if _start_method() == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload([*modules])


def _start_method() -> str:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
