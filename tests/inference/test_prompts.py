"""What people hand to transformers' ``generate`` is taken, or refused by name; all forms write the same."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from tests.language import tiny_language_model, tiny_tokenizer, words
from tests.modules import randomize_b

TEXTS = ["where is the cat ?", "the ball"]
USER = [{"role": "user", "content": "where is the cat ?"}]
QUICK = {"num_samples": 2, "max_new_tokens": 5, "progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(pad_is_end=False)


@pytest.fixture(scope="module")
def bayes(tokenizer):
    torch.manual_seed(0)
    network = tiny_language_model()
    network.config.pad_token_id = tokenizer.pad_token_id
    made = randomize_b(BayesLoRA(network, MonteCLoRAConfig(r=4, sample_scaler=0.5))).eval()
    made.tokenizer = tokenizer
    return made


def tokens_of(text):
    return words(text)


def same(one, other):
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, atol=1e-5)


@pytest.fixture(scope="module")
def expected(bayes):
    return bayes.generate([tokens_of(text) for text in TEXTS], **QUICK)


def test_texts(bayes, expected):
    same(bayes.generate(TEXTS, **QUICK), expected)
    same(bayes.generate(tuple(TEXTS), **QUICK), expected)
    one = bayes.generate(TEXTS[0], **QUICK)
    assert one.tokens == expected.tokens[:1]
    assert one.texts is not None


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_returns(bayes, tokenizer, expected, side):
    tokenizer.padding_side = side
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    same(bayes.generate(batch, **QUICK), expected)
    same(bayes.generate(**{name: batch[name] for name in ("input_ids", "attention_mask")}, **QUICK), expected)
    same(bayes.generate(tokenizer(TEXTS), **QUICK), expected)  # lists
    with pytest.raises(InputError, match="look padded"):
        bayes.generate(batch["input_ids"], **QUICK)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_tokens(bayes, expected, form):
    tokens = tokens_of(TEXTS[0])
    for prompts in (form(tokens), form([tokens])):
        assert bayes.generate(prompts, **QUICK).tokens == expected.tokens[:1]
        assert bayes.generate(input_ids=prompts, **QUICK).tokens == expected.tokens[:1]


def test_conversations(bayes, tokenizer):
    template = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    asked = bayes.generate([tokens_of(template)], **QUICK)
    for prompts in (USER, [USER], USER[0], [tuple(USER)]):
        same(bayes.generate(prompts, **QUICK), asked)
    two = bayes.generate([USER, [*USER, {"role": "assistant", "content": "the"}]], **QUICK)
    begun = tokenizer.apply_chat_template(
        [*USER, {"role": "assistant", "content": "the"}], tokenize=False, continue_final_message=True
    )
    assert two.tokens == [asked.tokens[0], bayes.generate(begun, **QUICK).tokens[0]]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GenerationConfig(max_new_tokens=3), {"max_new_tokens": 3}),
        (GenerationConfig(max_new_tokens=9, do_sample=True), {"max_new_tokens": 9, "temperature": 1.0}),
        (
            GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=0, top_k=0),
            {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9},
        ),
        (GenerationConfig(max_new_tokens=9, stop_strings=["the"]), {"max_new_tokens": 9, "stops": ["the"]}),
        (GenerationConfig(max_new_tokens=4, num_beams=1, repetition_penalty=1.0), {"max_new_tokens": 4}),
    ],
)
def test_a_generation_config(bayes, config, options):
    own = {"num_samples": 2, "progress": False}
    same(bayes.generate(TEXTS, generation_config=config, **own), bayes.generate(TEXTS, **options, **own))


def test_ends_of_a_generation_config(bayes, expected):
    whole = expected.tokens[0][1]
    config = GenerationConfig(max_new_tokens=5, eos_token_id=[whole[2]])
    written = bayes.generate(TEXTS, num_samples=2, generation_config=config, progress=False)
    assert written.tokens[0][1] == whole[: whole.index(whole[2]) + 1]


def test_arguments_come_before_the_config(bayes, expected):
    config = GenerationConfig(max_new_tokens=2, do_sample=True)
    same(bayes.generate(TEXTS, generation_config=config, do_sample=False, **QUICK), expected)
    drawn = bayes.generate(TEXTS, do_sample=True, **QUICK)
    same(drawn, bayes.generate(TEXTS, temperature=1.0, **QUICK))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 4}, r"num_beams=4 is not honoured.*as_draw"),
        ({"generation_config": GenerationConfig(top_k=20)}, "top_k=20 is not honoured"),
        ({"generation_config": GenerationConfig(repetition_penalty=1.2)}, "repetition_penalty=1.2 is not"),
        ({"generation_config": GenerationConfig(max_length=20)}, "max_length=20 is not honoured"),
        ({"do_sample": True, "temperature": 0.0}, "leave one of them out"),
        ({"do_sample": False, "temperature": 0.7}, r"temperature=0\.7 does nothing"),
        ({"top_p": 0.9}, r"top_p=0\.9 does nothing"),
        ({"prompts": None}, "one of the two"),
        ({"input_ids": [[1]]}, "one of the two"),
        ({"attention_mask": [[1]]}, "belongs to input_ids"),
        ({"prompts": [{"role": "user"}]}, "a role and a content"),
        ({"prompts": {"input_ids": [[5, 6]], "attention_mask": [[1]]}}, "one number for each"),
        ({"prompts": {"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}}, "without a token"),
        ({"prompts": {"input_ids": []}}, "no tokens"),
        ({"prompts": [USER, "text", 3]}, "at least one text"),
        ({"prompts": [USER, ["text"]]}, "prompt 1 is not a list of tokens"),
    ],
)
def test_what_is_refused(bayes, options, says):
    with pytest.raises(InputError, match=says):
        bayes.generate(**{"prompts": TEXTS, **options})


def test_messages_need_a_template():
    plain = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=2))
    with pytest.raises(InputError, match="messages need tokenizer="):
        plain.generate(USER)
    without = tiny_tokenizer()
    without.chat_template = None
    with pytest.raises(InputError, match="a tokenizer that has a chat template"):
        plain.generate(USER, tokenizer=without)
