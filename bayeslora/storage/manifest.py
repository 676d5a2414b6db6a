"""The file that ties an adapter folder together: what it holds, for which network, and every file's SHA-256."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bayeslora._version import __version__
from bayeslora.adapters.provenance import Sketch
from bayeslora.errors import InputError
from bayeslora.files.records import is_integer, is_names, is_number, is_object_of, read_json
from bayeslora.files.writing import sha256_of
from bayeslora.models.tuning import Tuning

MANIFEST = "bayeslora.json"
POSTERIOR = "posterior.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, POSTERIOR)
CARD = "README.md"  # which people may edit
FORMAT = 1
PROBES = 16


def version_info() -> dict[str, str]:
    """Installed versions of bayeslora and of what its numbers depend on."""
    versions = {"bayeslora": __version__}
    for package in ("torch", "pyro-ppl", "peft", "transformers", "arviz"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's other entries: a damaged ε would load without complaint otherwise."""
    entries = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def is_adapter_folder(folder: Path) -> bool:
    """Whether ``folder`` holds what :func:`save_pretrained` writes."""
    return (folder / MANIFEST).is_file()


def own_files(folder: Path) -> set[str]:
    """What :func:`save_pretrained` has written into ``folder``, or would; the first parts of the names."""
    named = read_json(folder / MANIFEST).get("tokenizer", []) if is_adapter_folder(folder) else []
    return {MANIFEST, CARD, *FILES, *(name.split("/")[0] for name in named if isinstance(name, str))}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking that every file it names is there and whole."""
    if not folder.is_dir():
        raise InputError(f"no adapter folder at {folder}: give the folder that save_pretrained wrote")
    if not is_adapter_folder(folder):
        if (folder / ADAPTER_CONFIG).is_file():
            raise InputError(
                f"{folder} is a plain PEFT adapter without a posterior: open it with peft.PeftModel.from_pretrained "
                "and pass the result to BayesLoRA to put one on it"
            )
        raise InputError(f"{folder} holds no {MANIFEST}: it is not a folder that save_pretrained wrote")
    manifest = read_json(folder / MANIFEST)
    known = manifest.get("format")
    if is_integer(known) and known != FORMAT:
        raise InputError(f"{folder} has format {known}, this bayeslora reads {FORMAT}: use a matching version")
    for name, fits in _MANIFEST_ENTRIES.items():
        if not fits(manifest.get(name, _LATER_ENTRIES.get(name))) or name not in {*manifest, *_LATER_ENTRIES}:
            raise InputError(f"{folder / MANIFEST} is damaged (its {name!r}): use another copy of the folder")
    if manifest["digest"] != digest_of(manifest):
        raise InputError(f"{folder / MANIFEST} is damaged or was edited: use another copy of the folder")
    manifest = _LATER_ENTRIES | manifest
    for name in (*FILES, *manifest["tokenizer"]):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is incomplete: {name} is missing or not a regular file")
        try:
            whole = sha256_of(folder / name) == manifest["sha256"].get(name)
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read: {error}") from error
        if not whole:
            raise InputError(f"{folder / name} is truncated or was changed since it was saved: use another copy")
    return manifest


def _is_base(value: Any) -> bool:
    """A record of the base network as :func:`fingerprint` makes it."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and is_object_of(
            value.get("weights"), lambda w: isinstance(w, list) and len(w) == PROBES and all(map(is_number, w))
        )
        and is_object_of(value.get("sketches", {}), Sketch.is_list)
    )


# What earlier adapters do not have.
_LATER_ENTRIES: dict[str, Any] = {"kept": [], "tuning": None, "label_names": None, "tokenizer": []}


def _is_plain(name: str) -> bool:
    """Whether a file of that name lies in the folder itself, or one folder below."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part not in ("", ".", "..") and "\\" not in part for part in parts)


def _is_tuning(value: Any) -> bool:
    """What :meth:`Tuning.to_dict` makes."""
    if not isinstance(value, dict):
        return False
    later = {"agreement": None, "passes": 0, "blocks": None, "nll_all_blocks": None, "conformal": None}
    value = {**later, **value}
    if value.keys() != {f.name for f in fields(Tuning)}:
        return False
    counts = all(is_integer(value[name]) for name in ("examples", "num_samples", "passes"))
    if not (value["conformal"] is None or is_object_of(value["conformal"], lambda p: is_number(p) and 0 <= p <= 1)):
        return False
    names = ("nll", "nll_at_mean", "nll_untuned", "agreement", "nll_all_blocks")
    scores = all(value[name] is None or is_number(value[name]) for name in names)
    try:
        return counts and scores and Tuning(**value) is not None
    except InputError:
        return False


# What each entry of the manifest must be, apart from the configuration's own fields.
_MANIFEST_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "format": is_integer,
    "digest": lambda v: isinstance(v, str),
    "config": lambda v: isinstance(v, dict),
    "guide": lambda v: isinstance(v, str),
    "num_examples": lambda v: v is None or is_integer(v, 1),
    "adapters": lambda v: is_object_of(v, lambda a: isinstance(a, list) and len(a) == 2 and all(map(is_integer, a))),
    "base": _is_base,
    "kept": is_names,
    "tuning": lambda v: v is None or _is_tuning(v),
    "label_names": lambda v: v is None or is_names(v),
    "tokenizer": lambda v: is_names(v) and all(_is_plain(name) for name in v),
    "sha256": lambda v: is_object_of(v, lambda digest: isinstance(digest, str)),
}
