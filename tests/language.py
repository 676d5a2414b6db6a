"""A tiny causal language model and its tokenizer, made on the spot."""

import string

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

PLACES = ["north", "south", "east", "west", "up", "down"]
WORDS = ["Question", "Answer", "Q", "A", ":", ".", "?", "_", "the", "a", "is", "to", "of", "ball", "box", "red", "blue",
         "green", "big", "small", "cat", "dog", "goes", "where", "which", "user", "assistant", "yes", "no", "because",
         *PLACES, *string.digits, *string.ascii_uppercase]  # fmt: skip
CHAT = ("{% for m in messages %}[{{ m.role }}] {{ m.content }} [end] {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}")  # fmt: skip


def tiny_tokenizer(*, pad_is_end: bool = True, begin: bool = False):
    """Words and punctuation; the end of a text is its padding too, as in SmolLM2, unless said otherwise."""
    special = ["[end]", "[unk]", "[begin]", "[pad]"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*special, *WORDS]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin:
        from tokenizers.processors import TemplateProcessing

        words.post_processor = TemplateProcessing(single="[begin] $A", special_tokens=[("[begin]", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[unk]",
        eos_token="[end]",
        pad_token="[end]" if pad_is_end else "[pad]",
        bos_token="[begin]" if begin else None,
        additional_special_tokens=["[user]", "[assistant]"],
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_language_model(kind: str = "llama", *, layers: int = 2, seed: int = 0, scale: float = 0.3, **options):
    """A causal language model of width 32 with random weights, large enough that its predictions differ."""
    small = {"vocab_size": 96, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None}
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 48}
    configs = {
        "llama": lambda: transformers.LlamaConfig(
            **small, **sizes, num_key_value_heads=2, max_position_embeddings=256, initializer_range=scale, **options
        ),
        "gpt2": lambda: transformers.GPT2Config(
            **small,
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_positions=256,
            initializer_range=scale,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **options,
        ),
    }
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(configs[kind]()).eval()


def words(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
