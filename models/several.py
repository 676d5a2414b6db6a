"""Likelihoods of examples with several labels: a class for each word of a sentence, or each of several labels or not.

Both are one thing: an example has K places, each with a class of its own out of C, and given the network they are
independent. What is predicted is a :class:`~bayeslora.prediction.ClassPrediction` over the places of all examples.
"""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from bayeslora.analysis.metrics.uncertainty import mutual_information, predictive_entropy
from bayeslora.analysis.tagging.entities import are_entity_tags
from bayeslora.errors import InputError, Where
from bayeslora.models.language import GivenText, Reduction
from bayeslora.models.likelihoods import NOT_SCORED, UNLABELLED, CategoricalLikelihood, example_plate
from bayeslora.models.places import LABEL_CLASSES, LabelsPrediction, PlacesPrediction, WordPrediction, entities_of


class PlacesLikelihood(CategoricalLikelihood):
    """A class at each place of an example: ``y_k ~ Categorical(softmax(outputs_k))``, independently.

    Called with outputs ``(batch, K, C)`` and labels ``(batch, K)``: classes, or -100 where nothing is to be said.

    Args:
        reduction: ``"sum"``: the log-likelihood of each example, in nats per example; it is the density of the model,
            which ``normalization="elbo"`` needs. ``"mean"``: divided by the mean number of labels of the batch's
            examples, so that the mean over the batch is that over all its labels, transformers' own loss.

    Raises:
        InputError: for another reduction.
    """

    label_type = None
    several_labels = True

    def __init__(self, reduction: Reduction = "mean"):
        super().__init__("likelihood")
        if reduction not in get_args(Reduction):
            raise InputError(f"reduction must be 'mean' (over labels) or 'sum' (over an example's), got {reduction!r}")
        self.reduction = reduction
        self.counted_by_trainer = reduction == "mean"

    def forward(self, outputs: Tensor, labels: Tensor | None, num_examples: int | None = None) -> Tensor:
        with example_plate(len(outputs), num_examples):
            if labels is None:
                return pyro.sample("labels", dist.Categorical(logits=outputs.float()).to_event(1))
            labels = labels.long()
            losses = nn.functional.cross_entropy(outputs.float().mT, labels, reduction="none", ignore_index=NOT_SCORED)
            density = -losses.sum(-1)
            if self.reduction == "mean":
                density = density / self.weights(outputs, labels)
            return pyro.sample("labels", GivenText(density, labels), obs=labels)

    def weights(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """By its labels where they are averaged over: ``(batch,)``, the batch's mean number for each example."""
        if self.reduction == "sum":
            return super().weights(outputs, labels)
        return (labels != NOT_SCORED).sum(-1).float().mean().clamp(min=1 / len(labels)).expand(len(labels))

    def count(self, labels: Tensor) -> Tensor:
        """The labels, where they are averaged over; else the examples."""
        return super().count(labels) if self.reduction == "sum" else (labels != NOT_SCORED).sum()

    def unlearned(self, outputs: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """The probability that a label lacks, by the geometric mean over all of them."""
        each = loss if self.reduction == "mean" else loss * len(labels) / (labels != NOT_SCORED).sum().clamp(min=1)
        return -torch.expm1(-each)

    def simulate(self, outputs: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        if labels is None:
            labels = torch.zeros(outputs.shape[:2], dtype=torch.long, device=outputs.device)
        scored = labels != NOT_SCORED
        drawn = labels.clone().long()
        drawn[scored] = super().simulate(outputs[scored], labels[scored], generator)
        return drawn

    def check_labels(self, labels: np.ndarray, name: str, network: nn.Module, *, learns: bool) -> None:
        """Either all examples are labelled, which is what can be learnt from, or none is."""
        unknown = labels == UNLABELLED
        if unknown.all() and learns:
            raise InputError(f"{name} is an unlabelled split (every label is -1): use a labelled one")
        for row in np.flatnonzero(unknown)[:1] if not unknown.all() else ():
            raise Where(name, row).refused("its labels are -1, unknown, and those of others are not")

    def metrics(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        labels = np.asarray(labels).astype(int)
        scored = labels != NOT_SCORED
        return super().metrics(np.asarray(outputs)[scored], labels[scored])

    def places(
        self, outputs: np.ndarray, labels: np.ndarray, network: nn.Module, *, keep: bool
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The fields of a :class:`~bayeslora.models.places.PlacesPrediction`, and log-probabilities of draws."""
        labels = labels.astype(int)
        rows, numbers = np.nonzero(labels != NOT_SCORED)
        known = labels[rows, numbers]
        log_probs = log_softmax(outputs[:, rows, numbers].astype(np.float64), axis=-1)
        probs = np.exp(log_probs).mean(0)
        fields = {
            "labels": None if (known == UNLABELLED).all() else known,
            "label_names": self.label_names(network),
            "probs": probs,
            "entropy": predictive_entropy(probs),
            "mutual_information": mutual_information(np.exp(log_probs)),
            "sample_log_probs": log_probs if keep else None,
            "rows": rows,
            "numbers": numbers,
        }
        return fields, log_probs

    def summarize(
        self, outputs: np.ndarray, labels: np.ndarray | None, network: nn.Module, *, keep: bool
    ) -> PlacesPrediction:
        assert labels is not None  # which are asked for
        return PlacesPrediction(**self.places(outputs, labels, network, keep=keep)[0])

    def _check_values(self, label: np.ndarray, where: Where, network: nn.Module) -> None:
        """Classes, all -1, or -100 where nothing is said."""
        said = label[label != NOT_SCORED]
        classes = self.num_classes(network)
        if not said.size:
            raise where.refused("it has no label: all are -100")
        if (said % 1 != 0).any():
            raise where.refused(f"labels are whole numbers, found {said[said % 1 != 0][0]:g}")
        if (said == UNLABELLED).all():
            return
        wrong = said[(said < 0) | (said >= (classes or said.max() + 1))]
        if wrong.size:
            raise where.refused(
                f"label {wrong[0]:.0f} is outside the network's classes 0..{(classes or 0) - 1}, and is neither -100 "
                "nor, for all of an example, -1 (unknown)"
            )


class TokenLikelihood(PlacesLikelihood):
    """A class for each word: named entities, parts of speech.

    ``labels`` are ``(batch, T)``, one for each word piece: the word's class at its first piece, and -100 at its other
    pieces, at special tokens and in the padding; -1 at the first pieces of words whose classes are not known. No other
    piece is scored, learnt from or predicted.

    Args:
        reduction: ``"mean"``, over words, transformers' own loss; or ``"sum"``, in nats per sentence.

    Example:
        >>> outputs, labels = torch.zeros(1, 3, 2), torch.tensor([[-100, 1, 0]])  # two words, two classes
        >>> likelihoods = [TokenLikelihood("sum"), TokenLikelihood("mean")]
        >>> traces = [pyro.poutine.trace(each).get_trace(outputs, labels) for each in likelihoods]
        >>> [round(float(trace.log_prob_sum()), 4) for trace in traces]
        [-1.3863, -0.6931]

    References:
        Devlin et al. (2019), *BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding*,
        section 5.3 (the first piece stands for its word).
    """

    without_labels = (
        "which pieces begin a word is not known: give labels, -1 at the first piece of each word and -100 elsewhere, "
        "as load_task(...).encode and open_run(folder).encode(texts) do"
    )

    def outputs(self, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """Logits ``(batch, T, C)``; NaN where no word begins, which only the labels know."""
        logits = network(**inputs).logits
        return logits if labels is None else logits.masked_fill(labels[..., None] == NOT_SCORED, float("nan"))

    def columns_read(self, arguments: frozenset[str]) -> frozenset[str] | None:
        return arguments if type(self).outputs is TokenLikelihood.outputs else None

    def check_label(self, label: np.ndarray, example: Mapping[str, Any], where: Where, network: nn.Module) -> None:
        tokens = len(example.get("input_ids", label))
        if label.shape != (tokens,):
            raise where.refused(
                f"it has {tokens} word pieces and labels of shape {label.shape}: one is needed for each piece, -100 "
                "where no word begins"
            )
        self._check_values(label, where, network)

    def permute(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Labels of other words, whatever their sentence."""
        scored = labels != NOT_SCORED
        permuted = labels.clone()
        permuted[scored] = super().permute(labels[scored], generator)
        return permuted

    def summarize(
        self, outputs: np.ndarray, labels: np.ndarray | None, network: nn.Module, *, keep: bool
    ) -> WordPrediction:
        assert labels is not None  # which are asked for
        fields, log_probs = self.places(outputs, labels, network, keep=keep)
        first = np.r_[True, fields["rows"][1:] != fields["rows"][:-1]]
        counted = np.arange(len(first)) - np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
        found = WordPrediction(**{**fields, "numbers": counted})
        if not are_entity_tags(found.names):
            return found
        return WordPrediction(**{**fields, "numbers": counted}, entities=entities_of(found, log_probs))

    def describe(self) -> dict[str, Any]:
        return {"kind": "tokens", "reduction": self.reduction}


class MultiLabelLikelihood(PlacesLikelihood):
    """Each of several labels applies or does not: ``y_k ~ Bernoulli(sigmoid(logits_k))``, independently.

    ``labels`` are ``(batch, K)``, 0 or 1, or -100 where it is not known of a label whether it applies. The outputs are
    the two classes of each label, logits 0 and ``logits_k``, whose softmax is that sigmoid.

    Args:
        reduction: ``"mean"``, over labels, transformers' own loss; or ``"sum"``, in nats per example.

    Example:
        >>> likelihood, logits = MultiLabelLikelihood(), torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])  # two labels
        >>> trace = pyro.poutine.trace(likelihood).get_trace(logits, torch.tensor([[0, 1]]))
        >>> round(float(trace.log_prob_sum()), 4)  # the mean of log 1/2 and log sigmoid(2)
        -0.41
    """

    def outputs(self, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """Logits that a label does not apply and that it does, ``(batch, K, 2)``."""
        logits = network(**inputs).logits
        return torch.stack([torch.zeros_like(logits), logits], -1)

    def columns_read(self, arguments: frozenset[str]) -> frozenset[str] | None:
        return arguments if type(self).outputs is MultiLabelLikelihood.outputs else None

    def label_names(self, network: nn.Module) -> tuple[str, ...]:
        """Of the two classes that each label has; those of the labels are the network's."""
        return LABEL_CLASSES

    def num_classes(self, network: nn.Module) -> int:
        return 2

    def check_label(self, label: np.ndarray, example: Mapping[str, Any], where: Where, network: nn.Module) -> None:
        count = getattr(network.config, "num_labels", label.size)
        if label.shape != (count,):
            raise where.refused(f"it needs a 0 or a 1 for each of {count} labels, got labels of shape {label.shape}")
        self._check_values(label, where, network)

    def summarize(
        self, outputs: np.ndarray, labels: np.ndarray | None, network: nn.Module, *, keep: bool
    ) -> LabelsPrediction:
        unknown = np.full(outputs.shape[1:3], UNLABELLED)
        fields = self.places(outputs, unknown if labels is None else labels, network, keep=keep)[0]
        names = super().label_names(network) or tuple(map(str, range(outputs.shape[2])))
        return LabelsPrediction(**fields, of=names)

    def describe(self) -> dict[str, Any]:
        return {"kind": "multi_label", "reduction": self.reduction}
