"""What an evaluation computes, and which of it decides the best checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import (
    EvalPrediction,
)

from bayeslora.analysis.metrics.registry import METRICS, calibration_summary
from bayeslora.errors import InputError
from bayeslora.models import CategoricalLikelihood
from bayeslora.module import BayesLoRA


class Metrics:
    """What an evaluation computes: ours for classes, and the caller's.

    Raises:
        InputError: where ``best_metric`` is not among them; for the caller's, at the first evaluation.
    """

    def __init__(self, bayes: BayesLoRA, compute_metrics: Callable[..., dict[str, Any]] | None, best_metric: str):
        self.of_classes = isinstance(bayes.model.likelihood, CategoricalLikelihood)
        self.compute, self.best = compute_metrics, best_metric
        self.ours = ("loss", *(METRICS if self.of_classes else ()))
        self.any = self.of_classes or compute_metrics is not None
        if compute_metrics is None:
            self._check(self.ours)

    def _check(self, available: Sequence[str]) -> None:
        if self.best.removeprefix("eval_") not in available:
            raise InputError(f"no evaluation metric {self.best!r}; there are {', '.join(available)}")

    def selection(self) -> dict[str, Any]:
        """How the best checkpoint is chosen."""
        smaller = {*self.ours} - {"accuracy"}
        return {
            "eval_strategy": "steps",
            "load_best_model_at_end": True,
            "metric_for_best_model": self.best,
            "greater_is_better": self.best not in smaller and not self.best.endswith("loss"),
        }

    def __call__(self, prediction: EvalPrediction) -> dict[str, Any]:
        found = _of_classes(prediction) if self.of_classes else {}
        if self.compute is not None:
            found |= self.compute(prediction)
        self._check(["loss", *(name.removeprefix("eval_") for name in found)])
        return found


def _of_classes(prediction: EvalPrediction) -> dict[str, float]:
    logits = np.asarray(prediction.predictions, dtype=np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return calibration_summary(odds / odds.sum(-1, keepdims=True), np.asarray(prediction.label_ids))
