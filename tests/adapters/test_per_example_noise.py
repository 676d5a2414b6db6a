"""Per-example noise: every example's law is the posterior's own, and the gradient has less variance."""

import math

import pytest
import torch
import transformers

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.adapters.drawing import rows_are_examples
from bayeslora.guides import MeanFieldGuide
from tests.conftest import VOCABULARY, tiny_batch, tiny_network

NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}  # all randomness is the noise


def plain(kind="bert", **options):
    return tiny_network(kind, **NO_DROPOUT[kind], **options)


def module(kind="bert", *, network=None, guide=None, **options):
    options = {"r": 2, "num_components": 3, "target_modules": "all-linear", "sample_scaler": 0.5} | options
    name = {"guide": guide} if isinstance(guide, str) else {}
    bayes = BayesLoRA(network or plain(kind), MonteCLoRAConfig(**options, **name), guide=None if name else guide)
    for name, parameter in bayes.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return bayes.train()


def same_example(size, length=5):
    batch = tiny_batch(1, length=length)
    batch["attention_mask"][:] = 1
    return {name: value.expand(size, *value.shape[1:]) for name, value in batch.items()}


@pytest.mark.parametrize("guide", ["amortized", "mean_field"])
@pytest.mark.parametrize(
    "options",
    [{}, {"components": "explicit"}, {"mixture": "sparse"}, {"num_particles": 2}, {"normalization": "elbo"}],
    ids=str,
)
def test_the_direct_run_is_pyros_own(guide, options):
    """Without Pyro's handlers: the same loss and gradients from the same seed."""
    bayes = module(guide=guide, noise="shared", **options)
    bayes.num_examples = 50
    results = []
    for direct in (True, False):
        bayes.zero_grad()
        torch.manual_seed(5)
        if direct:
            loss = bayes(**tiny_batch()).loss
        else:
            loss = bayes.elbo.differentiable_loss(bayes.model.joint, bayes.guide.forward, **tiny_batch())
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in bayes.named_parameters() if p.requires_grad}
        results.append((loss.detach(), bayes.elbo.parts.to_floats(), gradients))
    (loss, parts, gradients), (expected, expected_parts, expected_gradients) = results
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert parts == pytest.approx(expected_parts, rel=1e-6)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_equal_examples_get_different_noise_of_one_magnitude(kind):
    logits = {}
    for noise in ("shared", "per_example"):
        bayes = module(kind, noise=noise)
        logits[noise] = bayes(**same_example(4)).logits
    torch.testing.assert_close(logits["shared"], logits["shared"][:1].expand(4, -1))
    assert all(not torch.allclose(logits["per_example"][0], row, atol=1e-4) for row in logits["per_example"][1:])


@pytest.mark.parametrize("options", [{}, {"mixture": "sparse"}, {"components": "explicit"}], ids=str)
def test_an_examples_law_is_that_of_a_shared_draw(options):
    """First two moments of one example's logits, over draws; bounds from the draws' own standard errors."""
    draws, batch, moments = 500, same_example(2), {}
    for noise in ("shared", "per_example"):
        bayes = module(network=plain(layers=1), noise=noise, sample_scaler=0.3, **options)
        torch.manual_seed(11)
        with torch.no_grad():
            outputs = torch.stack([bayes(**batch).logits[1, 0] for _ in range(draws)]).double()
        centred = (outputs - outputs.mean()).square()
        moments[noise] = [(x.mean(), x.std() / math.sqrt(draws)) for x in (outputs, centred)]
    for (one, error), (other, other_error) in zip(*moments.values(), strict=True):
        assert error > 0
        assert abs(one - other) < 4 * math.hypot(error, other_error)


