"""A cell in a process of its own: its peak memory is then the cell's, and a crash fails one cell."""

import contextlib
import multiprocessing
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from bayeslora.errors import FolderInUseError, InputError, StorageError, TrainingDivergedError
from bayeslora.study.cell import run_cell
from bayeslora.study.methods.base import method_modules
from bayeslora.study.spec import Cell, Study

OUR_ERRORS = (FolderInUseError, InputError, TrainingDivergedError, StorageError)  # a subclass before its base


class Outcome(NamedTuple):
    """What a cell's process sends back: a result, or the error that ended it."""

    result: dict[str, Any] | None = None
    error: Exception | None = None


def run_isolated(study: Study, cell: Cell, output_dir: Path) -> dict[str, Any]:
    """Run a cell in a fresh process.

    Raises:
        InputError, TrainingDivergedError, StorageError: what the cell raised.
        RuntimeError: for any other error of the cell, and where its process died.
    """
    context: Any = multiprocessing.get_context(_start_method())
    here, there = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(there, study.to_dict(), asdict(cell), str(output_dir)), daemon=True)
    worker.start()
    there.close()
    try:
        outcome: Outcome = here.recv()
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
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    return outcome.result


def _work(pipe: Any, study: dict, cell: dict, output_dir: str) -> None:
    """What a cell's process does."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        result = run_cell(Study.from_dict(study), Cell(**cell), Path(output_dir), own_process=True)
        pipe.send(Outcome(result))
    except Exception as error:
        pipe.send(Outcome(error=_portable(error)))
    finally:
        pipe.close()


def _portable(error: Exception) -> Exception:
    """The error as one that can be pickled, whatever it holds: of our class, or with its traceback as text."""
    for kind in OUR_ERRORS:
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def _start_method() -> str:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def preload() -> None:
    """The server that cells' processes are forked from imports everything once, and computes nothing."""
    if _start_method() == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded_modules())


def preloaded_modules() -> list[str]:
    """What a cell needs; the server passes over names that it cannot import."""
    return [run_cell.__module__, *method_modules()]
