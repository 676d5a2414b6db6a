"""The file of predictions that every cell leaves."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bayeslora.files.writing import replacing

PREDICTIONS_FILE = "predictions.npz"


def write_predictions(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``SPLIT/METHOD`` to probabilities (n, C), in single precision, and ``SPLIT/labels`` to labels (n,).

    The file is there whole or not at all.
    """
    with replacing(folder / PREDICTIONS_FILE) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def is_damaged(folder: Path) -> bool:
    """Whether the predictions are there, but not whole."""
    file = folder / PREDICTIONS_FILE
    if not file.is_file():
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        return True


def read_predictions(folder: Path, split: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label to probabilities (n, C) and labels (n,) on one split, of a cell's folder."""
    with np.load(folder / PREDICTIONS_FILE, allow_pickle=False) as arrays:
        names = [key for key in arrays.files if key.startswith(f"{split}/") and key != f"{split}/labels"]
        return {key.split("/", 1)[1]: (_normalised(arrays[key]), arrays[f"{split}/labels"]) for key in names}


def _normalised(probs: np.ndarray) -> np.ndarray:
    """Stored in single precision: rows sum to one again."""
    wide = probs.astype(np.float64)
    return wide / wide.sum(-1, keepdims=True)
