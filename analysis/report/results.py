"""What a page is told about each run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bayeslora.analysis.tables.diagnostics import Diagnostic


@dataclass(frozen=True)
class SplitResults:
    """Predictions for the n examples of one split.

    Classification (C classes): ``probs`` (n, C), ``entropy`` and ``mutual_information`` (n,) in nats. Regression:
    ``mean`` and ``std`` (n,). ``labels`` (n,), or None for a split without; ``texts``, n of them, or none to show.

    Where several of them belong to one example, as the words of a sentence do, ``groups`` (n,) says which, in order;
    ``unit`` is what they are, and ``entity_counts`` (examples, 3) are those of
    :func:`bayeslora.analysis.tagging.entities.entity_counts`; ``label_probs`` and ``label_truth`` (examples, K) are of
    K labels that apply or not.

    Example:
        >>> probs = np.array([[0.9, 0.1], [0.4, 0.6]])
        >>> split = SplitResults(np.array([0, 1]), ["fine", "poor"], probs, predictive_entropy(probs), np.zeros(2))
        >>> split.entropy.round(3)
        array([0.325, 0.673])
    """

    labels: np.ndarray | None
    texts: Sequence[str] = ()
    probs: np.ndarray | None = None
    entropy: np.ndarray | None = None
    mutual_information: np.ndarray | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    groups: np.ndarray | None = None
    unit: str = "examples"
    entity_counts: np.ndarray | None = None
    label_probs: np.ndarray | None = None
    label_truth: np.ndarray | None = None


@dataclass(frozen=True)
class ComparedMethods:
    """What a comparison's own tables say of all its methods, those without a run of their own among them.

    Attributes:
        name: Of the comparison.
        header: Titles of the columns; the first two are of texts.
        rows: Their cells.
        command: The command line that makes them again, where it is known.
    """

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    command: str = ""


@dataclass(frozen=True)
class RunResults:
    """What the page says about one run.

    Attributes:
        name: How it is called on the page; every run has its own.
        facts: What was trained on what: name to value, in the order of the page.
        splits: Name to predictions; the first is the one that the run is judged by.
        label_names: The classes; empty for regression.
        history: The log of the run, as in ``run.json``.
        adapters: Names of the adapters.
        noise_to_signal: Noise over mean of each, over draws: ``(draws, adapters)``; None for a point estimate.
        diagnostics: Answers of :func:`bayeslora.diagnose`.
        command: The command line that makes this run again, where it is known.
        calibration: Labelled predictions, none of them in ``splits``, to find the thresholds of conformal sets by,
            nine at least; None where there are no others.

    Example:
        >>> split = SplitResults(np.array([0.1, 0.2]), mean=np.array([0.0, 0.2]), std=np.array([0.1, 0.1]))
        >>> RunResults("first", {"task": "heights"}, {"test": split}).name
        'first'
    """

    name: str
    facts: Mapping[str, str]
    splits: Mapping[str, SplitResults]
    label_names: Sequence[str] = ()
    history: Sequence[Mapping[str, float]] = ()
    adapters: Sequence[str] = ()
    noise_to_signal: np.ndarray | None = None
    diagnostics: Sequence[Diagnostic] = ()
    command: str = ""
    calibration: SplitResults | None = None
