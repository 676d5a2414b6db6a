"""Likelihoods of texts and choices: closed forms, transformers' own loss, padding, one draw for all of an example."""

import copy

import numpy as np
import pyro
import pytest
import torch

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.adapters.drawing import using_draw, using_noise
from bayeslora.data.batches import Collator
from bayeslora.inference.draws import Draws
from bayeslora.models import ChoiceLikelihood, NextTokenLikelihood
from bayeslora.models.language import ABSENT, target_log_probs
from bayeslora.tasks.encoding import encode_letters, encode_text, pack
from tests.conftest import tiny_batch, tiny_network
from tests.language import questions, tiny_language_model, tiny_tokenizer

COLLATE = Collator(pad_token_id=0)  # the end of a text is its padding


def texts():
    tokenizer = tiny_tokenizer()
    pairs = [("the ball is", " red"), ("Question: where is the dog? Answer:", " to the north"), ("a cat", " goes up")]
    return [encode_text(tokenizer, prompt, target) for prompt, target in pairs]


@torch.no_grad()
def by_hand(network, tokens, first):
    """Log-probability of the tokens from place ``first`` on, one token after another."""
    total = 0.0
    for place in range(first, len(tokens)):
        logits = network(torch.tensor([tokens[:place]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[tokens[place]])
    return total


def choosing(**config):
    network = tiny_language_model()
    options = {"r": 4, "sample_scaler": 0.5, **config}
    bayes = BayesLoRA(network, MonteCLoRAConfig(**options), likelihood=ChoiceLikelihood("ABCD"))
    return with_signal(bayes)


def with_signal(bayes):
    """B away from zero, so that draws differ."""
    for module in bayes.network.modules():
        if hasattr(module, "lora_B"):
            for layer in module.lora_B.values():
                torch.nn.init.normal_(layer.weight, std=0.3)
    return bayes


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_probabilities_are_those_of_a_loop_over_tokens(kind):
    network, examples = tiny_language_model(kind), texts()
    batch = COLLATE(examples)
    with torch.no_grad():
        found = NextTokenLikelihood().outputs(network, batch, batch.pop("labels"))
    for row, example in zip(found, examples, strict=True):
        first = sum(label == -100 for label in example["labels"])
        assert float(row[0]) == pytest.approx(by_hand(network, example["input_ids"], first), rel=1e-5)
        assert int(row[1]) == len(example["labels"]) - first


def test_the_output_layer_runs_at_the_scored_tokens_only():
    network, batch, seen = tiny_language_model(), COLLATE(texts()), []
    labels = batch.pop("labels")
    network.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    log_probs = target_log_probs(network, batch, labels)
    assert seen == [(1, int((labels != -100).sum()), 32)]
    torch.testing.assert_close(log_probs != 0, labels != -100)  # each beside its label


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_noise_loss_and_gradient_are_those_of_transformers(checkpointing):
    network, batch = tiny_language_model(), COLLATE(texts())
    bayes = with_signal(BayesLoRA(network, MonteCLoRAConfig(r=4, sample_scaler=0.0, lora_dropout=0.0)))
    plain = copy.deepcopy(bayes.network).train()
    bayes.train()
    if checkpointing:
        bayes.activation_checkpointing_enable()
    ours, theirs = bayes(**batch).loss, plain(**batch).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    ours.backward()
    theirs.backward()
    compared = 0
    for (name, mine), (_, other) in zip(bayes.network.named_parameters(), plain.named_parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
            compared += 1
    assert compared == 28  # A and B of seven layers in two blocks


def test_sum_is_per_text_and_mean_is_per_token_of_the_batch():
    network, batch = tiny_language_model(), COLLATE(texts())
    labels = batch.pop("labels")
    losses = {}
    for reduction in ("sum", "mean"):
        likelihood = NextTokenLikelihood(reduction)
        outputs = likelihood.outputs(network, batch, labels)
        site = pyro.poutine.trace(likelihood.forward).get_trace(outputs, labels).nodes["labels"]
        losses[reduction] = -site["fn"].log_prob(site["value"])
        assert losses[reduction].shape == (3,)
    torch.testing.assert_close(losses["sum"], -outputs[:, 0])
    torch.testing.assert_close(losses["mean"].mean(), losses["sum"].sum() / outputs[:, 1].sum())


def test_density_is_only_that_of_the_labels_that_were_evaluated():
    batch = COLLATE(texts())
    likelihood = NextTokenLikelihood()
    labels = batch.pop("labels")
    outputs = likelihood.outputs(tiny_language_model(), batch, labels)
    site = pyro.poutine.trace(likelihood.forward).get_trace(outputs, labels).nodes["labels"]
    with pytest.raises(InputError, match="other labels"):
        site["fn"].log_prob(labels.flip(0))
    with pytest.raises(InputError, match=r"generate\(\)"):
        likelihood(outputs, None)


def test_packed_texts_score_as_they_do_alone():
    network, examples = tiny_language_model(), texts()
    rows = pack(examples, 14)
    assert [len(row["input_ids"]) for row in rows] == [5, 13, 5]
    likelihood = NextTokenLikelihood("sum")
    alone, packed = COLLATE(examples), COLLATE(rows)
    with torch.no_grad():
        separate = likelihood.outputs(network, alone, alone.pop("labels")).sum(0)
        together = likelihood.outputs(network, packed, packed.pop("labels")).sum(0)
    torch.testing.assert_close(together, separate)
    everything = COLLATE(pack(examples, 100))
    assert everything["input_ids"].shape[0] == 1
    with torch.no_grad():
        torch.testing.assert_close(likelihood.outputs(network, everything, everything.pop("labels")).sum(0), separate)


@pytest.mark.parametrize("normalization", ["tokens", "characters", "none"])
def test_scores_of_options_are_those_of_a_loop_over_tokens(normalization):
    network, batch = tiny_language_model(), COLLATE(questions())
    with torch.no_grad():
        scores = ChoiceLikelihood("ABCD", normalization).outputs(network, batch)
    for row, example in zip(scores, questions(), strict=True):
        for option, (tokens, answer) in enumerate(zip(example["input_ids"], example["answer_mask"], strict=True)):
            size = {"tokens": sum(answer), "characters": example["answer_characters"][option], "none": 1}
            expected = by_hand(network, tokens, answer.index(1)) / size[normalization]
            assert float(row[option]) == pytest.approx(expected, rel=1e-4)
        assert (row[len(example["input_ids"]) :] == ABSENT).all()


def test_scores_do_not_depend_on_the_batch_nor_on_what_pads_it():
    network, likelihood = tiny_language_model(), ChoiceLikelihood("ABCD")
    with torch.no_grad():
        together = likelihood.outputs(network, COLLATE(questions()))
        other_padding = likelihood.outputs(network, Collator(pad_token_id=3)(questions()))
        alone = torch.cat([likelihood.outputs(network, COLLATE([example])) for example in questions()])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, other_padding, rtol=0, atol=0)


def test_letters_are_the_next_token():
    network, tokenizer = tiny_language_model(), tiny_tokenizer()
    prompts = ["where is the cat A . red B . blue Answer :", "which ball A . red B . blue C . big Answer :"]
    examples = [encode_letters(tokenizer, prompt, count) for prompt, count in zip(prompts, (2, 3), strict=True)]
    with torch.no_grad():
        scores = ChoiceLikelihood("ABCD").outputs(network, COLLATE(examples))
        for row, prompt, count in zip(scores, prompts, (2, 3), strict=True):
            tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
            log_probs = network(tokens).logits[0, -1].log_softmax(-1)
            expected = log_probs[[tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"[:count]]]
            torch.testing.assert_close(row[:count], expected, rtol=1e-4, atol=1e-4)
            assert (row[count:] == ABSENT).all()


def test_all_options_of_a_question_see_the_same_draw():
    bayes = choosing()
    batch = COLLATE(questions())
    labels = batch.pop("labels")
    assert bayes._has_own_noise({**batch, "labels": labels})
    draws = Draws(bayes, 3, seed=0)
    with torch.no_grad():
        with using_draw(bayes.model.groups, draws.matrices(0, 3)):
            together = bayes.model.outputs(batch)  # question i under draw i
        for index, example in enumerate(questions()):
            alone = COLLATE([{name: value for name, value in example.items() if name != "labels"}])
            with using_draw(bayes.model.groups, draws.matrices(index, 1)):
                torch.testing.assert_close(together[index : index + 1], bayes.model.outputs(alone))
        with using_draw(bayes.model.groups, draws.matrices(0, 1)):
            assert (bayes.model.outputs(batch)[1] - together[1]).abs().max() > 1e-3  # the draws do differ


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_prediction_of_choices_averages_the_draws(batch_size):
    bayes = choosing()
    prediction = bayes.predict(questions(), num_samples=4, batch_size=batch_size, progress=False)
    draws, expected = Draws(bayes, 4, seed=0), []
    with torch.no_grad():
        for index in range(4):
            with using_draw(bayes.model.groups, draws.matrices(index, 1)):
                expected.append(bayes.model.outputs(COLLATE(questions())).double().softmax(-1))
    np.testing.assert_allclose(prediction.probs, torch.stack(expected).mean(0), atol=1e-5)
    assert prediction.label_names == ("A", "B", "C", "D")
    assert COLLATE(questions())["attention_mask"][1, 2:].sum(-1).tolist() == [1, 1]  # something to attend to
    assert (prediction.probs[1, 2:] == 0).all()
    assert (prediction.entropy <= np.log([3, 2, 4]) + 1e-9).all()
    assert prediction.labels.tolist() == [2, 0, 3]


def test_prediction_of_texts_gives_their_likelihoods():
    bayes = with_signal(BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4, sample_scaler=0.5)))
    prediction = bayes.predict(texts(), num_samples=3, batch_size=2, progress=False)
    draws = Draws(bayes, 3, seed=0)
    for index in range(3):
        for number, example in enumerate(texts()):
            batch = COLLATE([example])
            with torch.no_grad(), using_draw(bayes.model.groups, draws.matrices(index, 1)):
                alone = bayes.model.outputs(batch, batch.pop("labels"))[0]
            assert prediction.sample_log_likelihood[index, number] == pytest.approx(float(alone[0]), rel=1e-4)
            assert prediction.num_tokens[number] == alone[1]
    likelihoods = np.exp(prediction.sample_log_likelihood)
    assert prediction.nats_per_token == pytest.approx(-np.log(likelihoods.mean(0)).sum() / prediction.num_tokens.sum())
    assert prediction.perplexity == pytest.approx(np.exp(prediction.nats_per_token))


@pytest.mark.parametrize("likelihood", [NextTokenLikelihood("sum"), ChoiceLikelihood("WXYZ", "none")])
def test_the_likelihood_is_stored_with_the_adapter(tmp_path, likelihood):
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4), likelihood=likelihood)
    bayes.save_pretrained(tmp_path / "adapter")
    again = BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_language_model())
    assert type(again.model.likelihood) is type(likelihood)
    assert again.model.likelihood.describe() == likelihood.describe()


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {"kind": "gaussian"},
        {"kind": "choice", "label_names": [1, 2]},
        {"kind": "choice", "x": 1},
        {"kind": []},
        {"kind": "next_token", "reduction": "max"},
    ],
)
def test_an_unknown_likelihood_is_refused(record):
    from bayeslora.models.selection import described_likelihood

    with pytest.raises(InputError):
        described_likelihood(record)


