"""fit() on texts and on choices: what can be learnt is learnt, and the whole-set loss is exact."""

import numpy as np
import pytest
import torch

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.analysis import to_arviz
from bayeslora.inference.predict import Collator
from bayeslora.models import ChoiceLikelihood, NextTokenLikelihood
from bayeslora.tasks.encoding import encode_options, encode_text, pack
from tests.language import PLACES, tiny_language_model, tiny_tokenizer

RULE = {"cat": "north", "dog": "south", "ball": "up"}
OPTIONS = {"output_dir": None, "epochs": 8, "batch_size": 8, "learning_rate": 2e-2, "progress": False}


def sentences(count, seed=0):
    """Where each animal goes is always the same place."""
    random, tokenizer = np.random.default_rng(seed), tiny_tokenizer()
    animals = random.choice(list(RULE), count)
    colours = random.choice(["red", "blue", "green"], count)
    return [
        encode_text(tokenizer, f"where is the {colour} {animal}?", f" to the {RULE[animal]}")
        for animal, colour in zip(animals, colours, strict=True)
    ]


def choices(count, seed=0):
    random, tokenizer = np.random.default_rng(seed), tiny_tokenizer()
    examples = []
    for _ in range(count):
        animal = random.choice(list(RULE))
        others = [place for place in PLACES if place != RULE[animal]]
        places = random.permutation([RULE[animal], *random.choice(others, random.integers(1, 4), replace=False)])
        encoded = encode_options(
            tokenizer, [f"where is the {animal}?"] * len(places), [f" {place}" for place in places]
        )
        examples.append({**encoded, "labels": list(places).index(RULE[animal])})
    return examples


def test_next_tokens_are_learnt(tmp_path):
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4))
    before = bayes.predict(sentences(12, seed=1), num_samples=4, progress=False).nats_per_token
    result = fit(bayes, sentences(40), sentences(12, seed=1), **OPTIONS | {"output_dir": tmp_path})
    after = bayes.predict(sentences(12, seed=1), num_samples=4, progress=False)
    assert before > 3
    assert after.nats_per_token < 0.2
    assert result.metrics["eval_loss"] < 0.2
    assert after.sample_log_likelihood.std(0).max() > 1e-3  # the draws differ
    idata = to_arviz(bayes, sentences(12, seed=1), num_samples=4)
    np.testing.assert_allclose(idata.log_likelihood["labels"].values[0], after.sample_log_likelihood, atol=1e-5)


def test_choices_are_learnt_and_every_tool_for_classes_takes_them(tmp_path):
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4), likelihood=ChoiceLikelihood("ABCD"))
    result = fit(bayes, choices(48), choices(20, seed=1), **OPTIONS | {"output_dir": tmp_path, "best_metric": "nll"})
    assert result.metrics["eval_accuracy"] > 0.9
    data = choices(20, seed=2)
    prediction = bayes.predict(data, num_samples=4, progress=False)
    assert (prediction.probs.argmax(-1) == prediction.labels).mean() > 0.9
    idata = to_arviz(bayes, data, num_samples=4)
    assert list(idata.posterior_predictive.coords["class"].values) == list("ABCD")
    pointwise = idata.log_likelihood["labels"].values[0]
    np.testing.assert_allclose(pointwise, prediction.sample_log_likelihood, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_evaluation_is_over_the_whole_set_whatever_the_batch_size(tmp_path, reduction):
    texts = [*sentences(5), encode_text(tiny_tokenizer(), "a cat", " goes up up up up up up up up")]
    network, found = tiny_language_model(), []
    for size in (1, 2, 3):
        bayes = BayesLoRA(
            network if size == 1 else tiny_language_model(),
            MonteCLoRAConfig(r=4),
            likelihood=NextTokenLikelihood(reduction),
        )
        result = fit(
            bayes,
            texts,
            texts,
            output_dir=tmp_path / str(size),
            max_steps=1,
            learning_rate=1e-12,
            batch_size=size,
            progress=False,
        )
        found.append(result.metrics["eval_loss"])
    outputs = bayes.predict(texts, num_samples=0, progress=False)
    total = -outputs.sample_log_likelihood.sum()
    expected = total / outputs.num_tokens.sum() if reduction == "mean" else total / len(texts)
    assert found == pytest.approx([expected] * 3, rel=1e-5)


def test_packed_rows_train(tmp_path):
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4))
    rows = pack(sentences(48), 40)
    assert len(rows) < 16
    fit(bayes, rows, **OPTIONS | {"output_dir": tmp_path, "batch_size": 4})
    assert bayes.predict(sentences(12, seed=1), num_samples=0, progress=False).nats_per_token < 1


def test_the_evidence_bound_counts_each_text_once(tmp_path):
    config = MonteCLoRAConfig(r=4, normalization="elbo")
    bayes = BayesLoRA(tiny_language_model(), config, likelihood=NextTokenLikelihood("sum"))
    bayes.num_examples = 6
    batch = Collator(0)(sentences(3))
    torch.manual_seed(0)
    loss = bayes.train()(**batch).loss
    parts = bayes.elbo.parts
    kl = sum(float(value) for value in parts.kl.values())
    assert loss.item() == pytest.approx(float(parts.task) + kl + float(parts.cooperation), rel=1e-5)
    assert float(parts.task) > 3 * 4  # three words and the end, some four nats each


def test_texts_without_a_scored_token_are_refused(tmp_path):
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4))
    empty = encode_text(tiny_tokenizer(), "the cat", "", end=False)
    with pytest.raises(InputError, match="no token of text 1"):
        fit(bayes, [*sentences(1), empty], output_dir=tmp_path)
    with pytest.raises(InputError, match="one for each"):
        fit(bayes, [{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": 1}], output_dir=tmp_path)
    chooses = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4), likelihood=ChoiceLikelihood("AB"))
    with pytest.raises(InputError, match="2 classes"):
        fit(chooses, [{**choices(1)[0], "labels": 2}], output_dir=tmp_path)
