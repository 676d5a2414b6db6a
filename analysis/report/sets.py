"""Conformal sets and intervals of a page: thresholds from one split of a run, coverage and size on the others."""

import numpy as np

from bayeslora.analysis.decisions.conformal import (
    adaptive_scores,
    conformal_quantile,
    conformal_sets,
    conformal_threshold,
)
from bayeslora.analysis.report.columns import Column
from bayeslora.analysis.report.results import SplitResults

COVERAGE = 0.9
PENALTY = 0.1  # of RAPS, from the second label on


def set_measures(calibration: SplitResults, split: SplitResults) -> list[tuple[Column, np.ndarray]]:
    """What there is to say of the sets of a split, each with its number for every example, ``(n,)``, whose mean it is.

    Both splits are labelled. APS and RAPS draw at random, from one seed.
    """
    if calibration.probs is None:
        return _of_numbers(calibration, split)
    known, known_labels = np.asarray(calibration.probs), np.asarray(calibration.labels)
    probs, labels = np.asarray(split.probs), np.asarray(split.labels)
    least = conformal_threshold(known[np.arange(len(known)), known_labels], COVERAGE)
    sets = {"LAC": conformal_sets(probs, least)}
    kinds = {"APS": 0.0, "RAPS": PENALTY} if probs.shape[1] > 2 else {"APS": 0.0}  # of two classes both are the same
    for name, penalty in kinds.items():
        scores = _scores(known, penalty, seed=0)[np.arange(len(known)), known_labels]
        sets[name] = _scores(probs, penalty, seed=1) <= conformal_quantile(scores, COVERAGE)
    measures = []
    for name, inside in sets.items():
        measures += [
            (_mean(f"{name}: coverage", "%", factor=100.0, decimals=1), inside[np.arange(len(labels)), labels]),
            (_mean(f"{name}: size", "labels in a set", decimals=2), inside.sum(1)),
        ]
    return measures


def _scores(probs: np.ndarray, penalty: float, *, seed: int) -> np.ndarray:
    return adaptive_scores(probs, penalty=penalty, uniform=np.random.default_rng(seed).random(len(probs)))


def _of_numbers(calibration: SplitResults, split: SplitResults) -> list[tuple[Column, np.ndarray]]:
    known_mean, known_std = np.asarray(calibration.mean), np.asarray(calibration.std)
    factor = conformal_quantile(np.abs(calibration.labels - known_mean) / known_std, COVERAGE)
    mean, std = np.asarray(split.mean), np.asarray(split.std)
    return [
        (_mean("coverage", "%", factor=100.0, decimals=1), np.abs(split.labels - mean) <= factor * std),
        (_mean("width", "in the labels' unit"), 2 * factor * std),
    ]


def _mean(title: str, hint: str, *, factor: float = 1.0, decimals: int = 3) -> Column:
    return Column(title, hint, lambda values: float(np.mean(values)), (), factor, decimals)
