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

from bayeslora.data.batches import main_input
from bayeslora.data.checks import read_examples
from bayeslora.data.limits import position_limit
from bayeslora.errors import InputError
from bayeslora.inference.draws import Draws, evaluating, run_as
from bayeslora.inference.prompts import read_options, read_prompts
from bayeslora.inference.writing import EncodedRuns, Rule, Runs, Text, entropy_of, write
from bayeslora.models.language import NOT_SCORED, logits_at
from bayeslora.models.network import is_causal, is_seq2seq, vocabulary_size
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
    prompts: Any = None,
    *,
    tokenizer: Any = None,
    num_samples: int = 8,
    mode: str = "draws",
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    stops: Sequence[str] | None = None,
    generation_config: Any = None,
    input_ids: Any = None,
    attention_mask: Any = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Generation:
    """Write on from prompts, or with an encoder and a decoder what follows from them. For anything else that
    transformers' ``generate`` can do, beams among it, use it on ``bayes.network`` inside
    :meth:`bayeslora.BayesLoRA.as_draw`.

    Args:
        bayes: The fitted module over a causal language model, or one of texts with an encoder and a decoder.
        prompts: A text or a list of them; a conversation, which is a list of messages, each with ``role`` and
            ``content``, or a list of conversations; tokens of one prompt or of several; or what a tokenizer returned.
        tokenizer: For texts, conversations and ``stops``; ``bayes.tokenizer`` where it is None.
        num_samples: S draws; 0 is the posterior mean, which writes one text.
        mode: ``"draws"`` or ``"mixture"``, see the top of this file.
        max_new_tokens: Tokens of a text at most; 64 if nothing says it.
        do_sample: Draw tokens (True), or take the most probable one (False); by the temperature if None.
        temperature: 0, where nothing says it, takes the most probable token; else tokens are drawn from the
            distribution at this temperature, which is 1 with ``do_sample=True`` alone.
        top_p: Drawn only among the most probable tokens that reach this share together.
        num_beams: 1: a mixture of draws has no beams here, and more are refused.
        stops: A text ends before the first of these.
        generation_config: A ``transformers.GenerationConfig`` for what is not said above: lengths, ``do_sample``,
            ``temperature``, ``top_p``, ``stop_strings`` and ``eos_token_id``. What else it asks is refused by name.
        input_ids, attention_mask: In place of ``prompts``, as a tokenizer returns them, padded on either side.
        seed: Decides draws and drawn tokens: draw s is that of ``predict``, and a text does not depend on the others in
            its batch.
        batch_size: Rows of a forward pass, prompts times draws.
        progress: Show a progress bar.

    Raises:
        InputError: for a network that is no language model, or arguments out of range or that are not honoured.
    """
    writer = _writer(bayes)
    tokenizer = bayes.tokenizer if tokenizer is None else tokenizer
    said = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature, "top_p": top_p}
    options = read_options(generation_config, num_beams, stops=stops, **said)
    ends = options.pop("ends")
    _check_arguments(tokenizer, num_samples, mode, **options)
    read = read_prompts(prompts, input_ids, attention_mask, tokenizer, bayes.network)
    if tokenizer is None and any(isinstance(prompt, str) for prompt in read):
        raise InputError("prompts as texts need tokenizer=")
    tokens = [_prompt_tokens(prompt, tokenizer, reads=writer is EncodedRuns) for prompt in read]
    _check_prompts(bayes, tokens, options["max_new_tokens"], apart=writer is EncodedRuns)
    if not bayes.model.has_noise:  # every draw is the mean
        num_samples = 0
    order = np.argsort([-len(prompt) for prompt in tokens], kind="stable")
    size = max(batch_size // max(num_samples, 1), 1)
    rule = Rule(
        mode == "mixture" and num_samples > 0,
        options["max_new_tokens"],
        options["temperature"],
        options["top_p"],
        tuple(options["stops"]),
        tokenizer,
        _ends(bayes, tokenizer) if ends is None else frozenset(ends),
    )
    written: dict[int, list[Text]] = {}
    with evaluating(bayes):
        draws = Draws(bayes, num_samples, seed)
        for start in tqdm(range(0, len(tokens), size), "generate", disable=None if progress else True, leave=False):
            chosen = order[start : start + size]
            texts = write(bayes, [tokens[i] for i in chosen], draws, rule, batch_size, seed, chosen, writer)
            written |= dict(zip(chosen.tolist(), texts, strict=True))
    return _generation([written[index] for index in range(len(tokens))], rule)


def _generation(rows: list[list[Text]], rule: Rule) -> Generation:
    return Generation(
        [[text.tokens for text in row] for row in rows],
        None if rule.tokenizer is None else [[text.read(rule) for text in row] for row in rows],
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


def _check_prompts(bayes: Posterior, prompts: list[list[int]], max_new_tokens: int, *, apart: bool) -> None:
    """``apart``: prompt and text have positions of their own."""
    size, positions = vocabulary_size(bayes.network), position_limit(bayes.network)
    for number, prompt in enumerate(prompts):
        if not all(isinstance(token, int) and 0 <= token < (size or token + 1) for token in prompt):
            raise InputError(
                f"prompt {number} is not a list of tokens of the network, whole numbers below {size}: "
                "encode it with the network's own tokenizer"
            )
        needed = max(len(prompt), max_new_tokens) if apart else len(prompt) + max_new_tokens - 1
        if positions is not None and needed > positions:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, and the network has {positions} positions: "
                f"shorten it, or write less than max_new_tokens={max_new_tokens}"
            )


def _prompt_tokens(prompt: str | list[int], tokenizer: Any, *, reads: bool) -> list[int]:
    """``reads``: an encoder's, with the tokens that the tokenizer puts around a text."""
    if not isinstance(prompt, str):
        return prompt
    if reads:
        return tokenizer(prompt)["input_ids"]
    return encode_text(tokenizer, prompt, "", max_length=2**30, end=False)["input_ids"]


def _writer(bayes: Posterior) -> type[Runs]:
    """What runs the network token by token."""
    base = bayes.network.get_base_model()
    if is_seq2seq(base) and main_input(base) == "input_ids":
        return EncodedRuns
    _check_causal(bayes)
    return Runs


def _check_causal(bayes: Posterior) -> None:
    base = bayes.network.get_base_model()
    if not is_causal(base):
        raise InputError(
            f"{type(base).__name__} is no causal language model: load it with AutoModelForCausalLM (or, to write with "
            "an encoder and a decoder, AutoModelForSeq2SeqLM)"
        )


def _check_arguments(
    tokenizer: Any,
    num_samples: int,
    mode: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stops: Sequence[str],
) -> None:
    if tokenizer is None and stops:
        raise InputError("stops need tokenizer=")
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
