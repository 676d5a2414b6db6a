"""Texts, token by token: all draws side by side, each with its own cache of keys and values."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayeslora.adapters.modes import is_compiled
from bayeslora.data.batches import filling
from bayeslora.inference.draws import Draws, run_as
from bayeslora.models.seq2seq import start_token
from bayeslora.posterior import Posterior

_AS_WRITTEN: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
_STOP_WINDOW = 32  # tokens at the end of a text in which a stop is looked for


@dataclass(frozen=True)
class Rule:
    """How to choose tokens, and when to stop."""

    mixture: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    stops: tuple[str, ...]
    tokenizer: Any
    ends: frozenset[int]

    def choose(self, log_probs: Tensor, random: "list[np.random.Generator]") -> Tensor:
        """The next token of each row, from ``(rows, vocabulary)``."""
        if self.temperature == 0:
            return log_probs.argmax(-1)
        probs, order = torch.sort((log_probs / self.temperature).softmax(-1), dim=-1, descending=True, stable=True)
        cumulative = probs.cumsum(-1)
        kept = (cumulative - probs < self.top_p).sum(-1, keepdim=True)  # at least one
        reached = cumulative.gather(1, kept - 1)
        uniform = torch.tensor([generator.random() for generator in random], device=probs.device, dtype=probs.dtype)
        place = (cumulative < uniform[:, None] * reached).sum(-1, keepdim=True).minimum(kept - 1)
        return order.gather(1, place)[:, 0]

    def stops_in(self, tokens: list[int]) -> bool:
        if not self.stops:
            return False
        end = self.tokenizer.decode(tokens[-_STOP_WINDOW:], **_AS_WRITTEN)
        return any(stop in end for stop in self.stops)


class Text:
    """One text while it is written."""

    def __init__(self, random: np.random.Generator):
        self.random = random
        self.tokens: list[int] = []
        self.entropy: list[float] = []
        self.information: list[float] = []
        self.log_likelihood = 0.0
        self.is_finished = False

    def add(self, rule: Rule, token: int, log_prob: float, entropy: float, information: float) -> None:
        if self.is_finished:
            return
        self.tokens.append(token)
        self.entropy.append(entropy)
        self.information.append(information)
        self.log_likelihood += log_prob
        self.is_finished = token in rule.ends or rule.stops_in(self.tokens)

    def read(self, rule: Rule) -> str:
        tokens = self.tokens[:-1] if self.tokens and self.tokens[-1] in rule.ends else self.tokens
        text = rule.tokenizer.decode(tokens, **_AS_WRITTEN)
        places = [text.find(stop) for stop in rule.stops if stop in text]
        return text[: min(places, default=len(text))]


def write(
    bayes: Posterior,
    prompts: list[list[int]],
    draws: Draws,
    rule: Rule,
    batch_size: int,
    seed: int,
    numbers: Any,
    writer: "type[Runs]",
) -> list[list[Text]]:
    """Texts of each prompt, token by token, all draws side by side."""
    tokens, mask = _padded(prompts, bayes, writer.left)
    count, examples = max(draws.count, 1), len(prompts)
    samples = 1 if rule.mixture else count
    texts = [[Text(np.random.default_rng([seed, number, sample])) for sample in range(samples)] for number in numbers]
    flat = [texts[example][sample] for sample in range(samples) for example in range(examples)]
    runs = writer(bayes, draws, _together(bayes, draws, tokens, mask, batch_size))
    current, random = tokens.expand(count, -1, -1), [text.random for text in flat]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(rule.max_new_tokens):
        log_probs = runs.step(current, mask, positions).double().log_softmax(-1)  # (draws, prompts, vocabulary)
        entropy = entropy_of(log_probs.exp())
        information = torch.zeros_like(entropy)
        if rule.mixture:
            log_probs = (log_probs.logsumexp(0) - np.log(count))[None]
            total = entropy_of(log_probs.exp())
            information, entropy = (total - entropy.mean(0)).clamp(min=0), total
        rows = log_probs.flatten(0, 1)
        chosen = rule.choose(rows, random)
        picked = rows.gather(1, chosen[:, None])[:, 0]
        numbers_of_rows = (value.flatten().tolist() for value in (chosen, picked, entropy, information))
        for text, token, *values in zip(flat, *numbers_of_rows, strict=True):
            text.add(rule, token, *values)
        if all(text.is_finished for text in flat):
            break
        current = chosen.view(samples, examples, 1).expand(count, -1, -1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
    return texts


class Runs:
    """The language models that write, ``together`` draws to a forward pass, each pass with its own cache."""

    left = True  # where prompts are padded

    def __init__(self, bayes: Posterior, draws: Draws, together: int):
        self.bayes, self.draws = bayes, draws
        self.starts = range(0, max(draws.count, 1), together)
        self.together = together
        self.caches: list[Any] = [None] * len(self.starts)
        forward = inspect.signature(bayes.network.get_base_model().forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}

    def inputs(self, run: int, tokens: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Any]:
        """The network's arguments for new tokens, ``(rows, T)``; the mask is of the old ones too."""
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": self.caches[run],
            "use_cache": True,
            **self.options,
        }

    def keep(self, run: int, output: Any) -> None:
        """What the next step of this run needs."""
        self.caches[run] = output.past_key_values

    def step(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits after the last token, ``(draws, prompts, vocabulary)``, of ``(draws, prompts, T)`` new tokens."""
        logits = []
        for run, start in enumerate(self.starts):
            part = tokens[start : start + self.together]
            count = len(part)
            inputs = self.inputs(run, part.flatten(0, 1), mask.repeat(count, 1), positions.repeat(count, 1))
            matrices = self.draws.matrices(start, count) if self.draws.count else None
            output = run_as(self.bayes, matrices, lambda: self.bayes.network(**inputs))  # noqa: B023
            self.keep(run, output)
            logits.append(output.logits[:, -1].float().unflatten(0, (count, -1)))
        return torch.cat(logits)


class EncodedRuns(Runs):
    """Networks with an encoder and a decoder: all of a text is run again for each token, without a cache, in which
    layers that read the prompt would see a draw at the first token only."""

    left = False

    def __init__(self, bayes: Posterior, draws: Draws, together: int):
        super().__init__(bayes, draws, together)
        self.asked: list[dict[str, Tensor]] = [{} for _ in self.starts]

    def inputs(self, run: int, tokens: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Any]:
        asked = self.asked[run]
        if not asked:  # the first tokens are the prompt's
            begin = tokens.new_full((len(tokens), 1), start_token(self.bayes.network))
            asked |= {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": begin}
        else:
            asked["decoder_input_ids"] = torch.cat([asked["decoder_input_ids"], tokens], 1)
        return {**asked, "use_cache": False}

    def keep(self, run: int, output: Any) -> None:
        pass


def _together(bayes: Posterior, draws: Draws, tokens: Tensor, mask: Tensor, batch_size: int) -> int:
    """How many draws one forward pass takes."""
    fitting = min(batch_size // len(tokens), draws.count)
    if fitting < 2 or is_compiled(bayes.network):
        return 1
    return fitting if bayes.rows_are_examples({"input_ids": tokens, "attention_mask": mask}) else 1


def _padded(prompts: list[list[int]], bayes: Posterior, left: bool) -> tuple[Tensor, Tensor]:
    pad, side = filling(bayes.network), "left" if left else "right"
    rows = [torch.tensor(prompt) for prompt in prompts]
    tokens = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return tokens.to(bayes.device), mask.to(bayes.device)


def entropy_of(probs: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    return torch.special.entr(probs).sum(-1)
