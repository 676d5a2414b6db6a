"""The encoder of a Whisper in CTranslate2's format as a transformers folder for audio classification."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslora.errors import InputError

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_BLOCK = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "ffn/layer_norm": "final_layer_norm",
}
_SUFFIXES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def unpack(file: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` (float32, the encoder alone) and ``preprocessor_config.json``.

    Raises:
        InputError: the file holds something other than a Whisper.
    """
    from safetensors.torch import save_file
    from transformers import WhisperConfig, WhisperFeatureExtractor

    values = read(file)
    try:
        state = _encoder(values)
        layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
        positions, width = state["embed_positions.weight"].shape
        heads = int(values["encoder/num_heads"])
        config = WhisperConfig(
            num_mel_bins=state["conv1.weight"].shape[1],
            d_model=width,
            encoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            decoder_layers=layers,
            encoder_ffn_dim=state["layers.0.fc1.weight"].shape[0],
            max_source_positions=positions,
            vocab_size=values["decoder/embeddings/weight"].shape[0],
            architectures=["WhisperForAudioClassification"],
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{file.name} is not a Whisper of CTranslate2: {error}") from error
    folder.mkdir(parents=True)
    save_file(
        {f"encoder.{name}": value for name, value in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def read(file: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 ``model.bin`` by name.

    Raises:
        InputError: the file is cut off, or of another format.
    """
    reader = _Reader(file.read_bytes())
    try:
        reader.number("I"), reader.text(), reader.number("I")  # versions, and the kind of model
        return dict(reader.variable() for _ in range(reader.number("I")))
    except (struct.error, KeyError, ValueError) as error:
        raise InputError(f"{file.name} is not a model of CTranslate2, or is damaged: {error}") from error


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        """Its length with the final zero comes first."""
        size = self.number("H")
        self.at += size
        return self.data[self.at - size : self.at - 1].decode()

    def variable(self) -> tuple[str, np.ndarray]:
        name = self.text()
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind, size = np.dtype(_TYPES[self.number("B")]), self.number("I")
        values = np.frombuffer(self.data, kind, size // kind.itemsize, self.at).reshape(shape)
        self.at += size
        return name, values


def _encoder(values: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """transformers' names, without ``encoder.``; queries, keys and values lie in one matrix here."""
    state: dict[str, Any] = {"embed_positions.weight": values["encoder/position_encodings/encodings"]}
    for name, value in values.items():
        place, _, word = name.rpartition("/")
        if not place.startswith("encoder/") or word not in _SUFFIXES:
            continue
        parts = place.split("/")[1:]
        if not parts[0].startswith("layer_") or parts == ["layer_norm"]:
            state[f"{parts[0]}.{_SUFFIXES[word]}"] = value
            continue
        block, part = f"layers.{parts[0].removeprefix('layer_')}", "/".join(parts[1:])
        if part == "self_attention/linear_0":
            for letter, third in zip("qkv", np.split(value, 3), strict=True):
                if (letter, word) != ("k", "bias"):  # which Whisper does not have
                    state[f"{block}.self_attn.{letter}_proj.{word}"] = third
        else:
            state[f"{block}.{_BLOCK[part]}.{_SUFFIXES[word]}"] = value
    return {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}
