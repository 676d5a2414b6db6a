"""What people hand a language model to write on from, and how: as transformers' own ``generate`` takes both."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bayeslora.data.batches import pad_token
from bayeslora.errors import InputError

_SAYS_NOTHING = ("transformers_version", "pad_token_id", "bos_token_id", "use_cache", "_from_model_config")
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "top_k": 0,
    "min_p": 0,
    "typical_p": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
}


def read_prompts(
    prompts: Any, input_ids: Any, attention_mask: Any, tokenizer: Any, network: Any
) -> list[str | list[int]]:
    """Prompts as a list of texts or of lists of tokens, padding left out.

    Raises:
        InputError: for nothing, both kinds of argument, messages that the tokenizer has no template for, or what looks
            padded and comes without its mask.
    """
    if (prompts is None) == (input_ids is None):
        raise InputError("give prompts, or input_ids: one of the two")
    given = prompts if input_ids is None else {"input_ids": input_ids, "attention_mask": attention_mask}
    if isinstance(given, Mapping) and "input_ids" in given:  # what a tokenizer returns
        mask = given.get("attention_mask")
        return _unpadded(given["input_ids"], mask if attention_mask is None else attention_mask, network)
    if attention_mask is not None:
        raise InputError("attention_mask belongs to input_ids: texts and lists of tokens are not padded")
    if isinstance(given, Tensor | np.ndarray):
        return _unpadded(given, None, network)
    if isinstance(given, Mapping | str):
        given = [given]
    given = list(given)
    one_conversation = all(_is_message(one) for one in given)
    if given and (one_conversation or all(_is_token(one) for one in given)):
        given = [given]
    if not given or not all(hasattr(one, "__len__") and len(one) for one in given):
        raise InputError("prompts must be a list of at least one text (or its tokens), none of them empty")
    return [_prompt(one, tokenizer) for one in given]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_token(value: Any) -> bool:
    return isinstance(value, int | np.integer) or (isinstance(value, Tensor) and value.ndim == 0)


def _prompt(prompt: Any, tokenizer: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if all(_is_message(one) for one in prompt):
        return _conversation(prompt, tokenizer)
    return np.asarray(prompt).tolist()


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    """What the model reads before it answers; a last message of the assistant's is written on, as pipelines do."""
    if not getattr(tokenizer, "chat_template", None):
        what = "tokenizer= with a chat template" if tokenizer is None else "a tokenizer that has a chat template"
        raise InputError(f"messages need {what}: give the text of the prompt itself, or an instruction-tuned model's")
    for message in messages:
        if not {"role", "content"} <= message.keys():
            raise InputError(f"a message has a role and a content, got {dict(message)!r:.100}")
    begun = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise InputError(f"the tokenizer's chat template cannot write these messages: {error!s:.200}") from error


def _unpadded(tokens: Any, mask: Any, network: Any) -> list[str | list[int]]:
    """Rows of tokens without those that the mask leaves out."""
    rows = [_numbers(row) for row in ([tokens] if _is_flat(tokens) else tokens)]
    if not rows or not all(rows):
        raise InputError("input_ids hold no tokens: give at least one for each prompt")
    if mask is None:
        pad = pad_token(network)
        if len(rows) > 1 and any(pad in (row[0], row[-1]) for row in rows):
            raise InputError(
                f"input_ids look padded (by the token {pad}), and nothing says where: give their attention_mask too, "
                "or all that the tokenizer returned"
            )
        return [*rows]
    masks = [_numbers(row) for row in ([mask] if _is_flat(mask) else mask)]
    if [len(row) for row in masks] != [len(row) for row in rows]:
        raise InputError("attention_mask must have one number for each of input_ids")
    kept = [[token for token, is_read in zip(*pair, strict=True) if is_read] for pair in zip(rows, masks, strict=True)]
    if not all(kept):
        raise InputError("attention_mask leaves a prompt without a token")
    return [*kept]


def _is_flat(tokens: Any) -> bool:
    return tokens.ndim == 1 if isinstance(tokens, Tensor | np.ndarray) else all(_is_token(one) for one in tokens)


def _numbers(row: Any) -> list[int]:
    return row.tolist() if isinstance(row, Tensor | np.ndarray) else [int(token) for token in row]


def read_options(config: Any, num_beams: int, **given: Any) -> dict[str, Any]:
    """Lengths, stops and how to choose tokens, from arguments and a ``GenerationConfig``.

    Args:
        config: A ``transformers.GenerationConfig``, or None; arguments come before what it says.
        num_beams: 1, or it is refused.
        given: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p`` and ``stops``, None where not given.

    Returns:
        ``max_new_tokens``, ``temperature``, ``top_p``, ``stops`` and ``ends``, tokens that end a text or None.

    Raises:
        InputError: naming what cannot be honoured, or does nothing.
    """
    said = {} if config is None else {name: v for name, v in config.to_diff_dict().items() if v is not None}
    said = {name: value for name, value in said.items() if name not in _SAYS_NOTHING}
    if num_beams != 1:
        said["num_beams"] = num_beams
    ends, stops = said.pop("eos_token_id", None), said.pop("stop_strings", None)
    if given["stops"] is None and stops is not None:
        given["stops"] = [stops] if isinstance(stops, str) else stops
    asked = {name: said.pop(name, None) for name in given}
    options = {name: asked[name] if value is None else value for name, value in given.items()}
    for name, value in said.items():
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise InputError(
                f"{name}={value!r:.60} is not honoured here (max_new_tokens, do_sample, temperature, top_p, "
                "stop_strings and eos_token_id are): leave it out, or let one draw write: with bayes.as_draw(k) as "
                "network: network.generate(...)"
            )
    _decide_temperature(options)
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = 64
    return options | {"stops": options["stops"] or (), "ends": [ends] if isinstance(ends, int) else ends}


def _decide_temperature(options: dict[str, Any]) -> None:
    """``do_sample`` as a temperature: 0 takes the most probable token."""
    samples, temperature = options.pop("do_sample"), options["temperature"]
    if samples is None:
        samples = bool(temperature)
    if samples and temperature == 0:
        raise InputError(
            "do_sample=True draws tokens, and temperature=0 takes the most probable: leave one of them out"
        )
    for name, idle in (("temperature", 0), ("top_p", 1)):
        if not samples and options[name] not in (None, idle):
            raise InputError(
                f"{name}={options[name]!r} does nothing where the most probable token is taken: give do_sample=True, "
                "or a temperature"
            )
    options["temperature"] = (1.0 if temperature is None else temperature) if samples else 0.0
    options["top_p"] = 1.0 if options["top_p"] is None else options["top_p"]
