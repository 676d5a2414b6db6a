"""What a page says first, of its first run on the split it is judged by: a sentence or two that need no statistics."""

from collections.abc import Sequence

import numpy as np

from bayeslora.analysis.report.results import RunResults, SplitResults

SET_ASIDE = 0.2  # share of the answers that a person would look at
NORMAL_90 = 1.6448536  # half a central interval of 90 %, in standard deviations


def opening(runs: Sequence[RunResults]) -> str:
    """How often the run is right, whether it knows, and what can be done with that; empty without labels."""
    run = runs[0]
    name, split = next(iter(run.splits.items()))
    if split.labels is None:
        return ""
    return _of_classes(run.name, name, split) if split.probs is not None else _of_numbers(run.name, name, split)


def _of_classes(run: str, name: str, split: SplitResults) -> str:
    assert split.probs is not None
    right, confidence = split.probs.argmax(1) == split.labels, split.probs.max(1)
    kept = np.argsort(-confidence, kind="stable")[: max(round((1 - SET_ASIDE) * len(right)), 1)]
    return (
        f"{run} answers {_percent(right.mean())} of {len(right)} {name} {split.unit} right, and is "
        f"{_percent(confidence.mean())} sure on average: {direction(right, confidence, split.groups)}. If a person "
        f"takes the {_percent(SET_ASIDE)} of the answers that it is least sure of, {_percent(right[kept].mean())} of "
        "the rest are right."
    )


def _of_numbers(run: str, name: str, split: SplitResults) -> str:
    assert split.mean is not None
    assert split.std is not None
    inside = np.mean(np.abs(split.labels - split.mean) <= NORMAL_90 * split.std)
    return (
        f"Of {len(split.mean)} {name} examples, {_percent(inside)} lie in the interval in which {run} expects 90 % "
        f"of them: {'it is surer than it should be' if inside < 0.9 else 'it promises no more than it keeps'}."
    )


def direction(right: np.ndarray, confidence: np.ndarray, groups: np.ndarray | None = None) -> str:
    """Whether confidence is above or below accuracy, beyond what as many examples leave to chance: as many ``groups``,
    where several answers belong to one example."""
    gap = confidence.mean() - right.mean()
    apart = confidence - right - gap
    if groups is not None:
        apart = np.bincount(np.unique(groups, return_inverse=True)[1], apart)
    if abs(gap) <= 2 * np.sqrt(np.sum(apart**2)) / len(right):
        return "as sure as it should be, as far as so many examples can tell"
    return "surer than it should be (overconfident)" if gap > 0 else "less sure than it could be (underconfident)"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
