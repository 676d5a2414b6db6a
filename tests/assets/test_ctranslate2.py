"""A Whisper in CTranslate2's format is read as transformers' own; a damaged file is refused."""

import struct

import numpy as np
import pytest
import torch
from transformers import WhisperForAudioClassification

from bayeslora.assets.ctranslate2 import read, unpack
from bayeslora.errors import InputError
from tests.architectures import ARCHITECTURES


def encoder():
    return ARCHITECTURES["whisper"].network(init_std=0.3).encoder


def write(file, variables):
    """The format's own layout: versions, then each variable's name, shape, type and bytes."""

    def text(string):
        return struct.pack("<H", len(string) + 1) + string.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        code = {"float32": 0, "int16": 2, "float16": 4}[str(value.dtype)]
        data += text(name) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        data += struct.pack("<BI", code, value.nbytes) + value.tobytes()
    file.write_bytes(data)


def renamed(encoder):
    """An encoder's parameters under CTranslate2's names."""
    variables = {"encoder/num_heads": np.array(2, np.int16), "decoder/embeddings/weight": np.zeros((8, 16), np.float16)}
    state = {name: value.numpy() for name, value in encoder.state_dict().items()}
    variables["encoder/position_encodings/encodings"] = state.pop("embed_positions.weight")
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            variables[f"encoder/{conv}/{kind}"] = state.pop(f"{conv}.{kind}")
    for kind, ours in (("gamma", "weight"), ("beta", "bias")):
        variables[f"encoder/layer_norm/{kind}"] = state.pop(f"layer_norm.{ours}")
    for block in range(2):
        here, there = f"layers.{block}", f"encoder/layer_{block}"
        state[f"{here}.self_attn.k_proj.bias"] = np.zeros(16, np.float32)
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{here}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            variables[f"{there}/self_attention/linear_0/{kind}"] = np.concatenate(parts)
            variables[f"{there}/self_attention/linear_1/{kind}"] = state.pop(f"{here}.self_attn.out_proj.{kind}")
            for index in range(2):
                variables[f"{there}/ffn/linear_{index}/{kind}"] = state.pop(f"{here}.fc{index + 1}.{kind}")
        for norm, ours in (("self_attention", "self_attn_layer_norm"), ("ffn", "final_layer_norm")):
            for kind, name in (("gamma", "weight"), ("beta", "bias")):
                variables[f"{there}/{norm}/layer_norm/{kind}"] = state.pop(f"{here}.{ours}.{name}")
    assert not state
    return variables


def test_an_encoder_comes_through(tmp_path):
    written = encoder()
    write(tmp_path / "model.bin", renamed(written))
    unpack(tmp_path / "model.bin", tmp_path / "out")
    again = WhisperForAudioClassification.from_pretrained(tmp_path / "out", num_labels=2).encoder.eval()
    features = torch.randn(3, 8, 16)
    with torch.no_grad():
        expected, result = (one(features).last_hidden_state for one in (written, again))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("size", [0, 3, 40, 2000])
def test_cut_off(size, tmp_path):
    write(tmp_path / "whole.bin", renamed(encoder()))
    (tmp_path / "model.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.bin is not a model of CTranslate2, or is damaged"):
        read(tmp_path / "model.bin")


def test_something_else(tmp_path):
    write(tmp_path / "model.bin", {"encoder/num_heads": np.array(2, np.int16)})
    with pytest.raises(InputError, match="not a Whisper"):
        unpack(tmp_path / "model.bin", tmp_path / "out")