def test_examples_are_uncorrelated_to_first_order():
    """Correlation of two equal examples' logits over draws: 1 when shared, near 0 with their own signs."""
    draws, correlation = 300, {}
    for noise in ("shared", "per_example"):
        bayes = module(noise=noise, sample_scaler=0.05)
        torch.manual_seed(2)
        with torch.no_grad():
            outputs = torch.stack([bayes(**same_example(2)).logits[:, 0] for _ in range(draws)])
        correlation[noise] = float(torch.corrcoef(outputs.T)[0, 1])
    assert correlation["shared"] > 0.999
    assert abs(correlation["per_example"]) < 4 / math.sqrt(draws)


def test_one_example_has_one_draw_for_all_its_tokens():
    """The matrix that explains an example's first tokens explains the rest, and not another example.

    Noise that differs from token to token within one draw would be no function of the sequence.
    """
    bayes = module()
    recorded = []
    layer = bayes.model.groups[0].adapters[0].lora_A
    bayes(**tiny_batch(2))  # looks at the rows
    layer.register_forward_hook(lambda module, args, output: recorded.append((args[0].detach(), output.detach())))
    bayes(**tiny_batch(3, length=30))
    (inputs, outputs), columns = recorded[-1], layer.in_features
    noise = (outputs - inputs @ layer.weight.detach().T).double()  # (3, 30 tokens, r)
    first, rest = inputs[0, :columns].double(), inputs[0, columns:].double()  # as many tokens as columns: solvable
    matrix = torch.linalg.solve(first, noise[0, :columns])
    torch.testing.assert_close(rest @ matrix, noise[0, columns:], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(inputs[1].double() @ matrix, noise[1], rtol=1e-1, atol=1e-2)


def test_gradient_variance_falls_and_its_mean_stays():
    """Of four equal examples: to first order in the noise, a quarter of the variance under a shared draw."""
    batch, draws, statistics = same_example(4), 200, {}
    for noise in ("shared", "per_example"):
        bayes = module(noise=noise, network=plain(layers=1), sample_scaler=0.05, kl_weight=0.0)
        rows = []
        for draw in range(draws):
            bayes.zero_grad()
            torch.manual_seed(draw)
            bayes(**batch).loss.backward()
            rows.append(torch.cat([p.grad.flatten() for n, p in bayes.network.named_parameters() if "lora_B" in n]))
        gradients = torch.stack(rows).double()
        statistics[noise] = gradients.mean(0), gradients.var(0)
    (shared_mean, shared), (own_mean, own) = statistics.values()
    standardised = (shared_mean - own_mean) / ((shared + own) / draws).sqrt()
    assert standardised.square().mean() < 2  # 1 when the means are equal
    assert 0.18 < own.sum() / shared.sum() < 0.34


def longformer():
    config = transformers.LongformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        attention_window=4,
        pad_token_id=0,
        max_position_embeddings=40,
    )
    return transformers.AutoModelForSequenceClassification.from_config(config)


def deberta():
    config = transformers.DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        relative_attention=True,
        position_buckets=4,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        pad_token_id=0,
    )
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(("make", "target"), [(longformer, "query"), (deberta, "key_proj")])
def test_rows_that_are_not_examples_share_the_noise(make, target, caplog):
    bayes = module(network=make(), target_modules=[target])
    loss = bayes(**tiny_batch(4, length=8)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert "shares one draw" in caplog.text
    caplog.clear()
    bayes(**tiny_batch(4, length=8))
    assert not caplog.text  # said once


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_rows_are_examples_where_they_are(kind):
    bayes = module(kind)
    batch = tiny_batch(2, length=2)  # as many tokens as examples: shapes alone could not tell
    batch.pop("labels")
    before = torch.get_rng_state()
    assert rows_are_examples(bayes.network, bayes.model.groups, batch)
    assert torch.equal(before, torch.get_rng_state())


def test_a_guide_with_dependent_rows_shares_the_noise():
    class OneSign(MeanFieldGuide):
        symmetric_rows = False

    bayes = module(guide=OneSign)
    logits = bayes(**same_example(2)).logits
    torch.testing.assert_close(logits[0], logits[1])


def test_bf16_autocast_computes_the_same_step():
    bayes = module()
    losses = []
    for enabled in (False, True):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = bayes(**tiny_batch()).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
