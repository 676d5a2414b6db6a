"""What an evaluation computes, and which of it decides the best checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

from bayeslora.errors import InputError
from bayeslora.posterior import Posterior
from bayeslora.training.predictive import predictive_names


class Metrics:
    """What an evaluation computes: the likelihood's, and the caller's; and the predictive's, with draws to score.

    Raises:
        InputError: where ``best_metric`` is not among them; for the caller's, at the first evaluation.
    """

    def __init__(
        self,
        bayes: Posterior,
        compute_metrics: Callable[..., dict[str, Any]] | None,
        best_metric: str | None,
        eval_samples: int = 0,
    ):
        self.likelihood = bayes.model.labelling
        self.predictive = predictive_names(bayes, eval_samples)
        self.compute, self.best = compute_metrics, best_metric or next(iter(self.predictive), "loss")
        self.ours = {"loss": False, **self.likelihood.metric_names, **self.predictive}
        self.any = bool(self.likelihood.metric_names) or compute_metrics is not None
        if compute_metrics is None:
            self._check(tuple(self.ours))

    def _check(self, available: Sequence[str]) -> None:
        if self.best.removeprefix("eval_") not in available:
            raise InputError(f"no evaluation metric {self.best!r}; there are {', '.join(available)}")

    def selection(self) -> dict[str, Any]:
        """How the best checkpoint is chosen."""
        return {
            "eval_strategy": "steps",
            "load_best_model_at_end": True,
            "metric_for_best_model": self.best,
            "greater_is_better": self.ours.get(self.best.removeprefix("eval_"), not self.best.endswith("loss")),
        }

    def __call__(self, prediction: EvalPrediction) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.likelihood.metric_names:
            found |= self.likelihood.metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))
        if self.compute is not None:
            found |= self.compute(prediction)
        self._check(["loss", *self.predictive, *(name.removeprefix("eval_") for name in found)])
        return found
