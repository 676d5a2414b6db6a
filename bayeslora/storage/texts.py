"""What lies between texts and a posterior, and is kept with it: the tokenizer, and the names of the classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from bayeslora.errors import InputError
from bayeslora.posterior import Posterior


def write_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """Write a tokenizer's files, and say which they are; none if there is no tokenizer."""
    if tokenizer is None:
        return []
    before = {path for path in folder.rglob("*") if path.is_file()}
    tokenizer.save_pretrained(str(folder))
    new = {path for path in folder.rglob("*") if path.is_file()} - before
    return sorted(path.relative_to(folder).as_posix() for path in new)


def read_tokenizer(folder: Path, files: Sequence[str]) -> Any:
    """The tokenizer of an adapter folder; None if it holds none. Code that comes with one is never run.

    Raises:
        InputError: where transformers cannot open it.
    """
    if not files:
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has its own
        raise InputError(
            f"{folder} holds a tokenizer that cannot be opened ({error!s:.200}): install what it needs, or use "
            "another copy of the folder"
        ) from error


def label_names(bayes: Posterior) -> list[str] | None:
    """Names of the classes, where they were given any."""
    names = bayes.model.labelling.label_names(bayes.network)
    return None if names is None or _are_numbers(names) else list(names)


def restore_label_names(network: nn.Module, names: Sequence[str] | None) -> None:
    """Name the classes of a network that was loaded without names."""
    config: Any = network.config
    present = getattr(config, "id2label", None) or {}
    if names and len(names) == len(present) and _are_numbers([str(present[i]) for i in sorted(present)]):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether they are what transformers calls classes without names."""
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))
