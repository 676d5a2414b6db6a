"""From an adapter's folder and the network that it was fitted to, the posterior."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from bayeslora.adapters.inject import carries_adapter
from bayeslora.adapters.untrusted import read_header
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.models.selection import described_likelihood
from bayeslora.posterior import Posterior
from bayeslora.storage.base_network import check_base, check_taken_from_base
from bayeslora.storage.checkpoint import adapter_shapes, load_posterior
from bayeslora.storage.manifest import ADAPTER_WEIGHTS, MANIFEST, POSTERIOR, read_manifest
from bayeslora.storage.peft_files import open_peft_adapter
from bayeslora.storage.run_folder import adapter_in, record_beside
from bayeslora.storage.texts import read_tokenizer, restore_label_names

Module = TypeVar("Module", bound=Posterior)


def from_pretrained(
    cls: Callable[..., Module], folder: str | Path, network: nn.Module, *, guide: Any = None, likelihood: Any = None
) -> Module:
    """Open an adapter folder on a freshly loaded base network.

    Args:
        cls: What to make: the class of the posterior.
        folder: What :func:`bayeslora.storage.checkpoint.save_pretrained` wrote, or a run's folder that holds it.
        network: The same base model the adapter was fitted to, without an adapter.
        guide, likelihood: The guide's class and the likelihood used when fitting, where they were not the configured
            ones; next-token and choice likelihoods are stored with the adapter.

    Raises:
        InputError: for a folder that is missing, incomplete or damaged, or that belongs to another network.
    """
    if not isinstance(folder, str | os.PathLike) or not isinstance(network, nn.Module):
        raise InputError(
            f"from_pretrained takes a folder, then the base network, and got a {type(folder).__name__}, then a "
            f"{type(network).__name__} (PEFT's own takes them the other way round)"
        )
    folder = adapter_in(Path(folder))
    manifest = read_manifest(folder)
    if carries_adapter(network):
        raise InputError("pass the plain base network, freshly loaded: this one carries an adapter already")
    config = MonteCLoRAConfig.from_dict(manifest["config"])
    read_header(folder / POSTERIOR)
    check_base(folder, manifest, network)
    peft_network = open_peft_adapter(folder, network)
    check_taken_from_base(folder, manifest, peft_network)
    if likelihood is None and "likelihood" in manifest:
        likelihood = described_likelihood(manifest["likelihood"])
    bayes = cls(peft_network, config, guide=guide, likelihood=likelihood)
    if guide is None and type(bayes.guide).__name__ != manifest["guide"]:
        raise InputError(f"{folder} was fitted with the guide {manifest['guide']:.100}; pass its class as guide=")
    if adapter_shapes(bayes) != manifest["adapters"]:
        raise InputError(f"{folder / MANIFEST} lists other adapters than {ADAPTER_WEIGHTS} holds: use another copy")
    bayes.num_examples = manifest["num_examples"]
    restore_label_names(network, manifest["label_names"])
    bayes.tokenizer = read_tokenizer(folder, manifest["tokenizer"])
    bayes.about = record_beside(folder)
    load_posterior(bayes, folder, manifest)
    return bayes.eval()
