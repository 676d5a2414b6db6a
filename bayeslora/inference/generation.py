r"""Writing with a posterior, and how uncertain each token is.

A draw of all adapters is one language model. Two ways to write with several:

``mode="draws"``
    Every draw writes a text of its own: S coherent texts for a prompt, which can be compared or voted on.
``mode="mixture"``
    All draws read the same text, and the next token follows the mean of their distributions,
    :math:`p(w \mid \text{text}) = \tfrac1S \sum_s p_s(w \mid \text{text})`: one text for a prompt.

The entropy of that mean is the total uncertainty of a token, and the mutual information between token and draw, that
entropy minus the draws' mean entropy, the part the draws disagree about.

Each draw has its own cache of keys and values, the prompt's too: those of a layer depend on the adapters below it, so
sharing the prompt's among draws would not be exact, and is never done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from bayeslora.data.checks import read_examples
from bayeslora.data.limits import position_limit
from bayeslora.errors import InputError
from bayeslora.inference.draws import Draws, evaluating, run_as
from bayeslora.inference.writing import Rule, Text, entropy_of, write
from bayeslora.models.language import NOT_SCORED, logits_at
from bayeslora.models.network import is_causal, vocabulary_size
from bayeslora.posterior import Posterior
from bayeslora.tasks.encoding import encode_text


@dataclass(frozen=True)
class Generation:
    """Texts written for n prompts: S of each in the mode ``"draws"``, one in the mode ``"mixture"`` and at the mean.

    Attributes:
        tokens: For each prompt and sample the token ids, with the one that ends the text.
        texts: The same as text, without what ended it; None without a tokenizer.
        log_likelihood: Of each text under what wrote it (its draw, the mixture or the mean) at temperature 1, in nats,
            shape ``(n, S)``.
        num_tokens: Shape ``(n, S)``.
        entropy: For each prompt and sample the entropy of each token's distribution, in nats.
        mutual_information: The same between token and draw; only in the mode ``"mixture"``.
    """

    tokens: list[list[list[int]]]
    texts: list[list[str]] | None
    log_likelihood: np.ndarray
    num_tokens: np.ndarray
    entropy: list[list[np.ndarray]] = field(repr=False)
    mutual_information: list[list[np.ndarray]] | None = field(default=None, repr=False)

    @property
    def confidence(self) -> np.ndarray:
        """Geometric mean of the probabilities of a text's tokens, in [0, 1], shape ``(n, S)``."""
        return np.exp(self.log_likelihood / np.maximum(self.num_tokens, 1))


@dataclass(frozen=True)
class TokenUncertainty:
    """For each text, one number for each of its scored tokens, in nats.

    Attributes:
        log_prob: Of the token under the mean of the draws' distributions.
        entropy: Of that mean.
        mutual_information: Between the token and the draw, at least 0.
    """

    log_prob: list[np.ndarray]
    entropy: list[np.ndarray]
    mutual_information: list[np.ndarray]


