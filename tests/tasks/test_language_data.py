"""Prompts and answers as tokens: what is scored, what is cut, templates, chats and packing."""

import pytest
from datasets import Dataset

from bayeslora import InputError
from bayeslora.tasks.encoding import chat, encode_instructions, encode_letters, encode_options, encode_text, join, pack
from tests.language import tiny_tokenizer


def read(tokenizer, encoded):
    """What is scored, as text."""
    kept = [token for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != -100]
    assert [label for label in encoded["labels"] if label != -100] == kept
    return tokenizer.decode(kept)


def instructions():
    return Dataset.from_list(
        [{"asked": "where is the cat?", "told": "up", "n": 1}, {"asked": "the", "told": "a b", "n": 2}]
    )


def test_templates_name_columns():
    tokenizer = tiny_tokenizer()
    data = encode_instructions(instructions(), tokenizer, prompt="Question: {asked}\nAnswer:", target=" {told} {n}")
    assert data.column_names == ["input_ids", "attention_mask", "labels"]
    assert tokenizer.decode(data[0]["input_ids"]) == "Question : where is the cat ? Answer : up 1 [end]"
    assert [read(tokenizer, example) for example in data] == ["up 1 [end]", "a [unk] 2 [end]"]
    with pytest.raises(InputError, match="'colour'; the columns are asked"):
        encode_instructions(instructions(), tokenizer, prompt="{colour}", target="{told}")


def test_the_chat_template_is_the_tokenizers_own():
    tokenizer = tiny_tokenizer()
    options = {"prompt": "{asked}", "target": "{told}", "use_chat": True}
    data = encode_instructions(instructions(), tokenizer, **options, system="the dog")
    whole = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "the dog"},
            {"role": "user", "content": "where is the cat?"},
            {"role": "assistant", "content": "up"},
        ],
        tokenize=False,
    )
    assert data[0]["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert read(tokenizer, data[0]) == "up [end]"
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        chat(tokenizer, "the cat", "up")
    tokenizer.chat_template = "{% if not add_generation_prompt %}another{% endif %}{{ messages[0].content }}"
    with pytest.raises(InputError, match="finished turn"):
        chat(tokenizer, "the cat", "up")


def test_a_token_that_begins_every_text_comes_once():
    tokenizer = tiny_tokenizer(begin=True)
    begin = tokenizer.bos_token_id
    assert encode_text(tokenizer, "the cat", " up", end=False)["input_ids"] == tokenizer("the cat up")["input_ids"]
    assert encode_options(tokenizer, ["the cat"], [" up"])["input_ids"][0] == tokenizer("the cat up")["input_ids"]
    assert encode_letters(tokenizer, "the cat", 2)["input_ids"] == tokenizer("the cat")["input_ids"]
    templated = join(tokenizer, "[begin] the cat", " up")[0]
    assert templated.count(begin) == 1


def test_spaces_between_prompt_and_answer_belong_to_the_answer():
    tokenizer = tiny_tokenizer()
    assert join(tokenizer, "the cat ", "up") == join(tokenizer, "the cat", " up")


def test_an_option_without_a_prompt_follows_the_end_of_a_text():
    tokenizer = tiny_tokenizer()
    encoded = encode_options(tokenizer, [""], ["up"])
    assert encoded["input_ids"][0][0] == tokenizer.eos_token_id
    assert encoded["answer_mask"][0] == [0, 1]
    with pytest.raises(InputError, match="no tokens"):
        encode_options(tokenizer, ["the cat"], [""])


@pytest.mark.parametrize(
    ("length", "expected"), [(9, "the cat is big up up [end]"), (4, "big up up [end]"), (2, "up up")]
)
def test_the_prompt_is_cut_first_and_at_its_beginning(length, expected):
    tokenizer = tiny_tokenizer()
    encoded = encode_text(tokenizer, "the cat is big", " up up", max_length=length)
    assert tokenizer.decode(encoded["input_ids"]) == expected
    assert len(encoded["labels"]) == len(encoded["attention_mask"]) == len(encoded["input_ids"]) <= length


def test_padding_that_is_the_end_of_a_text_is_not_scored_but_the_end_is():
    from bayeslora.inference.predict import Collator

    tokenizer = tiny_tokenizer()
    texts = [encode_text(tokenizer, "the cat", " up"), encode_text(tokenizer, "the big cat goes", " up up")]
    batch = Collator(tokenizer.pad_token_id)(texts)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 2  # one end a text
    assert batch["labels"][0, 4:].tolist() == [-100] * 3
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_packing_fills_rows_and_starts_each_text_at_position_zero():
    texts = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 4, 5, 9)]
    rows = pack(texts, 8)
    assert [len(row["input_ids"]) for row in rows] == [7, 5, 9]
    assert rows[0]["position_ids"] == [0, 1, 2, 0, 1, 2, 3]
    assert rows[0]["labels"] == [-100, 1, 1, -100, 1, 1, 1]
    with pytest.raises(InputError, match="length"):
        pack(texts, 0)
