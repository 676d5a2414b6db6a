"""A Llama in one GGUF file as a plain transformers folder.

transformers can read GGUF itself, but then flags the network as quantised, which cannot be trained, and forgets that
the tokenizer splits digits.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayeslora.errors import InputError

_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def unpack(file: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` (float32) and the tokenizer's files into ``folder``.

    Raises:
        InputError: gguf is not installed, or the file holds something other than a Llama.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError("reading SmolLM2 needs gguf: pip install 'bayeslora[language]'") from error
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    reader = gguf.GGUFReader(str(file))
    _network(reader, gguf.quants.dequantize).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def _network(reader: Any, dequantize: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    def value(name: str) -> Any:
        return reader.fields[name].contents()

    if value("general.architecture") != "llama":
        raise InputError(f"the file holds a network of kind {value('general.architecture')!r}, expected llama")
    heads = {"attn_q": value("llama.attention.head_count"), "attn_k": value("llama.attention.head_count_kv")}
    config = LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings="output.weight" not in {tensor.name for tensor in reader.tensors},
    )
    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        name = _TOP.get(tensor.name)
        if name is None and tensor.name.startswith("blk."):
            _, block, part, _ = tensor.name.split(".")
            name = f"model.layers.{block}.{_BLOCK[part]}.weight"
            if part in heads:  # llama.cpp interleaves the pairs that are rotated together
                halves = weight.reshape(heads[part], -1, 2, weight.shape[-1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        if name is not None:
            state[name] = torch.from_numpy(np.array(weight, dtype=np.float32, order="C"))
    network = LlamaForCausalLM(config)
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:
        raise InputError(f"the file's weights are not those of a Llama: {[*missing, *unexpected][:3]}")
    network.tie_weights()
    return network