def generate(
    bayes: Posterior,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: Any = None,
    num_samples: int = 8,
    mode: str = "draws",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stops: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Generation:
    """Write on from prompts. For anything else that transformers' ``generate`` can do, use it on ``bayes.network``
    inside :meth:`bayeslora.BayesLoRA.as_draw`.

    Args:
        bayes: The fitted module over a causal language model.
        prompts: Texts, or their tokens.
        tokenizer: Needed for texts, and for ``stops``.
        num_samples: S draws; 0 is the posterior mean, which writes one text.
        mode: ``"draws"`` or ``"mixture"``, see the top of this file.
        max_new_tokens: Tokens of a text at most.
        temperature: 0 takes the most probable token; else tokens are drawn from the distribution at this temperature.
        top_p: Drawn only among the most probable tokens that reach this share together.
        stops: A text ends before the first of these.
        seed: Decides draws and drawn tokens: draw s is that of ``predict``, and a text does not depend on the others in
            its batch.
        batch_size: Rows of a forward pass, prompts times draws.
        progress: Show a progress bar.

    Raises:
        InputError: for a network that is no causal language model, or arguments out of range.
    """
    _check_causal(bayes)
    _check_arguments(prompts, tokenizer, num_samples, mode, max_new_tokens, temperature, top_p, stops)
    tokens = [_prompt_tokens(prompt, tokenizer) for prompt in prompts]
    _check_prompts(bayes, tokens, max_new_tokens)
    if not bayes.model.has_noise:  # every draw is the mean
        num_samples = 0
    order = np.argsort([-len(prompt) for prompt in tokens], kind="stable")
    size = max(batch_size // max(num_samples, 1), 1)
    rule = Rule(
        mode == "mixture" and num_samples > 0,
        max_new_tokens,
        temperature,
        top_p,
        tuple(stops),
        tokenizer,
        _ends(bayes, tokenizer),
    )
    written: dict[int, list[Text]] = {}
    with evaluating(bayes):
        draws = Draws(bayes, num_samples, seed)
        for start in tqdm(range(0, len(tokens), size), "generate", disable=None if progress else True, leave=False):
            chosen = order[start : start + size]
            texts = write(bayes, [tokens[i] for i in chosen], draws, rule, batch_size, seed, chosen)
            written |= dict(zip(chosen.tolist(), texts, strict=True))
    rows = [written[index] for index in range(len(tokens))]
    return Generation(
        [[text.tokens for text in row] for row in rows],
        [[text.read(rule) for text in row] for row in rows] if tokenizer is not None else None,
        np.array([[text.log_likelihood for text in row] for row in rows]),
        np.array([[len(text.tokens) for text in row] for row in rows]),
        [[np.array(text.entropy) for text in row] for row in rows],
        [[np.array(text.information) for text in row] for row in rows] if rule.mixture else None,
    )


def token_uncertainty(
    bayes: Posterior,
    dataset: Any,
    *,
    num_samples: int = 16,
    batch_size: int = 16,
    seed: int | None = 0,
) -> TokenUncertainty:
    """How uncertain the posterior is about each scored token of given texts.

    Args:
        bayes: The fitted module over a causal language model.
        dataset: Encoded texts with ``labels``, -100 where a token is not scored.
        num_samples: Draws; the posterior mean if 0.
        batch_size: Rows of a forward pass.
        seed: Decides the draws, as in ``predict``.

    Raises:
        InputError: for a network that is no causal language model, or texts without labels.
    """
    _check_causal(bayes)
    examples = read_examples(bayes.model, dataset)
    batches, order = examples.batches(batch_size)
    found: list[tuple[np.ndarray, ...]] = []
    with evaluating(bayes):
        draws = Draws(bayes, num_samples, seed)
        for batch in batches:
            inputs = examples.collate(batch).to(bayes.device)
            following = inputs.pop("labels")[:, 1:]
            scored = following != NOT_SCORED
            positions = torch.nn.functional.pad(scored, (0, 1))
            mean, entropies, count = torch.zeros(()), torch.zeros(()), max(num_samples, 1)
            for index in range(count):
                matrices = draws.matrices(index, 1) if draws.count else None
                log_probs = run_as(bayes, matrices, lambda: logits_at(bayes.network, inputs, positions))  # noqa: B023
                log_probs = log_probs.double().log_softmax(-1)
                mean = mean + log_probs.exp() / count
                entropies = entropies + entropy_of(log_probs.exp()) / count
            log_prob = mean.gather(1, following[scored][:, None])[:, 0].log()
            total = entropy_of(mean)
            parts = [value.cpu().numpy() for value in (log_prob, total, (total - entropies).clamp(min=0))]
            borders = scored.sum(-1).cumsum(0).cpu().numpy()[:-1]
            found += zip(*(np.split(part, borders) for part in parts), strict=True)
    return TokenUncertainty(*([text[kind] for text in (found[i] for i in order)] for kind in range(3)))


def _ends(bayes: Posterior, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text."""
    base = bayes.network.get_base_model()
    ends = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    ends = getattr(bayes.config, "eos_token_id", None) if ends is None else ends
    known = ends if isinstance(ends, list) else [ends]
    return frozenset(end for end in [*known, getattr(tokenizer, "eos_token_id", None)] if end is not None)


def _check_prompts(bayes: Posterior, prompts: list[list[int]], max_new_tokens: int) -> None:
    size, positions = vocabulary_size(bayes.network), position_limit(bayes.network)
    for number, prompt in enumerate(prompts):
        if not all(isinstance(token, int) and 0 <= token < (size or token + 1) for token in prompt):
            raise InputError(
                f"prompt {number} is not a list of tokens of the network, whole numbers below {size}: "
                "encode it with the network's own tokenizer"
            )
        if positions is not None and len(prompt) + max_new_tokens - 1 > positions:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, and the network has {positions} positions: "
                f"shorten it, or write less than max_new_tokens={max_new_tokens}"
            )


def _prompt_tokens(prompt: Any, tokenizer: Any) -> list[int]:
    if not isinstance(prompt, str):
        return np.asarray(prompt).tolist()
    return encode_text(tokenizer, prompt, "", max_length=2**30, end=False)["input_ids"]


def _check_causal(bayes: Posterior) -> None:
    base = bayes.network.get_base_model()
    if not is_causal(base):
        raise InputError(f"{type(base).__name__} is no causal language model: load it with AutoModelForCausalLM")


def _check_arguments(
    prompts: Any,
    tokenizer: Any,
    num_samples: int,
    mode: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stops: Sequence[str],
) -> None:
    if isinstance(prompts, str) or len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise InputError("prompts must be a list of at least one text (or its tokens), none of them empty")
    if tokenizer is None and (stops or any(isinstance(prompt, str) for prompt in prompts)):
        raise InputError("prompts as texts, and stops, need tokenizer=")
    if isinstance(stops, str):
        raise InputError(f"stops must be a list of texts, got the text {stops!r}")
    if mode not in ("draws", "mixture"):
        raise InputError(f"mode must be 'draws' or 'mixture', got {mode!r}")
    if num_samples < 0 or max_new_tokens < 1:
        raise InputError(
            f"num_samples must be 0 (the mean) or more and max_new_tokens at least 1, got {num_samples} "
            f"and {max_new_tokens}"
        )
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise InputError(f"temperature must be 0 or more and top_p in (0, 1], got {temperature} and {top_p}")