def test_mistakes_are_explained():
    network = tiny_language_model()
    with pytest.raises(InputError, match="reduction must be"):
        NextTokenLikelihood("max")
    with pytest.raises(InputError, match="normalization must be"):
        ChoiceLikelihood("AB", "bytes")
    with pytest.raises(InputError, match="answer_mask or letter_ids"):
        ChoiceLikelihood("AB").outputs(network, {"input_ids": torch.ones(1, 2, dtype=torch.long)})
    with pytest.raises(InputError, match="4 options"):
        ChoiceLikelihood("AB").outputs(network, COLLATE(questions()))
    bayes = BayesLoRA(network, MonteCLoRAConfig(r=4))
    with pytest.raises(InputError, match="no labels"):
        bayes.predict([{"input_ids": [1, 2], "attention_mask": [1, 1]}], progress=False)


def test_in_training_all_options_of_a_question_see_its_own_mirror_image_of_the_noise():
    bayes = choosing()
    batch = COLLATE(questions())
    labels = batch.pop("labels")
    generator = torch.Generator().manual_seed(0)
    groups = bayes.model.groups
    noise = {g.name: torch.randn(len(g), g.columns, g.rank, generator=generator) for g in groups}
    signs = bayes._signs(len(labels), 1)
    with torch.no_grad():
        with using_noise(groups, noise, signs):
            together = bayes.model.outputs(batch)
        for index, example in enumerate(questions()):
            alone = COLLATE([{name: value for name, value in example.items() if name != "labels"}])
            drawn = {g.name: g.mean() + noise[g.name] * signs[g.name][:, index, None] for g in groups}
            with using_draw(groups, drawn):
                torch.testing.assert_close(
                    together[index : index + 1], bayes.model.outputs(alone), rtol=1e-4, atol=1e-4
                )
    assert any((signs[g.name][:, 0] != signs[g.name][:, 1]).any() for g in groups)


