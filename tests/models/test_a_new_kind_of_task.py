"""Kinds of task that the package does not know: a likelihood, a result and a line in the registry are all they need."""

import json
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import transformers
from scipy.stats import poisson

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, diagnose, fit
from bayeslora.models import Likelihood
from bayeslora.models.likelihoods import example_plate
from bayeslora.models.selection import KINDS
from bayeslora.prediction import Prediction
from bayeslora.tasks.base import Task
from tests.conftest import tiny_network

WORDS = [5, 50]
RATES = {5: 1.0, 50: 6.0}
OPTIONS = {"epochs": 6, "batch_size": 8, "learning_rate": 2e-2, "progress": False}


@dataclass(frozen=True)
class CountPrediction(Prediction):
    """Of counts: ``rate`` (n,), their mean, and that of every draw, ``sample_rates`` (S, n)."""

    rate: np.ndarray
    sample_rates: Any = field(default=None, repr=False)

    @property
    def sample_outputs(self):
        return None if self.sample_rates is None else self.sample_rates[..., None]

    @property
    def sample_log_likelihood(self):
        if self.labels is None or self.sample_rates is None:
            return None
        return poisson.logpmf(self.labels, self.sample_rates)

    def row(self, index):
        return {"rate": float(self.rate[index])}

    def scores(self, task):
        return task.score(self.rate, self.labels)


