"""What an evaluation says of the posterior predictive: of what is used afterwards, and not of the mean alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from bayeslora.adapters.sharding import is_sharded
from bayeslora.data.checks import read_examples
from bayeslora.distributed import on_main_process
from bayeslora.inference.draws import Draws, evaluating
from bayeslora.inference.predict import predict, run_batches
from bayeslora.posterior import Posterior

PREFIX = "predictive_"
MOST_EXAMPLES = 200  # of an evaluation's: every draw is a pass


def predictive_names(bayes: Posterior, num_samples: int) -> dict[str, bool]:
    """What :func:`predictive_metrics` gives, and whether more is better; nothing without draws, or noise to draw."""
    if not num_samples or not bayes.sampling:
        return {}
    likelihood = bayes.model.labelling
    of_classes = likelihood.metric_names if likelihood.of_classes else {}
    return {f"{PREFIX}nll": False} | {PREFIX + name: better for name, better in of_classes.items()}


def predictive_metrics(bayes: Posterior, dataset: Any, num_samples: int, batch_size: int) -> dict[str, float]:
    """Scores of the mean over draws, the same draws at every evaluation, of up to :data:`MOST_EXAMPLES` examples.

    ``predictive_nll`` in nats per example, of texts per token: S draws leave it too high by about the mutual
    information between label and draw, over S. For classes also the metrics of an evaluation. Every process gets those
    of the main one, so that all choose alike.
    """
    if is_sharded(bayes.network):  # which runs in all of them at once
        return _scores(bayes, _some(dataset), num_samples, batch_size)
    return on_main_process(lambda: _scores(bayes, _some(dataset), num_samples, batch_size))


def _scores(bayes: Posterior, dataset: Any, num_samples: int, batch_size: int) -> dict[str, float]:
    prediction = predict(bayes, dataset, num_samples=num_samples, batch_size=batch_size, progress=False)
    nll = prediction.nll if prediction.nll is not None else _nll(bayes, dataset, num_samples, batch_size)
    found: Mapping[str, float] = {}
    if bayes.model.labelling.of_classes:
        with np.errstate(divide="ignore"):
            found = bayes.model.labelling.metrics(np.log(prediction.probs), prediction.labels)
    return {f"{PREFIX}nll": nll} | {PREFIX + name: value for name, value in found.items()}


def _nll(bayes: Posterior, dataset: Any, num_samples: int, batch_size: int) -> float:
    """Of a kind of task whose predictions do not say it."""
    examples = read_examples(bayes.model, dataset)
    parts = []
    with evaluating(bayes):
        batches = examples.batches(batch_size)[0]
        draws = Draws(bayes, num_samples, 0)
        for outputs, labels in run_batches(bayes, batches, examples.collate, draws, batch_size, False):
            on_device = outputs.to(bayes.network.device)
            losses = torch.stack([bayes.negative_log_likelihood(drawn, labels) for drawn in on_device])  # type: ignore[arg-type]
            parts.append(np.log(len(losses)) - (-losses).double().logsumexp(0).cpu())
    return float(torch.cat(parts).mean())


def _some(dataset: Any) -> Any:
    """All of it, or examples spread evenly over it."""
    if len(dataset) <= MOST_EXAMPLES:
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, MOST_EXAMPLES).round().astype(int).tolist())
