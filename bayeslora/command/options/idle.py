"""Flags that would do nothing beside the others are refused, not passed over."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from bayeslora.command.flags import flag_of
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.options import flags
from bayeslora.study.spec import LORA_FIELDS


class Rule(NamedTuple):
    """``names`` of flags, with underscores, that do something only where ``works``; else ``why`` not."""

    names: tuple[str, ...]
    works: Callable[[argparse.Namespace], Any]
    why: str


_CONFIG = {field.name: flag_of(field) for field in flags(MonteCLoRAConfig)}
LORA_FLAGS = tuple(flag for name, flag in _CONFIG.items() if name == "r" or name in LORA_FIELDS)
METHOD_FLAGS = ("preset", *(flag for flag in _CONFIG.values() if flag not in LORA_FLAGS))

_AUTO = Rule(("tolerance",), lambda given: given.num_samples == "auto", "without --num-samples auto")
_DRAWS = Rule(
    ("antithetic", "blocks", "seed"), lambda given: given.num_samples != 0, "with --num-samples 0, the mean network"
)
_STEPS = Rule(("epochs",), lambda given: given.max_steps is None, "beside --max-steps")
_WARMUP = Rule(("warmup",), lambda given: given.schedule != "constant", "with --schedule constant")
_NOISE = Rule(
    ("variational_learning_rate", *(flag for flag in METHOD_FLAGS if flag not in ("preset", "mode", "sample_scaler"))),
    lambda given: given.sample_scaler != 0,
    "with --sample-scaler 0, which is plain LoRA",
)
_WRITES = ("max_new_tokens", "temperature", "top_p", "execute_generated_code")

_OF_FILES = ("output", "input_format", "text_columns", "coverage", "top_uncertain", "skip_errors", "prefix")

RULES: dict[str, tuple[Rule, ...]] = {
    "fit": (
        _STEPS,
        _WARMUP,
        _NOISE,
        Rule(LORA_FLAGS, lambda given: given.adapter is None, "beside --adapter, whose own it is"),
    ),
    "bayesianize": (
        Rule(("agreement",), lambda given: given.width in (None, "agreement"), "beside another --width"),
        Rule(("max_train_examples",), lambda given: given.steps, "without --steps"),
    ),
    "predict": (
        _AUTO,
        _DRAWS,
        Rule(("max_examples",), lambda given: given.split, "beside --text or --input: it is a subset of a split"),
        Rule(("text_pair",), lambda given: given.text, "without --text"),
        Rule(_OF_FILES, lambda given: given.input, "without --input"),
        Rule(("by",), lambda given: given.top_uncertain, "without --top-uncertain"),
        Rule(("blocks",), lambda given: not given.input, "beside --input: bayeslora tune RUN --blocks keeps them"),
    ),
    "evaluate": (
        _AUTO,
        _DRAWS._replace(works=lambda given: given.num_samples != 0 or given.generate),
        Rule(_WRITES, lambda given: given.generate, "without --generate"),
        Rule(("top_p",), lambda given: given.temperature > 0, "at --temperature 0: the most probable token is taken"),
    ),
    "tune": (
        Rule(
            ("with_temperature",),
            lambda given: given.agreement is None,
            "beside --agreement: a temperature needs labels",
        ),
    ),
    "report": (_DRAWS._replace(names=("seed",)),),
    "compare": (
        _STEPS,
        _WARMUP,
        _NOISE,
        Rule(
            METHOD_FLAGS,
            lambda given: not given.methods or "monteclora" in given.methods,
            "without monteclora in --methods",
        ),
    ),
}


def refuse_idle(arguments: argparse.Namespace) -> None:
    """Raise ``InputError`` for the first flag that was given and does nothing."""
    for rule in RULES.get(arguments.command, ()):
        if not rule.works(arguments):
            refuse(arguments, rule.names, rule.why)


def refuse(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuse those of the flags that were given: whose values are not the default ones."""
    for name in names:
        if getattr(arguments, name) != arguments.default_of(name):
            raise InputError(f"--{name.replace('_', '-')} does nothing {why}")
