"""What is added to a study is one new file, and, for a metric, one line: it is then everywhere."""

import importlib.util
import pickle
import sys

import numpy as np
import pandas as pd
import pytest

from bayeslora.analysis import calibration_summary, comparison_table, paired_difference, robustness_table, to_markdown
from bayeslora.analysis.metrics.registry import METRICS as METRICS_OF_TABLES
from bayeslora.analysis.metrics.registry import Metric
from bayeslora.errors import FolderInUseError, InputError, StorageError, TrainingDivergedError
from bayeslora.study import Study, isolation, methods
from bayeslora.study.methods.base import METHODS, Lineup, make_method
from bayeslora.study.outcome import Predictor
from bayeslora.study.runner import cell_modules
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
    assert list(Lineup.of(study.methods).trained) == ["a coin (sides=3)"]
    assert "bayeslora.study.methods.coin" in cell_modules()
    with pytest.raises(InputError, match="did you mean 'coin'"):
        make_method(MethodSpec("coins"))


def test_processes_are_forked_with_modules_that_exist():
    names = cell_modules()
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
    sent = pickle.loads(pickle.dumps(isolation.Reply(error=isolation._portable(error)))).error
    assert type(sent) is kind
    assert str(error) in str(sent)


def test_a_plain_pair_is_a_predictor_without_draws():
    assert Predictor(*("mine", np.mean)).draws is False


@pytest.fixture
def margin(monkeypatch):
    """A metric that is added by one line: how far the label's probability is above the best other."""

    def of(probs, labels):
        others = np.where(np.eye(probs.shape[1], dtype=bool)[labels], -np.inf, probs)
        return float((probs[np.arange(len(labels)), labels] - others.max(1)).mean())

    monkeypatch.setitem(
        METRICS_OF_TABLES, "margin", Metric("margin", "margin", of, higher_is_better=True, percent=True)
    )
    return of


def test_a_metric_is_one_line(margin):
    """It is scored, compared, ranked and shown without a change anywhere else."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    truth = np.eye(3)[labels]
    good, poor = (share * truth + (1 - share) * rng.dirichlet(np.ones(3), 200) for share in (0.5, 0.1))
    expected = margin(good, labels) - margin(poor, labels)
    assert calibration_summary(good, labels)["margin"] == margin(good, labels)

    found = paired_difference(good[None], poor[None], labels, metric="margin", num_resamples=200)
    assert found.estimate == pytest.approx(expected)
    assert found.lower < expected < found.upper
    assert found.verdict == "better"  # as higher is

    setting = {"task": "t", "split": "test", "batch_size": 8, "rank": 2, "seed": 0}
    rows = [
        {**setting, "method": name, "learning_rate": rate, **calibration_summary(probs, labels)}
        for name, probs in (("good", good), ("poor", poor))
        for rate in (0.1, 0.2)
    ]
    best = robustness_table(pd.DataFrame(rows)).loc["t", "good"]["margin", "best"]
    assert best == margin(good, labels)
    table = comparison_table({k: row[k] for k in ("method", "split", "seed", "margin")} for row in rows[::2])
    assert f"{100 * best:.1f}" in to_markdown(table)
    assert "margin (%)" in to_markdown(table)


def test_reweighted_examples_are_repeated_examples(margin):
    """What makes the bootstrap fast changes nothing: each metric agrees with itself on the examples drawn."""
    rng = np.random.default_rng(1)
    probs, labels = rng.dirichlet(np.ones(4), 60), rng.integers(0, 4, 60)
    weights = rng.multinomial(60, np.full(60, 1 / 60), size=5)
    for metric in METRICS_OF_TABLES.values():
        drawn = [np.repeat(np.arange(60), counts) for counts in weights]
        expected = [metric.function(probs[rows], labels[rows]) for rows in drawn]
        np.testing.assert_allclose(metric.of_reweighted(probs, labels)(weights), expected, rtol=1e-9)
