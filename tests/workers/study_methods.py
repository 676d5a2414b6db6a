"""Methods of the kind that users add, for tests/study; studies name them as ``tests.workers.study_methods:Class``."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from bayeslora.errors import InputError
from bayeslora.study.methods.base import TrainedMethod
from bayeslora.study.outcome import Predicted, Trained


@dataclass(frozen=True)
class Prior(TrainedMethod):
    """Predicts the classes' shares in the training labels; counts its trainings in a file where one is given."""

    count_in: str = ""
    fail_on_seed: int = -1
    fail_while: str = ""
    kill_while: str = ""
    sleep_and_say_in: str = ""

    name: ClassVar[str] = "prior"
    title: ClassVar[str] = "shares of the classes"

    def train(self, experiment) -> Trained:
        if experiment.cell.seed == self.fail_on_seed and (not self.fail_while or Path(self.fail_while).exists()):
            raise InputError("this seed brings bad luck")
        if self.kill_while and experiment.cell.seed == 1 and Path(self.kill_while).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.sleep_and_say_in:
            Path(self.sleep_and_say_in).write_text(str(os.getpid()), encoding="utf-8")
            time.sleep(60)
        if self.count_in:
            with open(self.count_in, "a", encoding="utf-8") as file:
                file.write(f"{experiment.cell.seed}\n")
        experiment.network()
        labels = np.array([example["labels"] for example in experiment.train_data])
        return Trained(network=np.bincount(labels, minlength=2) / len(labels), steps=0, seconds=0.0)

    def predictors(self, trained: Trained, experiment) -> Iterator:
        def predict(split: str) -> Predicted:
            labels = np.array([example["labels"] for example in experiment.data(split)])
            return Predicted(np.tile(trained.network, (len(labels), 1)), labels)

        yield self.label, predict
