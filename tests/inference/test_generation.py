"""Writing with a posterior: coherent draws, mixtures, and uncertainty of tokens, against brute force."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.adapters.drawing import using_draw
from bayeslora.inference.draws import Draws
from bayeslora.inference.generation import token_uncertainty
from bayeslora.tasks.encoding import encode_text
from tests.conftest import tiny_network
from tests.language import tiny_language_model, tiny_tokenizer, words

PROMPTS = [words("where is the cat ?"), words("the ball"), words("Question : which big box goes up ? Answer :")]
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=0)


def writer(kind="llama", scale=0.5):
    bayes = BayesLoRA(tiny_language_model(kind), MonteCLoRAConfig(r=4, sample_scaler=scale))
    for module in bayes.network.modules():
        if hasattr(module, "lora_B"):
            for layer in module.lora_B.values():
                torch.nn.init.normal_(layer.weight, std=0.3)
    return bayes.eval()


def without_end(tokens):
    tokens = [int(token) for token in tokens]
    return tokens[: tokens.index(0)] if 0 in tokens else tokens


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_sample_is_what_its_merged_draw_writes(kind, batch_size):
    bayes = writer(kind)
    written = bayes.generate(PROMPTS, num_samples=3, max_new_tokens=12, batch_size=batch_size, progress=False)
    distinct = set()
    for draw in range(3):
        network = bayes.merge(draw)
        for index, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                whole = network.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :]
            assert without_end(written.tokens[index][draw]) == without_end(whole)
            distinct.add(tuple(written.tokens[index][draw]))
    assert len(distinct) > 3  # the draws write different texts


def test_transformers_own_generate_works_inside_a_draw():
    bayes = writer()
    written = bayes.generate(PROMPTS[:1], num_samples=2, max_new_tokens=12, progress=False)
    with bayes.as_draw(1) as network, torch.no_grad():
        whole = network.generate(input_ids=torch.tensor(PROMPTS[:1]), generation_config=GREEDY)[0, len(PROMPTS[0]) :]
    assert without_end(written.tokens[0][1]) == without_end(whole)
    at_mean = bayes.generate(PROMPTS[:1], num_samples=0, max_new_tokens=12, progress=False)
    with torch.no_grad():
        whole = bayes.merge().generate(torch.tensor(PROMPTS[:1]), generation_config=GREEDY)[0, len(PROMPTS[0]) :]
    assert without_end(at_mean.tokens[0][0]) == without_end(whole)


@torch.no_grad()
def by_hand(bayes, tokens, draws):
    """Distribution of the next token under each draw, ``(draws, vocabulary)``."""
    found = []
    for index in range(draws.count):
        with using_draw(bayes.model.groups, draws.matrices(index, 1)):
            found.append(bayes.network(input_ids=torch.tensor([tokens])).logits[0, -1].double().softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_a_mixture_follows_the_mean_of_the_draws_distributions(batch_size):
    bayes = writer()
    written = bayes.generate(
        PROMPTS, num_samples=4, mode="mixture", max_new_tokens=8, batch_size=batch_size, progress=False
    )
    draws = Draws(bayes, 4, seed=0)
    for index, prompt in enumerate(PROMPTS):
        tokens, log_likelihood = list(prompt), 0.0
        assert len(written.tokens[index]) == 1
        for step, token in enumerate(written.tokens[index][0]):
            probs = by_hand(bayes, tokens, draws)
            mean = probs.mean(0)
            assert token == int(mean.argmax())
            entropy = float(torch.special.entr(mean).sum())
            information = entropy - float(torch.special.entr(probs).sum(-1).mean())
            assert written.entropy[index][0][step] == pytest.approx(entropy, abs=1e-4)
            assert written.mutual_information[index][0][step] == pytest.approx(information, abs=1e-4)
            log_likelihood += float(mean[token].log())
            tokens.append(token)
        assert written.log_likelihood[index, 0] == pytest.approx(log_likelihood, abs=1e-3)
        assert max(written.mutual_information[index][0]) > 0.01


def test_drawn_tokens_follow_their_distribution_and_not_the_batch():
    bayes = writer()
    prompts = [PROMPTS[0]] * 400
    options = {"num_samples": 0, "max_new_tokens": 1, "temperature": 1.0, "progress": False}
    first = bayes.generate(prompts, batch_size=400, **options)
    tokens = np.array([row[0][0] for row in first.tokens])
    with torch.no_grad():
        probs = bayes.network(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1).numpy()
    likely = int(probs.argmax())
    share = (tokens == likely).mean()
    assert abs(share - probs[likely]) < 4 * np.sqrt(probs[likely] * (1 - probs[likely]) / 400)
    again = bayes.generate(prompts, batch_size=7, **options)
    assert again.tokens == first.tokens
    nucleus = bayes.generate(prompts[:100], batch_size=100, top_p=float(probs[likely]) / 2, **options)
    assert {row[0][0] for row in nucleus.tokens} == {likely}


def test_texts_end_at_their_end_and_before_a_stop():
    bayes, tokenizer = writer(), tiny_tokenizer()
    free = bayes.generate(PROMPTS, num_samples=2, max_new_tokens=10, tokenizer=tokenizer, progress=False)
    words_written = free.texts[0][0].split()
    stop = words_written[2]
    stopped = bayes.generate(
        PROMPTS[:1], num_samples=2, max_new_tokens=10, tokenizer=tokenizer, stops=[stop], progress=False
    )
    assert stopped.texts[0][0].split() == words_written[: words_written.index(stop)]
    assert (stopped.num_tokens <= free.num_tokens[:1]).all()
    bayes.network.get_base_model().generation_config.eos_token_id = free.tokens[0][0][1]
    ended = bayes.generate(PROMPTS[:1], num_samples=1, max_new_tokens=10, tokenizer=tokenizer, progress=False)
    assert len(ended.tokens[0][0]) <= 2
    assert 0 < ended.confidence[0, 0] <= 1


def texts():
    tokenizer = tiny_tokenizer()
    pairs = [("the ball is", " red"), ("Question: where is the dog? Answer:", " to the north"), ("a cat", " goes up")]
    return [encode_text(tokenizer, prompt, target) for prompt, target in pairs]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_uncertainty_of_given_tokens_is_that_of_brute_force(batch_size):
    bayes, examples = writer(), texts()
    found = token_uncertainty(bayes, examples, num_samples=3, batch_size=batch_size)
    draws = Draws(bayes, 3, seed=0)
    for index, example in enumerate(examples):
        tokens = example["input_ids"]
        places = [place for place, label in enumerate(example["labels"]) if label != -100]
        assert len(found.entropy[index]) == len(places)
        for number, place in enumerate(places):
            probs = by_hand(bayes, tokens[:place], draws)
            mean = probs.mean(0)
            entropy = float(torch.special.entr(mean).sum())
            information = entropy - float(torch.special.entr(probs).sum(-1).mean())
            assert found.log_prob[index][number] == pytest.approx(float(mean[tokens[place]].log()), abs=1e-4)
            assert found.entropy[index][number] == pytest.approx(entropy, abs=1e-4)
            assert found.mutual_information[index][number] == pytest.approx(information, abs=1e-4)


def test_mutual_information_is_never_negative_and_zero_for_equal_draws():
    found = token_uncertainty(writer(), texts(), num_samples=4)
    assert min(value.min() for value in found.mutual_information) > 0
    same = writer()
    for adapter in (adapter for group in same.model.groups for adapter in group.adapters):
        torch.nn.init.zeros_(adapter.layer.lora_B[adapter.key].weight)  # no draw reaches the outputs
    found = token_uncertainty(same, texts(), num_samples=4)
    assert max(value.max() for value in found.mutual_information) < 1e-12
    written = same.generate(PROMPTS, num_samples=3, mode="mixture", max_new_tokens=4, progress=False)
    assert max(value[0].max() for value in written.mutual_information) < 1e-12


def test_mistakes_are_explained():
    bayes = writer()
    wrong = [
        ({"prompts": "the cat"}, "tokenizer="),
        ({"prompts": []}, "at least one text"),
        ({"prompts": [[]]}, "none of them empty"),
        ({"prompts": ["the cat"]}, "tokenizer="),
        ({"mode": "beam"}, "mode"),
        ({"num_samples": -1}, "num_samples"),
        ({"temperature": -1.0}, "temperature"),
        ({"stops": "up", "tokenizer": tiny_tokenizer()}, "list of texts"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            bayes.generate(**{"prompts": PROMPTS, **options})
    with pytest.raises(InputError, match="no causal language model"):
        BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2)).generate(PROMPTS)
    with pytest.raises(InputError, match="labels"):
        token_uncertainty(bayes, [{"input_ids": [1]}])
