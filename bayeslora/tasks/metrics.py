"""The metrics of the benchmark papers, from class probabilities or predicted means."""

from collections.abc import Sequence

import numpy as np

from bayeslora.errors import InputError

REGRESSION_METRICS = ("pearson", "rmse")


def score(metrics: Sequence[str], predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, float]:
    """Each metric by name.

    Args:
        metrics: Of accuracy, f1, matthews_correlation; or pearson, rmse.
        predictions: Probabilities or logits, shape ``(examples, num_classes)``; for regression means, shape
            ``(examples,)`` or ``(examples, 1)``.
        labels: Class indices or values, shape ``(examples,)``.
        num_classes: The number of classes; 0 means regression.

    Raises:
        InputError: the shapes do not fit, there are no examples, or a prediction is not finite.
    """
    if predictions.shape == (len(labels), 1):
        predictions = predictions[:, 0]
    expected = (len(labels), num_classes) if num_classes else (len(labels),)
    if predictions.shape != expected or not len(labels):
        raise InputError(
            f"predictions of shape {predictions.shape} for labels of shape {labels.shape}; "
            f"expected predictions of shape {expected} and at least one example"
        )
    if not np.isfinite(predictions).all():
        row = np.argwhere(~np.isfinite(predictions))[0, 0]
        raise InputError(f"the prediction for example {row} is NaN or infinite; there is nothing to score")
    values = predictions.argmax(axis=1) if num_classes else predictions
    return {metric: float(_METRICS[metric](labels, values)) for metric in metrics}


def _accuracy(labels: np.ndarray, values: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, values)


def _f1(labels: np.ndarray, values: np.ndarray) -> float:
    """F1 of class 1; 0 if it is neither present nor predicted."""
    from sklearn.metrics import f1_score

    return f1_score(labels, values, zero_division=0.0)


def _matthews_correlation(labels: np.ndarray, values: np.ndarray) -> float:
    """0 if one class is all there is, which scikit-learn would warn about."""
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, values) if len(np.unique([labels, values])) > 1 else 0.0


def _pearson(labels: np.ndarray, values: np.ndarray) -> float:
    """NaN if either side is constant, without the warning."""
    from scipy.stats import pearsonr

    if np.ptp(labels) == 0 or np.ptp(values) == 0:
        return float("nan")
    return pearsonr(labels, values).statistic


def _rmse(labels: np.ndarray, values: np.ndarray) -> float:
    return np.sqrt(np.mean(np.square(values - labels)))


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews_correlation,
    "pearson": _pearson,
    "rmse": _rmse,
}