@pytest.mark.parametrize("kind", ["choice", "text"])
def test_checkpointing_changes_no_gradient_under_noise(kind):
    found = []
    for checkpointing in (False, True):
        bayes = choosing() if kind == "choice" else BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4))
        torch.manual_seed(1)
        with_signal(bayes).train()
        if checkpointing:
            bayes.activation_checkpointing_enable()
        batch = COLLATE(questions() if kind == "choice" else texts())
        torch.manual_seed(2)
        bayes(**batch).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in bayes.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    assert found[0].norm() > 0.1


def test_a_likelihood_of_one_s_own_needs_no_more_than_its_density():
    class Own(pyro.nn.PyroModule):
        def forward(self, logits, labels, num_examples=None):
            with pyro.plate("examples", len(logits)):
                return pyro.sample("labels", pyro.distributions.Categorical(logits=logits), obs=labels)

    batch, losses = tiny_batch(), []
    for likelihood in (Own("likelihood"), None):
        bayes = BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2), likelihood=likelihood)
        torch.manual_seed(0)
        losses.append(bayes.train()(**batch).loss.detach())
    torch.testing.assert_close(*losses)
    labels = batch.pop("labels")
    examples = [{name: value[i] for name, value in batch.items()} | {"labels": int(labels[i])} for i in range(6)]
    assert bayes.predict(examples, num_samples=2, progress=False).probs.shape == (6, 2)
