"""How much do the texts that draws of the adapter write for one prompt differ in what they say?"""

import re
import string
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr, logsumexp

from bayeslora.errors import InputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized_answer(text: str) -> str:
    """A short answer without what does not matter: case, punctuation, English articles, spaces.

    Args:
        text: The answer.

    Example:
        >>> normalized_answer("The  Eiffel Tower.")
        'eiffel tower'

    References:
        Rajpurkar et al. (2016), *SQuAD: 100,000+ Questions for Machine Comprehension of Text* (its scoring program).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def semantic_clusters(
    texts: Sequence[Sequence[str]], entails: Callable[[str, str], bool] | None = None
) -> list[list[int]]:
    """Which texts for one prompt say the same.

    A text joins the first cluster whose first text it entails and is entailed by.

    Args:
        texts: For each of n prompts, its texts.
        entails: Whether the first text entails the second, such as what an entailment model says of a pair, with the
            question before each; if None, texts are the same whose :func:`normalized_answer` is equal.

    Returns:
        For each prompt and text the number of its cluster, from 0 in the order of their first texts.

    Example:
        >>> semantic_clusters([["Paris", "paris.", "Rome"]])
        [[0, 0, 1]]
        >>> semantic_clusters([["in Paris", "Paris", "Rome"]], entails=lambda a, b: a[-4:] == b[-4:])
        [[0, 0, 1]]

    References:
        Kuhn, Gal and Farquhar (2023), *Semantic Uncertainty: Linguistic Invariances for Uncertainty Estimation in
        Natural Language Generation*, algorithm 1.
    """
    if entails is None:
        texts = [[normalized_answer(text) for text in of_prompt] for of_prompt in texts]

    def same(one: str, other: str) -> bool:
        return one == other or (entails is not None and entails(one, other) and entails(other, one))

    found: list[list[int]] = []
    for of_prompt in texts:
        firsts: list[str] = []
        numbers: list[int] = []
        for text in of_prompt:
            number = next((i for i, first in enumerate(firsts) if same(first, text)), len(firsts))
            if number == len(firsts):
                firsts.append(text)
            numbers.append(number)
        found.append(numbers)
    return found


def semantic_entropy(clusters: Sequence[Sequence[int]], log_likelihood: ArrayLike | None = None) -> np.ndarray:
    r"""Entropy of what is said, :math:`-\sum_c p(c) \log p(c)`, in nats: 0 where all texts of a prompt say the same.

    Texts are written by draws of the adapter and not at a temperature of one network: what differs is what the
    posterior does not know.

    Args:
        clusters: For each of n prompts the cluster of each of its S texts, as :func:`semantic_clusters` finds them, or
            any labels that say which are the same.
        log_likelihood: Of each text under what wrote it, in nats, shape ``(n, S)``, as in
            ``Generation.log_likelihood``, or over its number of tokens. Then :math:`p(c) \propto \sum_{s \in c} p_s`;
            without it p(c) is the share of the texts (*discrete semantic entropy*).

    Returns:
        Shape ``(n,)``, between 0 and log S.

    Raises:
        InputError: no texts, or shapes that do not fit.

    Example:
        >>> semantic_entropy([[0, 0, 0, 0], [0, 0, 1, 1]]).round(4)
        array([0.    , 0.6931])
        >>> semantic_entropy([[0, 1]], log_likelihood=np.log([[0.9, 0.1]])).round(4)
        array([0.3251])

    References:
        Farquhar, Kossen, Kuhn and Gal (2024), *Detecting hallucinations in large language models using semantic
        entropy*, with likelihoods and discrete.
    """
    shape = (len(clusters), len(clusters[0]) if clusters else 0)
    if 0 in shape or any(len(of_prompt) != shape[1] for of_prompt in clusters):
        raise InputError("expected at least one prompt, each with the same number of texts, at least one")
    logs = np.zeros(shape) if log_likelihood is None else np.asarray(log_likelihood, dtype=float)
    if logs.shape != shape or not np.isfinite(logs).all():
        raise InputError(f"log_likelihood must be finite numbers of shape {shape}, got shape {logs.shape}")
    shares = np.exp(logs - logsumexp(logs, axis=1, keepdims=True))
    members = [np.asarray(of_prompt)[None] == np.unique(of_prompt)[:, None] for of_prompt in clusters]
    return np.array([entr(member @ share).sum() for member, share in zip(members, shares, strict=True)]).clip(min=0)
