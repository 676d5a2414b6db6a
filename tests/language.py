"""A tiny causal language model, its tokenizer, and questions and texts in their words, made on the spot."""

import json
import string

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from bayeslora.tasks.encoding import encode_options

PLACES = ["north", "south", "east", "west", "up", "down"]
WORDS = [
    "Question",
    "Answer",
    "Q",
    "A",
    ":",
    ".",
    "?",
    "_",
    "the",
    "a",
    "is",
    "to",
    "of",
    "ball",
    "box",
    "red",
    "blue",
    "green",
    "big",
    "small",
    "cat",
    "dog",
    "goes",
    "where",
    "which",
    "user",
    "assistant",
    "yes",
    "no",
    "because",
    *PLACES,
    *string.digits,
    *string.ascii_uppercase,
]
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end] {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# one row each, as the hub has it, and what must come of it: prompts, options, label
ARC = {"question": "Which is red?", "choices": {"text": ["ball", "cat", "dog"], "label": ["A", "B", "C"]}}
OFFICIAL = {
    "piqa": (
        {"goal": "to go up", "sol1": "the box", "sol2": "the ball", "label": 1},
        ["Question: to go up\nAnswer:"] * 2,
        ["the box", "the ball"],
        1,
    ),
    "siqa": (
        {
            "context": "the cat is big.",
            "question": "where?",
            "answerA": "up",
            "answerB": "down",
            "answerC": "east",
            "label": "3",
        },
        ["Q: the cat is big. where?\nA:"] * 3,
        ["up", "down", "east"],
        2,
    ),
    "winogrande": (
        {"sentence": "the box is big because _ is a cat.", "option1": "the dog", "option2": "the ball", "answer": "2"},
        ["the box is big because the dog", "the box is big because the ball"],
        ["is a cat."] * 2,
        1,
    ),
    "arc_easy": (
        {"id": "1", **ARC, "answerKey": "C"},
        ["Question: Which is red?\nAnswer:"] * 3,
        ["ball", "cat", "dog"],
        2,
    ),
    "arc_challenge": (
        {"id": "1", **ARC, "choices": {"text": ["ball", "cat", "dog"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        ["Question: Which is red?\nAnswer:"] * 3,
        ["ball", "cat", "dog"],
        1,
    ),
    "openbookqa": (
        {"id": "1", "question_stem": "the red", "choices": ARC["choices"], "answerKey": "A"},
        ["the red"] * 3,
        ["ball", "cat", "dog"],
        0,
    ),
    "boolq_question_only": (
        {"question": "is the cat a dog", "answer": False, "passage": "no"},
        ["Question: is the cat a dog?\nAnswer:"] * 2,
        ["no", "yes"],
        0,
    ),
}


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


def questions():
    """Three questions with three, two and four options of differing lengths."""
    tokenizer = tiny_tokenizer()
    options = [
        [" red", " the big blue", " green box"],
        [" north", " to the south"],
        [f" {place}" for place in PLACES[:4]],
    ]
    asked = ["Question: which ball?", "where is the cat", "the dog goes"]
    encoded = [encode_options(tokenizer, [q] * len(o), o) for q, o in zip(asked, options, strict=True)]
    return [{**example, "labels": label} for example, label in zip(encoded, (2, 0, 3), strict=True)]


def write(folder, name, split, rows):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
