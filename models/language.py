r"""Likelihoods of a causal language model: of texts, and of choices between texts.

Both need the log-probabilities of a few tokens under the network, :func:`target_log_probs`. A draw of the adapters
holds for a whole text, and for all options of a choice.

Padding is what ``attention_mask`` leaves out; no token id means padding (in many models it is the end of a text too).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from bayeslora.errors import InputError, Where
from bayeslora.models.likelihoods import NOT_SCORED, CategoricalLikelihood, Likelihood, example_plate
from bayeslora.models.network import vocabulary_size
from bayeslora.models.shared_prompts import SharedPrompt, can_share, log_likelihoods, pack
from bayeslora.prediction import TextPrediction

ABSENT = -1e4  # the score of an option that is not there: its probability is exactly 0, and all stays finite
Reduction = Literal["mean", "sum"]
Normalization = Literal["tokens", "characters", "none"]


def logits_at(network: nn.Module, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Logits at some positions: the scores of the token that follows each.

    The output layer, in small models as costly as many blocks, runs at these positions alone, where it is a plain
    linear layer.

    Args:
        network: A causal language model, adapted or not.
        inputs: Its arguments, tokens ``(rows, T)``.
        positions: True at the positions, ``(rows, T)``.

    Returns:
        Shape ``(number of positions, vocabulary)``, row by row.
    """

    def choose(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
        return (args[0][positions][None],) if args[0].shape[:2] == positions.shape else None

    head: Any = network.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or _is_compiled(head, network):
        return network(**inputs, use_cache=False).logits[positions]
    handle = head.register_forward_pre_hook(choose)
    try:
        logits = network(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits[positions] if logits.shape[:2] == positions.shape else logits[0]


def _is_compiled(part: nn.Module, network: nn.Module) -> bool:
    """Whether ``part`` runs inside a graph; the blocks may have their own, and the rest none."""
    compiled = (module for module in network.modules() if module._compiled_call_impl is not None)
    return any(part is inner for module in compiled for inner in module.modules())


def target_log_probs(network: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Log-probability of every label given the tokens before it, in nats, ``(rows, T)``; 0 where it is not scored.

    The first token of a row has nothing before it and is never scored.

    Args:
        network: A causal language model.
        inputs: Its arguments, tokens ``(rows, T)``.
        labels: The tokens themselves, or -100 where they are not scored, ``(rows, T)``.
    """
    following = labels[:, 1:]
    scored = following != NOT_SCORED
    logits = logits_at(network, inputs, nn.functional.pad(scored, (0, 1)))
    losses = nn.functional.cross_entropy(logits.float(), following[scored], reduction="none")
    log_probs = losses.new_zeros(labels.shape)
    log_probs[:, 1:][scored] = -losses
    return log_probs


def _of_options(
    network: nn.Module, tokens: Tensor, mask: Tensor, answer: Tensor, shared: SharedPrompt | None
) -> Tensor:
    """log p of every option's scored tokens, in nats, ``(batch, C)``: text by text, or behind a ``shared`` prompt."""
    if shared is not None:
        return log_likelihoods(logits_at, network, shared, tokens, answer)
    rows = {"input_ids": tokens.flatten(0, 1), "attention_mask": mask.flatten(0, 1)}
    labels = tokens.masked_fill(~answer, NOT_SCORED).flatten(0, 1)
    return target_log_probs(network, rows, labels).sum(-1).unflatten(0, tokens.shape[:2])


class GivenText(TorchDistribution):
    """A distribution over texts of which the density of one is known.

    Args:
        density: log p of each text of the batch, in nats, ``(batch,)``.
        text: Those texts, ``(batch, T)``; no other can be evaluated.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.independent(constraints.integer_interval(NOT_SCORED, 2**31), 1)

    def __init__(self, density: Tensor, text: Tensor):
        self.density, self.text = density, text
        super().__init__(density.shape, text.shape[1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GivenText":
        return GivenText(self.density.expand(batch_shape), self.text)

    def log_prob(self, value: Tensor) -> Tensor:
        if value is not self.text and not torch.equal(value, self.text):
            raise InputError("the network has evaluated other labels than these: run it with them")
        return self.density

    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise InputError("texts are not drawn from this site: a labels= is needed, and bayes.generate() writes texts")


class NextTokenLikelihood(Likelihood):
    """Texts: the product of the probabilities of their scored tokens, each given all tokens before it.

    ``labels`` are ``(batch, T)``, the tokens themselves or -100 where they are read but not scored (the prompt,
    padding); they are shifted here, as transformers does.

    Args:
        reduction: ``"sum"``: the log-likelihood of each text, in nats per text; it is the density of the model, which
            ``normalization="elbo"`` needs. ``"mean"``: divided by the mean number of scored tokens of the batch's
            texts, in nats per token, so that the mean over the batch is that over all its tokens, transformers' own
            loss; with it a token, not a text, weighs the same in every batch.

    Raises:
        InputError: for another reduction; when called, without labels, or with others than the network has read.

    Example:
        >>> outputs, labels = torch.tensor([[-3.0, 2.0]]), torch.tensor([[-100, 5, 6]])  # a text of two scored tokens
        >>> likelihoods = [NextTokenLikelihood("sum"), NextTokenLikelihood("mean")]
        >>> [float(pyro.poutine.trace(each).get_trace(outputs, labels).log_prob_sum()) for each in likelihoods]
        [-3.0, -1.5]
    """

    loss_type: str | None = "ForCausalLM"
    evaluates_labels = True
    without_labels = (
        "the texts have no labels, so no token of theirs is scored: encode them with labels, or let the model write "
        "with bayes.generate()"
    )
    takes_options = False
    learnt_in_few_passes = True

    def __init__(self, reduction: Reduction = "mean"):
        super().__init__("likelihood")
        if reduction not in get_args(Reduction):
            raise InputError(f"reduction must be 'mean' (nats per token) or 'sum' (nats per text), got {reduction!r}")
        self.reduction = reduction
        self.counted_by_trainer = reduction == "mean"

    def outputs(self, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """Log-likelihood of each text in nats, and the number of its scored tokens: ``(batch, 2)``.

        Without labels, the network's logits, ``(batch, T, vocabulary)``.
        """
        if labels is None:
            return network(**inputs).logits
        log_likelihood = target_log_probs(network, inputs, labels).sum(-1)
        return torch.stack([log_likelihood, (labels[:, 1:] != NOT_SCORED).sum(-1).to(log_likelihood)], -1)

    def forward(self, outputs: Tensor, labels: Tensor | None, num_examples: int | None = None) -> Tensor:
        if labels is None:
            raise InputError("a text is not simulated from one pass of the network: bayes.generate() writes texts")
        log_likelihood = outputs[:, 0]
        if self.reduction == "mean":
            log_likelihood = log_likelihood / self.weights(outputs, labels)
        with example_plate(len(labels), num_examples):
            return pyro.sample("labels", GivenText(log_likelihood, labels), obs=labels)

    def weights(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """By its scored tokens where they are averaged over: ``(batch,)``, the batch's mean number for each text."""
        if self.reduction == "sum":
            return super().weights(outputs, labels)
        return outputs[:, 1].mean().clamp(min=1 / len(outputs)).expand(len(outputs))

    def unlearned(self, outputs: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """The probability that a token lacks, by the geometric mean over all that are scored."""
        return -torch.expm1(outputs[:, 0].sum() / outputs[:, 1].sum().clamp(min=1))

    def count(self, labels: Tensor) -> Tensor:
        """The scored tokens, where they are averaged over; else the texts."""
        return super().count(labels) if self.reduction == "sum" else (labels[:, 1:] != NOT_SCORED).sum()

    def label_names(self, network: nn.Module) -> None:
        return None

    def columns_read(self, arguments: frozenset[str]) -> frozenset[str] | None:
        return arguments if type(self).outputs is NextTokenLikelihood.outputs else None

    def check_label(self, label: np.ndarray, example: Mapping[str, Any], where: Where, network: nn.Module) -> None:
        """A text has a token to score, and a label for each token."""
        tokens, vocabulary = example.get("input_ids", label), vocabulary_size(network)
        if label.ndim != 1 or len(label) != len(tokens):
            raise InputError(
                f"{where.dataset}: the labels of a text are its tokens, or -100, one for each; text {where.number} has "
                f"{len(tokens)} tokens and labels of shape {label.shape}"
            )
        scored = label[label != NOT_SCORED]
        if (label[1:] == NOT_SCORED).all():
            raise InputError(
                f"{where.dataset}: no token of text {where.number} is scored (its labels are all -100 after the "
                "first): is max_length too short for the prompt?"
            )
        if vocabulary and not ((scored >= 0) & (scored < vocabulary)).all():
            raise where.refused(f"labels of a text are tokens, 0 to {vocabulary - 1}, or -100")

    def summarize(
        self, outputs: np.ndarray, labels: np.ndarray | None, network: nn.Module, *, keep: bool
    ) -> TextPrediction:
        return TextPrediction(None, outputs[..., 0].astype(np.float64), outputs[0, :, 1])

    def describe(self) -> dict[str, Any]:
        return {"kind": "next_token", "reduction": self.reduction}


class ChoiceLikelihood(CategoricalLikelihood):
    """Choices between texts: ``y ~ Categorical(softmax(score of each option))``.

    An option's score is the log-likelihood of its text given the prompt, over the text's length; or, where the prompt
    lists the options, the log-probability of its letter as the next token. Which of the two is the encoding's business
    (:mod:`bayeslora.tasks.encoding`):

    ===================  =====================  ====================================================================
    options as texts     ``input_ids``          ``(batch, C, T)``, prompt and option
    \\                    ``attention_mask``     ``(batch, C, T)``
    \\                    ``answer_mask``        ``(batch, C, T)``, 1 at the option's tokens; all 0 where an example
                                                has fewer than C options
    \\                    ``answer_characters``  ``(batch, C)``, only for ``normalization="characters"``
    options as letters   ``input_ids``          ``(batch, T)``, the prompt
    \\                    ``attention_mask``     ``(batch, T)``
    \\                    ``letter_ids``         ``(batch, C)``, -1 where an example has fewer options
    ===================  =====================  ====================================================================

    Args:
        label_names: What to call the options: as many as an example can have.
        normalization: What a text's log-likelihood is divided by: its number of ``"tokens"``, its number of
            ``"characters"`` (accuracy is then the evaluation harness' ``acc_norm``), or nothing, ``"none"`` (``acc``).

    Raises:
        InputError: for fewer than two options or another normalization; when called, for inputs that are no choice.

    Example:
        >>> likelihood = ChoiceLikelihood(["A", "B"])
        >>> trace = pyro.poutine.trace(likelihood).get_trace(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))
        >>> round(float(trace.log_prob_sum()), 4)  # log 3/4
        -0.2877
    """

    counted_by_trainer = False  # it would take the labels of a causal language model for tokens
    takes_options = True

    def __init__(self, label_names: Sequence[str], normalization: Normalization = "tokens"):
        super().__init__("likelihood")
        if normalization not in get_args(Normalization):
            raise InputError(f"normalization must be tokens, characters or none; got {normalization!r}")
        if len(label_names) < 2:
            raise InputError(f"a choice has at least two options, got label_names={tuple(label_names)!r}")
        self.names, self.normalization = tuple(label_names), normalization

    def outputs(self, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """Score of every option, ``(batch, C)``, with C of ``label_names``; -10 000 where there is none."""
        if "letter_ids" in inputs:
            scores = self._scores_of_letters(network, inputs)
        elif "answer_mask" in inputs:
            scores = self._scores_of_texts(network, inputs)
        else:
            raise InputError(
                f"a choice is encoded with answer_mask or letter_ids, and these inputs have "
                f"{', '.join(inputs)}: encode them with load_task(...).encode, and give a stock Trainer "
                "remove_unused_columns=False"
            )
        missing = len(self.names) - scores.shape[1]
        if missing < 0:
            raise InputError(
                f"an example has {scores.shape[1]} options, and the likelihood was made for "
                f"{len(self.names)} ({', '.join(self.names)})"
            )
        return nn.functional.pad(scores, (0, missing), value=ABSENT)

    def prepare(self, network: nn.Module) -> None:
        """Try whether options can share their prompt (:mod:`bayeslora.models.shared_prompts`)."""
        can_share(network, _of_options)

    def _scores_of_texts(self, network: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        tokens, mask, answer = inputs["input_ids"], inputs["attention_mask"], inputs["answer_mask"].bool()
        shared = pack(network, tokens, mask, answer) if can_share(network, _of_options) else None
        log_likelihood = _of_options(network, tokens, mask, answer, shared)
        if self.normalization == "tokens":
            log_likelihood = log_likelihood / answer.sum(-1).clamp(min=1)
        elif self.normalization == "characters":
            log_likelihood = log_likelihood / inputs["answer_characters"].clamp(min=1)
        return log_likelihood.masked_fill(~answer.any(-1), ABSENT)

    def _scores_of_letters(self, network: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        letters, mask = inputs["letter_ids"], inputs["attention_mask"]
        places = torch.arange(mask.shape[1], device=mask.device)
        last = places == (places * mask).amax(1, keepdim=True)
        rows = {"input_ids": inputs["input_ids"], "attention_mask": mask}
        log_probs = logits_at(network, rows, last).float().log_softmax(-1)
        return log_probs.gather(1, letters.clamp(min=0)).masked_fill(letters < 0, ABSENT)

    def label_names(self, network: nn.Module) -> tuple[str, ...]:
        return self.names

    def num_classes(self, network: nn.Module) -> int:
        return len(self.names)

    def describe(self) -> dict[str, Any]:
        return {"kind": "choice", "label_names": list(self.names), "normalization": self.normalization}
