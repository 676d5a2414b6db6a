"""Runs of a tiny network that kill themselves, for test_resume: every moment in a process of its own, forked from one
that has imported everything.

Usage: ``python tests/workers/kill_at.py ROOT MOMENTS``, where MOMENTS is a JSON list of numbers: an integer kills the
run (SIGKILL) when it touches its folder for the n-th time, a fraction that many seconds after it began. ROOT/whole is
the run that was not interrupted; ROOT/<moment> one that was, and was then resumed. Prints, for each moment, what the
kill left.
"""

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from tests.conftest import tiny_dataset, tiny_network

OPTIONS = {"epochs": 2, "batch_size": 4, "learning_rate": 2e-2, "warmup": 0.0, "evaluations": 6, "early_stopping": 3}


def fit_tiny(folder: Path, **options):
    """Trained on one labelling, evaluated on its opposite: stops early, and the best checkpoint is not the last."""
    from bayeslora import BayesLoRA, MonteCLoRAConfig, fit

    network = tiny_network(layers=1)
    torch.manual_seed(0)
    bayes = BayesLoRA(network, MonteCLoRAConfig(r=2, num_components=3, sample_scaler=0.05, lora_dropout=0.1))
    contrary = [example | {"labels": 1 - example["labels"]} for example in tiny_dataset(24)]
    return fit(bayes, tiny_dataset(24), contrary, output_dir=folder, progress=False, **(OPTIONS | options))


def kill_at_touch(folder: Path, count: int) -> None:
    """SIGKILL before the ``count``-th time that something in ``folder`` is opened to be written, renamed or deleted."""
    left = count

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        if event == "open":
            path, _, flags = arguments
            touched = isinstance(path, str) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path = arguments[0] if arguments else None
            touched = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
        if touched and str(folder) in os.fspath(path):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def in_child(work, *, kill_after: float | None = None) -> int:
    """The exit status of a forked process that does ``work``."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def main(root: Path, moments: list[float]) -> None:
    from bayeslora import fit  # noqa: F401  (everything heavy, once)

    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage at the start of each run
    assert in_child(lambda: fit_tiny(root / "whole")) == 0
    for moment in moments:
        folder = root / str(moment)

        def killed(folder=folder, moment=moment):
            if isinstance(moment, int):
                kill_at_touch(folder, moment)
            fit_tiny(folder)

        status = in_child(killed, kill_after=None if isinstance(moment, int) else moment)
        left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        resume = (folder / "run.json").is_file()
        again = in_child(lambda folder=folder, resume=resume: fit_tiny(folder, resume=resume))
        print(json.dumps({"moment": moment, "status": status, "left": left, "resumed": resume, "again": again}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
