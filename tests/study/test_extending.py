"""What is added to a study is one new file, and, for a metric, one line: it is then everywhere."""

import importlib.util
import pickle
import sys

import numpy as np
import pytest

from bayeslora.errors import FolderInUseError, InputError, StorageError, TrainingDivergedError
from bayeslora.study import Study, isolation, methods
from bayeslora.study.methods.base import METHODS, Lineup, make_method
from bayeslora.study.outcome import Predictor
from bayeslora.study.spec import MethodSpec

A_METHOD = """
from dataclasses import dataclass
from typing import ClassVar

from bayeslora.study.methods.base import TrainedMethod, register


@register
@dataclass(frozen=True)
class Coin(TrainedMethod):
    sides: int = 2
    name: ClassVar[str] = "coin"
    title: ClassVar[str] = "a coin"

    def train(self, experiment):
        raise NotImplementedError

    def predictors(self, trained, experiment):
        yield self.label, None
"""


@pytest.fixture
def coin(tmp_path, monkeypatch):
    """A family of methods that is added by nothing but its file."""
    (tmp_path / "coin.py").write_text(A_METHOD, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield
    METHODS.pop("coin", None)
    sys.modules.pop("bayeslora.study.methods.coin", None)


def test_a_method_is_one_file(coin):
    study = Study(model="demo", tasks=("sst2",), methods=({"name": "coin", "sides": 3},))
    assert list(Lineup.of(study).trained) == ["a coin (sides=3)"]
    assert "bayeslora.study.methods.coin" in isolation.preloaded_modules()
    with pytest.raises(InputError, match="did you mean 'coin'"):
        make_method(MethodSpec("coins"))


def test_processes_are_forked_with_modules_that_exist():
    names = isolation.preloaded_modules()
    assert {"bayeslora.study.cell", "bayeslora.study.methods.peft"} <= set(names)
    assert [name for name in names if importlib.util.find_spec(name) is None] == []


class Odd(InputError):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FolderInUseError("busy"), FolderInUseError),
        (InputError("wrong"), InputError),
        (Odd("this", "that"), InputError),
        (TrainingDivergedError("nan"), TrainingDivergedError),
        (StorageError("full"), StorageError),
        (KeyError("x"), RuntimeError),
    ],
)
def test_errors_come_back_from_a_process_as_what_they_were(error, kind):
    sent = pickle.loads(pickle.dumps(isolation.Outcome(error=isolation._portable(error)))).error
    assert type(sent) is kind
    assert str(error) in str(sent)


def test_a_plain_pair_is_a_predictor_without_draws():
    assert Predictor(*("mine", np.mean)).draws is False