class PoissonLikelihood(Likelihood):
    """Counts: ``y ~ Poisson(exp(f))``."""

    takes_options = False
    label_type = "number"
    metric_names = {"distance": False, "share_at_mode": True}  # noqa: RUF012

    def forward(self, logits, labels, num_examples=None):
        rate = logits.float().reshape(len(logits)).exp()
        with example_plate(len(rate), num_examples):
            return pyro.sample("labels", dist.Poisson(rate), obs=labels)

    def check_label(self, label, example, where, network):
        if label.size != 1 or label < 0 or label % 1 != 0:
            raise where.refused(f"a count is 0, 1, 2, ..., got {label}")

    def summarize(self, outputs, labels, network, *, keep):
        rates = np.exp(outputs.reshape(len(outputs), -1).astype(np.float64))
        return CountPrediction(labels, rates.mean(0), rates if keep else None)

    def metrics(self, outputs, labels):
        rates = np.exp(outputs.reshape(-1))
        return {"distance": float(np.abs(rates - labels).mean()), "share_at_mode": float((rates // 1 == labels).mean())}

    def describe(self):
        return {"kind": "counts"}


@dataclass(frozen=True, eq=False)
class CountTask(Task):
    """Scored by the metrics of numbers."""

    @property
    def kind(self):
        return "counts"

    @property
    def likelihood_record(self):
        return {"kind": self.kind}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(KINDS, "counts", PoissonLikelihood)


def examples(size, seed=0):
    """Sentences of two words, of differing length."""
    random = np.random.default_rng(seed)
    for number in range(size):
        tokens = random.choice(WORDS, 4 + number % 4).tolist()
        yield {"input_ids": tokens, "attention_mask": [1] * len(tokens)}


def counts(size, seed=0):
    """Their number depends on the first word."""
    random = np.random.default_rng([seed, 1])
    return [row | {"labels": int(random.poisson(RATES[row["input_ids"][0]]))} for row in examples(size, seed)]


def task():
    return CountTask("visits", datasets.DatasetDict(), ("text",), "count", (), ("pearson", "rmse"))


def network():
    return tiny_network(num_labels=1, layers=1, problem_type="regression", initializer_range=0.3)


def test_counts_are_learnt_predicted_scored_and_stored(tmp_path):
    bayes = BayesLoRA(network(), MonteCLoRAConfig(r=4), likelihood=task().likelihood())
    data = counts(40, seed=1)
    before = bayes.predict(data, num_samples=4, progress=False).scores(task())
    result = fit(bayes, counts(96), data, output_dir=tmp_path / "run", best_metric="distance", **OPTIONS)
    prediction = bayes.predict(data, num_samples=4, progress=False)

    after = prediction.scores(task())
    assert after["rmse"] < before["rmse"] - 0.5
    assert after["pearson"] > 0.6
    many = np.array([row["input_ids"][0] == WORDS[1] for row in data])
    assert prediction.rate[many].mean() == pytest.approx(6, abs=1.5)
    assert prediction.rate[~many].mean() == pytest.approx(1, abs=0.5)
    assert result.metrics["eval_distance"] == pytest.approx(
        min(entry["eval_distance"] for entry in result.history if "eval_distance" in entry), abs=1e-6
    )

    opened = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", network())
    assert type(opened.model.likelihood) is PoissonLikelihood
    again = opened.predict(data, num_samples=4, progress=False)
    np.testing.assert_allclose(again.sample_rates, prediction.sample_rates, rtol=1e-5)


def test_a_result_of_one_s_own_is_a_prediction():
    bayes = BayesLoRA(network(), MonteCLoRAConfig(r=4), likelihood=PoissonLikelihood("likelihood"))
    found = bayes.predict(counts(5), num_samples=3, keep_draws=False, progress=False)
    assert isinstance(found, Prediction)
    assert found.probs is None
    assert found.std is None
    assert found.sample_log_likelihood is None
    assert json.loads(json.dumps(found.row(2))) == {"rate": pytest.approx(found.rate[2])}
    with pytest.raises(AttributeError, match="CountPrediction has no 'rates'"):
        _ = found.rates


def test_its_labels_are_checked_with_the_number_of_the_row():
    bayes = BayesLoRA(network(), MonteCLoRAConfig(r=4), likelihood=PoissonLikelihood("likelihood"))
    data = counts(5)
    data[3]["labels"] = -2
    with pytest.raises(InputError, match=r"the data set, row 3: a count is 0, 1, 2, \.\.\., got -2"):
        bayes.predict(data, progress=False)


def test_its_posterior_is_diagnosed():
    bayes = BayesLoRA(network(), MonteCLoRAConfig(r=2), likelihood=PoissonLikelihood("likelihood"))
    other = BayesLoRA(network(), MonteCLoRAConfig(r=2), likelihood=PoissonLikelihood("likelihood"))
    found = {verdict.name for verdict in diagnose(bayes, counts(12), restarts=[other], num_samples=25, steps=2)}
    assert {"pareto_k", "restart_r_hat", "data_drivenness"} <= found


class TagLikelihood(Likelihood):
    """A class for every token: labels ``(T,)``, -100 where there is none."""

    takes_options = False

    def forward(self, logits, labels, num_examples=None):
        scored = labels != -100
        each = dist.Categorical(logits=logits.float()).mask(scored).to_event(1)
        with example_plate(len(logits), num_examples):
            return pyro.sample("labels", each, obs=labels.clamp(min=0))

    def summarize(self, outputs, labels, network, *, keep):
        return TagPrediction(labels, np.nan_to_num(outputs.mean(0), nan=-1.0).argmax(-1), outputs if keep else None)


@dataclass(frozen=True)
class TagPrediction(Prediction):
    """The most probable class of every token, ``(n, T)``."""

    tags: np.ndarray
    logits: Any = None


def tagged(size, seed=0):
    """A token's class is which of the two words it is."""
    return [row | {"labels": [WORDS.index(token) for token in row["input_ids"]]} for row in examples(size, seed)]


def tagger():
    torch.manual_seed(0)
    config = tiny_network(layers=1, initializer_range=0.3).config
    network = transformers.AutoModelForTokenClassification.from_config(config)
    return BayesLoRA(network, MonteCLoRAConfig(r=4), likelihood=TagLikelihood("likelihood"))


def test_a_label_for_each_token_is_learnt_and_predicted_whatever_the_batch(tmp_path):
    bayes, data = tagger(), tagged(20, seed=1)
    fit(bayes, tagged(96), output_dir=tmp_path / "run", **OPTIONS | {"epochs": 10})
    found = bayes.predict(data, num_samples=2, batch_size=6, progress=False)
    scored = found.labels != -100
    assert scored.sum() == sum(len(row["labels"]) for row in data)
    assert (found.tags == found.labels)[scored].mean() > 0.9
    for number, row in enumerate(data[:4]):
        alone = bayes.predict([row], num_samples=2, progress=False)
        length = len(row["labels"])
        np.testing.assert_allclose(alone.logits[:, 0], found.logits[:, number, :length], atol=1e-4)


class ManyLabels(Likelihood):
    """Each class applies or does not: labels ``(C,)`` of 0 and 1."""

    takes_options = False

    def forward(self, logits, labels, num_examples=None):
        with example_plate(len(logits), num_examples):
            return pyro.sample("labels", dist.Bernoulli(logits=logits.float()).to_event(1), obs=labels)

    def summarize(self, outputs, labels, network, *, keep):
        return TagPrediction(labels, (outputs.mean(0) > 0).astype(int))


def test_several_labels_of_one_example_are_learnt(tmp_path):
    def several(size, seed=0):
        first = [(row, float(row["input_ids"][0] == WORDS[0])) for row in examples(size, seed)]
        return [row | {"labels": [is_first, 1.0, 1 - is_first]} for row, is_first in first]

    bayes = BayesLoRA(
        tiny_network(num_labels=3, layers=1, initializer_range=0.3),
        MonteCLoRAConfig(r=4),
        likelihood=ManyLabels("likelihood"),
    )
    fit(bayes, several(96), output_dir=tmp_path / "run", **OPTIONS | {"epochs": 10})
    found = bayes.predict(several(20, seed=1), num_samples=2, progress=False)
    assert found.labels.shape == (20, 3)
    assert (found.tags == found.labels).mean() > 0.9
