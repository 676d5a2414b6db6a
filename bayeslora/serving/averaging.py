"""A posterior on a server that loads PEFT adapters: ask every draw, and average what they say.

What is averaged are probabilities. Averaging the adapters' weights would be the mean network, and averaging texts is
nothing. :func:`bayeslora.storage.export.export_draws` with ``for_server=True`` writes the draws, a server such as vLLM
or SGLang loads each as a model of its own, and :func:`average` asks all of them for their next token's probabilities.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import entr

from bayeslora.errors import InputError

MOST_LISTED = 20  # tokens whose probabilities OpenAI's interface tells


@dataclass(frozen=True)
class Averaged:
    """What S draws on a server say together.

    Attributes:
        choices: What the probabilities are of: the choices that were asked for, or all tokens that a draw listed.
        probs: The mean of the draws' probabilities, ``(C,)``.
        sample_probs: Those of each draw, ``(S, C)``.
        unlisted: The probability that a draw gave to what it did not list, ``(S,)``: a choice that was not listed
            counts as 0, and can be at most that.
        entropy: Of ``probs``, in nats.
        mutual_information: Between token and draw, in nats.
    """

    choices: tuple[str, ...]
    probs: np.ndarray
    sample_probs: np.ndarray
    unlisted: np.ndarray
    entropy: float
    mutual_information: float


def average(
    url: str,
    models: Sequence[str],
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    choices: Sequence[str] | None = None,
    temperature: float = 1.0,
    top_logprobs: int = MOST_LISTED,
    api_key: str | None = None,
    timeout: float = 60.0,
) -> Averaged:
    """Ask an OpenAI-compatible server for the next token of every draw, and average the probabilities.

    Args:
        url: Where the interface begins, such as ``"http://localhost:8000/v1"``.
        models: What the server calls the draws' adapters.
        prompt: A text, for ``/completions``, or messages, for ``/chat/completions``.
        choices: Tokens to choose from, such as ``[" A", " B"]``; their probabilities are made to sum to one. Without
            them, the probabilities are of all tokens that are listed, as they are.
        temperature: What each draw's logits are divided by: ``temperature`` in ``draws.json``, for choices.
        top_logprobs: Tokens that the server is asked to list, up to 20.
        api_key: Sent as a bearer token.
        timeout: Seconds that a request may take.

    Raises:
        InputError: where a model is not there, the server refuses, or its answer has no probabilities; or a draw lists
            none of the choices.
    """
    if not models or isinstance(models, str):
        raise InputError("models is a list of the draws' names on the server, at least one")
    if temperature != 1 and choices is None:
        raise InputError("a temperature needs choices: the tokens that a server does not list cannot be divided")
    if not temperature > 0 or not 1 <= top_logprobs <= MOST_LISTED:
        raise InputError(f"temperature must be above 0 and top_logprobs in 1 to {MOST_LISTED}")
    asked: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0}
    chat = not isinstance(prompt, str)
    if isinstance(prompt, str):
        asked |= {"prompt": prompt, "logprobs": top_logprobs}
    else:
        asked |= {"messages": [dict(one) for one in prompt], "logprobs": True, "top_logprobs": top_logprobs}
    address = f"{url.rstrip('/')}/{'chat/completions' if chat else 'completions'}"

    def ask(model: str) -> dict[str, float]:
        return _listed(_answer(address, {"model": model, **asked}, api_key, timeout), model, chat)

    with ThreadPoolExecutor(min(len(models), 32)) as pool:
        listed = list(pool.map(ask, models))
    names = tuple(dict.fromkeys(token for one in listed for token in one)) if choices is None else tuple(choices)
    probs = np.array([[np.exp(one.get(name, -np.inf)) for name in names] for one in listed])
    unlisted = np.array([max(1 - sum(map(np.exp, one.values())), 0.0) for one in listed])
    if choices is not None:
        probs = probs ** (1 / temperature)
        empty = [model for model, total in zip(models, probs.sum(1), strict=True) if total == 0]
        if empty:
            raise InputError(f"model {empty[0]!r} lists none of the choices {names}: are they single tokens of it?")
        probs = probs / probs.sum(1, keepdims=True)
    mean = probs.mean(0)
    entropy = float(entr(mean).sum())
    information = max(entropy - float(entr(probs).sum(1).mean()), 0.0)
    return Averaged(names, mean, probs, unlisted, entropy, information)


def _answer(address: str, asked: Mapping[str, Any], api_key: str | None, timeout: float) -> Any:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(address, json.dumps(asked).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read(500).decode("utf-8", "replace")
        raise InputError(f"{address} answers {error.code} for model {asked['model']!r}: {said}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{address} cannot be asked: {error}") from error


def _listed(answer: Any, model: str, chat: bool) -> dict[str, float]:
    """Log-probabilities of the first token, by token."""
    try:
        told = answer["choices"][0]["logprobs"]
        if not chat:
            return {token: float(value) for token, value in told["top_logprobs"][0].items()}
        return {one["token"]: float(one["logprob"]) for one in told["content"][0]["top_logprobs"]}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the answer for model {model!r} has no probabilities (logprobs) of its first token: {str(answer)[:200]}"
        ) from error
