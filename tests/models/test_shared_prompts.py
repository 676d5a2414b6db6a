"""Options behind one prompt have the probabilities that they have one by one, on every network that says it listens."""

import copy

import pytest
import torch
import transformers
from torch import nn

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.models import ChoiceLikelihood, shared_prompts
from bayeslora.models.language import _of_options, target_log_probs
from bayeslora.models.shared_prompts import can_share, pack
from tests.modules import randomize_b

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 64}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **SIZES),
    "mistral": lambda: transformers.MistralConfig(num_key_value_heads=2, sliding_window=64, **SIZES),
    "qwen2": lambda: transformers.Qwen2Config(num_key_value_heads=2, **SIZES),
    "gemma2": lambda: transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=64, **SIZES),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "opt": lambda: transformers.OPTConfig(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **SIZES),
    "gpt2": lambda: transformers.GPT2Config(**GPT),
}
DEAF = {
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60),
    "mamba": lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=60, state_size=4),
}


def network_of(name, *, attention="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    config = (CONFIGS | DEAF)[name]()
    config.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1})
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return network.to(dtype).eval()


def questions(prompts=(9, 5, 7), sizes=((3, 1, 4), (2, 2, 2), (1, 5, 0)), length=14, seed=3):
    """Tokens, mask and answers; an option of size 0 is not there."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(prompts), len(sizes[0]), length, dtype=torch.long)
    mask, answer = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for number, (prompt, options) in enumerate(zip(prompts, sizes, strict=True)):
        question = torch.randint(3, 60, (prompt,), generator=random)
        for option, size in enumerate(options):
            if not size:
                continue
            tokens[number, option, :prompt] = question
            tokens[number, option, prompt : prompt + size] = torch.randint(3, 60, (size,), generator=random)
            mask[number, option, : prompt + size] = 1
            answer[number, option, prompt : prompt + size] = True
    return tokens, mask, answer


def alone(network, tokens, mask, answer):
    return _of_options(network, tokens, mask, answer, None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_probabilities_and_gradients_are_those_of_the_texts(name, attention):
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("its scores have a soft cap, which only eager attention knows")
    network, batch = network_of(name, attention=attention), questions()
    if name == "opt" and not can_share(network, _of_options):
        pytest.skip("this version of OPT takes no positions")
    assert can_share(network, _of_options)
    shared = pack(network, *batch)
    assert shared.inputs["input_ids"].shape == (3, 17)  # of 9 + 3 + 1 + 4, and not 3 × 14
    found, expected = _of_options(network, *batch, shared), alone(network, *batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    there = batch[2].any(-1)
    assert (found[there] < -1).all()
    assert (found[~there] == 0).all()
    gradients = [
        torch.autograd.grad(out.sum(), list(network.parameters()), allow_unused=True) for out in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DEAF)
def test_networks_that_do_not_listen_read_text_by_text(name):
    """ALiBi counts distances in the row; a state space has no mask."""
    network, batch = network_of(name, attention="eager"), questions()
    assert not can_share(network, _of_options)
    inputs = {"input_ids": batch[0], "attention_mask": batch[1], "answer_mask": batch[2].long()}
    scores = ChoiceLikelihood("abc", normalization="none").outputs(network, inputs)
    there = batch[2].any(-1)
    torch.testing.assert_close(scores[there], alone(network, *batch)[there])


class Deaf(nn.Module):
    """Hands its arguments to a Llama, but for one."""

    def __init__(self, ignored):
        super().__init__()
        self.inner, self.ignored = network_of("llama"), ignored
        self.config = self.inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, input_ids, attention_mask=None, position_ids=None, **options):
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **options}
        del given[self.ignored]
        if self.ignored == "attention_mask":
            given["attention_mask"] = torch.ones_like(input_ids)
        return self.inner(input_ids, **given)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_that_ignores_an_argument_is_found_out(ignored, dtype):
    assert can_share(network_of("llama", dtype=dtype), _of_options)
    assert not can_share(Deaf(ignored).to(dtype), _of_options)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": (1, 1, 1), "sizes": ((4, 4, 4),) * 3, "length": 5},  # saves too little
        {"prompts": (0, 5, 7)},  # an answer with nothing before it
    ],
)
def test_what_is_not_worth_it_stays_as_it_is(change):
    network = network_of("llama")
    assert pack(network, *questions(**change)) is None
    tokens, mask, answer = questions()
    assert pack(network, tokens, mask.flip(-1), answer) is None  # padding on the left
    assert pack(network, tokens, mask, torch.zeros_like(answer)) is None
    far = network_of("mistral")
    far.config.sliding_window = 8
    assert pack(far, tokens, mask, answer) is None


def test_answers_that_begin_alike_are_scored_each():
    """What the options share is cut where the first of them is scored."""
    network, (tokens, mask, answer) = network_of("llama"), questions(sizes=((3, 3, 3),) * 3)
    for number, prompt in enumerate((9, 5, 7)):
        tokens[number, :, prompt] = 7
    shared = pack(network, tokens, mask, answer)
    torch.testing.assert_close(
        _of_options(network, tokens, mask, answer, shared), alone(network, tokens, mask, answer), atol=1e-5, rtol=1e-5
    )


def encoded():
    tokens, mask, answer = questions(prompts=(9, 6, 7, 8), sizes=((3, 1, 4), (2, 2, 2), (1, 5, 3), (2, 1, 1)))
    return [
        {"input_ids": t.tolist(), "attention_mask": m.tolist(), "answer_mask": a.long().tolist(), "labels": row % 3}
        for row, (t, m, a) in enumerate(zip(tokens, mask, answer, strict=True))
    ]


def posterior(**options):
    config = MonteCLoRAConfig(r=2, sample_scaler=0.3, target_modules=["q_proj", "down_proj"], **options)
    return randomize_b(BayesLoRA(network_of("llama"), config, likelihood=ChoiceLikelihood("abc")))


@pytest.mark.parametrize("blocks", [None, 1])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_predictions_are_the_same(monkeypatch, batch_size, blocks):
    """One draw for all options, several draws in a pass, and what lies below run once."""
    bayes, data = posterior().eval(), encoded()
    options = {"num_samples": 3, "batch_size": batch_size, "blocks": blocks, "progress": False}
    found = bayes.predict(data, **options).sample_log_probs
    monkeypatch.setattr(shared_prompts, "LEAST_GAIN", float("inf"))
    expected = bayes.predict(data, **options).sample_log_probs
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_each_example_has_its_own_noise_in_training(monkeypatch):
    """The same objective and gradients as text by text, with the same draw."""
    losses, gradients = [], []
    batch = {name: torch.tensor([row[name] for row in encoded()]) for name in encoded()[0]}
    for gain in (1.25, float("inf")):
        monkeypatch.setattr(shared_prompts, "LEAST_GAIN", gain)
        bayes = posterior().train()
        assert bayes._has_own_noise(batch)
        torch.manual_seed(5)
        loss = bayes(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in bayes.parameters() if p.grad is not None])
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_trial_leaves_draw_and_modes_alone():
    bayes = posterior().train()
    layer = bayes.model.groups[0].adapters[0].lora_A
    layer.draw.set(torch.zeros_like(layer.weight))
    other = copy.deepcopy(bayes.network)
    shared_prompts._tried.pop(bayes.network)
    assert can_share(bayes.network, _of_options)
    assert can_share(other, _of_options)
    assert layer.draw.weight is not None
    assert bayes.network.training


def test_fewer_tokens_are_read():
    network, read = network_of("llama"), []
    network.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    inputs = {name: torch.tensor([row[name] for row in encoded()]) for name in encoded()[0] if name != "labels"}
    likelihood = ChoiceLikelihood("abc")
    likelihood.prepare(network)
    read.clear()
    likelihood.outputs(network, inputs)
    assert read == [(4, 17)]  # of 9 + 3 + 1 + 4 at most, and not 12 × 14
    labels = inputs["input_ids"].flatten(0, 1).masked_fill(inputs["answer_mask"].flatten(0, 1) == 0, -100)
    rows = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    expected = target_log_probs(network, rows, labels).sum(-1).view(4, 3) / inputs["answer_mask"].sum(-1)
    torch.testing.assert_close(likelihood.outputs(network, inputs), expected, atol=1e-5, rtol=1e-5)
