"""The folder on disk: PEFT's two files, the posterior's tensors, and one JSON that ties them together.

``adapter_config.json`` and ``adapter_model.safetensors`` open in plain ``peft.PeftModel.from_pretrained`` as the
posterior mean. ``posterior.safetensors`` holds the guide (and the likelihood's parameters); ``bayeslora.json`` the
configuration, versions, a fingerprint of the base network and the other files' SHA-256. Nothing is pickled.
"""

import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bayeslora.adapters.drawing import check_in_use, one_at_a_time
from bayeslora.adapters.groups import adapter_state
from bayeslora.adapters.provenance import base_tensors, sketch
from bayeslora.adapters.untrusted import PREFIX, load_state
from bayeslora.distributed import refuse_sharded
from bayeslora.errors import InputError
from bayeslora.files.writing import replacing_folder, sha256_of, sync
from bayeslora.inference.draws import posterior_sites
from bayeslora.models.tuning import Tuning
from bayeslora.posterior import Posterior
from bayeslora.storage.base_network import check_base, check_taken_from_base, fingerprint
from bayeslora.storage.card import write_card
from bayeslora.storage.manifest import (
    FILES,
    FORMAT,
    MANIFEST,
    POSTERIOR,
    digest_of,
    is_adapter_folder,
    own_files,
    read_manifest,
    version_info,
)
from bayeslora.storage.peft_files import (
    kept_tensors,
    load_adapter_weights,
    write_peft_files,
)
from bayeslora.storage.run_folder import adapter_in
from bayeslora.storage.texts import label_names, write_tokenizer


def save_pretrained(bayes: Posterior, folder: str | Path) -> None:
    """Write the adapter, its posterior and a model card; the folder appears complete or not at all.

    An existing adapter folder is replaced, but for a card that somebody edited; anything else in the way is refused.

    Raises:
        InputError: if ``folder`` exists and holds something other than an adapter.
    """
    folder = Path(folder)
    if folder.exists() and not is_adapter_folder(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and holds something other than an adapter; choose another folder")
    foreign = sorted({p.name for p in folder.iterdir()} - own_files(folder)) if folder.is_dir() else []
    if foreign:
        raise InputError(f"{folder} also holds {foreign[0]!r}, which saving would delete; choose another folder")
    with replacing_folder(folder) as new:
        write_adapter(bayes, new)
        write_card(bayes, new, folder)


def save_from_loop(
    bayes: Posterior, folder: Path, is_main_process: bool | None, state_dict: Mapping[str, Any] | None
) -> None:
    """See :meth:`bayeslora.BayesLoRA.save_pretrained`, which training loops call."""
    if state_dict is not None:
        refuse_sharded(bayes.model.groups)
    if is_main_process is None:
        save_pretrained(bayes, folder)
    elif is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(bayes, folder)


def write_adapter(bayes: Posterior, folder: Path) -> None:
    """Write the four files, and the tokenizer's, into ``folder``; the manifest comes last, and names their hashes."""
    check_in_use(bayes.model.groups)
    _check_whole(bayes)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as scratch:
        written = Path(scratch)
        write_peft_files(bayes.network, bayes.kept_keys, written)
        state = {f"guide.{name}": value for name, value in bayes.guide.state_dict().items()}
        state |= {f"model.{name}": value for name, value in bayes.model.state_dict().items()}
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, written / POSTERIOR)
        tokenizer = write_tokenizer(bayes.tokenizer, written)
        manifest = _manifest(bayes, written, tokenizer)
        (written / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in (*FILES, *tokenizer, MANIFEST):
            sync(written / name)
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(written / name, folder / name)


def _check_whole(bayes: Posterior) -> None:
    """DeepSpeed's ZeRO 3 leaves empty tensors behind."""
    saved = adapter_state(bayes.network) | kept_tensors(bayes.network, bayes.kept_keys)
    empty = [name for name, value in saved.items() if not value.numel()]
    if empty:
        raise InputError(
            f"{empty[0]!r} is empty in this process, as ZeRO 3 leaves it: save inside "
            "deepspeed.zero.GatheredParameters, with what is trained, and call "
            "bayeslora.training.engines.remember_base(bayes) before deepspeed.initialize"
        )


def _manifest(bayes: Posterior, folder: Path, tokenizer: Sequence[str]) -> dict[str, Any]:
    kept = sorted(kept_tensors(bayes.network, bayes.kept_keys))
    manifest = {
        "format": FORMAT,
        "config": bayes.monteclora_config.to_dict(),
        "guide": type(bayes.guide).__name__,
        "num_examples": bayes.num_examples,
        "versions": version_info(),
        "base": bayes.base_record or describe_base(bayes, kept),
        "kept": kept,
        "adapters": adapter_shapes(bayes),
        "sha256": {name: sha256_of(folder / name) for name in (*FILES, *tokenizer)},
        "tokenizer": tokenizer,
        "label_names": label_names(bayes),
    }
    if bayes.model.tuning is not None:
        manifest["tuning"] = bayes.model.tuning.to_dict()
    described = bayes.model.labelling.describe()
    if described is not None:
        manifest["likelihood"] = described
    return manifest | {"digest": digest_of(manifest)}


def describe_base(bayes: Posterior, kept: Collection[str]) -> dict[str, Any]:
    """What tells the base network from another; ``kept`` are the names of its tensors that come with the adapter."""
    return fingerprint(bayes.network) | {"sketches": _sketches(bayes, kept)}


def _sketches(bayes: Posterior, kept: Collection[str]) -> dict[str, list]:
    """What tells each tensor that is taken from the base network from another; each is made once, as none changes."""
    brought = {*adapter_state(bayes.network), *kept}
    taken = [entry for entry in base_tensors(bayes.network) if PREFIX + entry.key not in brought]
    for entry in taken:
        if entry.name not in bayes.sketches:
            bayes.sketches[entry.name] = sketch(entry.tensor)
    return {entry.name: bayes.sketches[entry.name].to_list() for entry in taken}


def adapter_shapes(bayes: Posterior) -> dict[str, list[int]]:
    """Name of each adapted layer to its rank and its inputs."""
    return {a.name: [a.rank, a.columns] for g in bayes.model.groups for a in g.adapters}


def load_adapter(bayes: Posterior, folder: Path) -> None:
    """Read μ, B, the head and the posterior of ``folder`` into an existing module of the same shape."""
    folder = adapter_in(folder)
    manifest = read_manifest(folder)
    check_base(folder, manifest, bayes.network.get_base_model())
    load_adapter_weights(bayes.network, folder)
    check_taken_from_base(folder, manifest, bayes.network)
    load_posterior(bayes, folder, manifest)


def load_posterior(bayes: Posterior, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Read the guide's and the likelihood's parameters, and what was tuned."""
    modules: dict[str, nn.Module] = {"guide.": bayes.guide, "model.": bayes.model}
    expected = {prefix + name: v for prefix, module in modules.items() for name, v in module.state_dict().items()}
    path = folder / POSTERIOR
    state = load_state(path, expected, f"{path} does not fit this network: it belongs to another model or guide")
    for prefix, module in modules.items():
        module.load_state_dict({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
    bayes.model.tuning = None if manifest["tuning"] is None else Tuning(**manifest["tuning"])
    _check_posterior(bayes, path)


def _check_posterior(bayes: Posterior, path: Path) -> None:
    """Finite numbers in the file can still stand for a v, α or σ that no float holds."""
    with torch.no_grad(), one_at_a_time:
        values = posterior_sites(bayes, 0, 0) | dict(bayes.model.named_pyro_params())
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: {name} is out of the range of {value.dtype}: use another copy")
