"""A Llama written as GGUF, as llama.cpp arranges it, comes back as the network it was."""

import gguf
import pytest
import torch

from bayeslora import InputError
from bayeslora.assets.gguf import _BLOCK, _TOP, _network
from tests.language import tiny_language_model


def interleaved(weight, heads):
    """Rows of queries or keys with the pairs that are rotated together side by side."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(network, file, *, architecture="llama"):
    config = network.config
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {theirs: ours for ours, theirs in _TOP.items()}
    for name, tensor in network.state_dict().items():
        values = tensor.numpy()
        if name.startswith("model.layers."):
            block, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            kind = next(ours for ours, theirs in _BLOCK.items() if theirs == part)
            projection = part.rpartition(".")[2]
            values = interleaved(values, heads[projection]) if projection in heads else values
            names[name] = f"blk.{block}.{kind}.weight"
        writer.add_tensor(names[name], values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(str(file))


@torch.no_grad()
def test_a_network_comes_back(tmp_path):
    network = tiny_language_model()
    again = _network(write(network, tmp_path / "model.gguf"), gguf.quants.dequantize).eval()
    tokens = torch.arange(5, 25)[None]
    torch.testing.assert_close(again(tokens).logits, network(tokens).logits)
    assert again.config.eos_token_id == 2
    assert not getattr(again, "is_quantized", False)


def test_another_kind_of_network_is_refused(tmp_path):
    reader = write(tiny_language_model(), tmp_path / "model.gguf", architecture="gpt2")
    with pytest.raises(InputError, match="kind 'gpt2'"):
        _network(reader, gguf.quants.dequantize)
