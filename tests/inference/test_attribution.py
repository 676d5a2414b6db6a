"""Variance of the logits, split into adapters: against predict, and against draws set by hand."""

import numpy as np
import pytest
import torch

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.adapters.drawing import using_draw
from bayeslora.data.batches import Collator
from bayeslora.errors import InputError
from bayeslora.inference.attribution import attribute_variance
from bayeslora.inference.draws import sample_sites
from tests.conftest import tiny_dataset, tiny_network


def fitted(kind: str = "bert", *, target_modules=None, sample_scaler: float = 0.3) -> BayesLoRA:
    """Large frozen weights and B away from zero, so that the adapters do something."""
    network = tiny_network(kind, num_labels=3, initializer_range=0.3)
    bayes = BayesLoRA(network, MonteCLoRAConfig(r=2, sample_scaler=sample_scaler, target_modules=target_modules))
    torch.manual_seed(1)
    for name, parameter in bayes.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return bayes


def summed_variance(logits: np.ndarray) -> np.ndarray:
    """(S, n, C) to the variance of the centred logits, summed over classes."""
    return (logits - logits.mean(-1, keepdims=True)).var(axis=0, ddof=1).sum(-1)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_total_is_the_variance_of_what_predict_draws(kind):
    bayes, data = fitted(kind), tiny_dataset(9)
    found = attribute_variance(bayes, data, num_samples=6, seed=3, progress=False)
    logits = bayes.predict(data, num_samples=6, seed=3, progress=False).sample_log_probs
    np.testing.assert_allclose(found.total, summed_variance(logits), rtol=1e-3)
    assert found.parts == ["layer 0", "layer 1"]
    assert (found.total > 1e-4).all()


@pytest.mark.parametrize("batch_size", [2, 32, 500])
def test_parts_are_the_variance_with_the_others_at_their_means(batch_size):
    """Each adapter's draw set by hand, one example and one draw at a time."""
    bayes, data = fitted(target_modules=("query", "dense")), tiny_dataset(5)
    found = attribute_variance(bayes, data, by="adapter", num_samples=4, seed=7, batch_size=batch_size, progress=False)
    assert sorted(found.parts) == sorted(bayes.adapter_names)
    groups, collate = bayes.model.groups, Collator()
    bayes.eval()
    for group in groups:
        for place, adapter in enumerate(group.adapters):
            logits = []
            for sites in sample_sites(bayes, 4, 7):
                drawn = bayes.model.matrices(sites)
                weights = {other.name: other.mean().detach().clone() for other in groups}
                weights[group.name][place] = drawn[group.name][place]
                with using_draw(groups, weights), torch.no_grad():
                    logits.append(torch.cat([bayes.network(**_inputs(collate, row)).logits for row in data]).numpy())
            row = found.parts.index(adapter.name)
            np.testing.assert_allclose(found.variance[row], summed_variance(np.stack(logits)), rtol=2e-3, atol=1e-9)


def _inputs(collate, row):
    batch = collate([row])
    batch.pop("labels")
    return batch


def test_an_adapter_that_does_nothing_causes_nothing():
    bayes = fitted(target_modules=("query", "value"))
    silent = bayes.adapter_names[1]
    with torch.no_grad():
        for name, parameter in bayes.network.named_parameters():
            if silent in name and "lora_B" in name:
                parameter.zero_()
    found = attribute_variance(bayes, tiny_dataset(6), by="adapter", num_samples=4, progress=False)
    causes = dict(zip(found.parts, found.variance.mean(axis=1), strict=True))
    assert causes.pop(silent) == pytest.approx(0, abs=1e-12)
    assert min(causes.values()) > 1e-6


def test_one_part_is_everything_and_leaves_no_remainder():
    bayes = fitted(target_modules=("query",))
    found = attribute_variance(bayes, tiny_dataset(6), by="kind", num_samples=5, progress=False)
    assert found.parts == ["query"]
    np.testing.assert_allclose(found.remainder, 0, atol=1e-6 * found.total.max())


def test_small_noise_adds_up():
    """Small noise leaves the network linear in it, and independent parts of a linear sum have variances that add."""
    bayes = fitted(target_modules=("query", "value"), sample_scaler=0.01)
    found = attribute_variance(bayes, tiny_dataset(4), num_samples=200, batch_size=200, progress=False)
    assert abs(found.remainder.mean()) < 4 * np.sqrt(2 / 200) * found.total.mean()


def test_deviations_of_the_draws_average_to_the_variances():
    bayes = fitted()
    found = attribute_variance(bayes, tiny_dataset(7), by="kind", num_samples=5, progress=False)
    both = np.append(found.variance.mean(axis=1), found.total.mean())
    np.testing.assert_allclose(found.deviations.sum(axis=0) / 4, both)
    assert found.deviations.shape == (5, len(found.parts) + 1)


def test_nothing_is_left_behind():
    bayes, data = fitted().train(), tiny_dataset(5)
    before = torch.get_rng_state()
    attribute_variance(bayes, data, num_samples=2, progress=False)
    assert bayes.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(adapter.lora_A.draw.weight is None for group in bayes.model.groups for adapter in group.adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "block"}, "by must be one of adapter, layer, kind, got 'block'"),
        ({"num_samples": 1}, "num_samples must be at least 2 to have a variance, got 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        attribute_variance(fitted(), tiny_dataset(3), **options)


def test_without_data_or_without_noise_there_is_nothing_to_attribute():
    with pytest.raises(InputError, match="the data set is empty"):
        attribute_variance(fitted(), [])
    plain = BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2, sample_scaler=0.0))
    with pytest.raises(InputError, match="every draw is the mean network"):
        attribute_variance(plain, tiny_dataset(3))
