"""The posterior predictive is an average over whole networks, whatever the batches look like."""

import datasets
import numpy as np
import pytest
import torch

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.adapters.drawing import using_draw
from bayeslora.guides import MeanFieldGuide
from bayeslora.inference import predict as predict_module
from bayeslora.inference.draws import Draws
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.modules import adapted, module, randomize_b

KINDS = ["bert", "gpt2", "llama"]


def fitted(kind="bert", **options):
    """A module whose draws differ visibly."""
    return randomize_b(module(kind, **{"sample_scaler": 0.3} | options))


def regression(**options):
    bayes = fitted(network_options={"num_labels": 1}, **options)
    with torch.no_grad():
        bayes.model.likelihood.scale = torch.tensor(0.4)
    data = tiny_dataset(9)
    return bayes, [example | {"labels": 0.1 * index - 0.3} for index, example in enumerate(data)]


def outputs_by_hand(bayes, dataset, num_samples, seed=0):
    """Logits (S, n, C) without predict: one draw after the other, one unpadded example at a time."""
    sites = bayes.sample(num_samples, seed=seed)
    bayes.eval()
    draws = []
    for index in range(num_samples):
        weights = bayes.model.matrices({name: values[index] for name, values in sites.items()})
        with torch.no_grad(), using_draw(bayes.model.groups, weights):
            draws.append(torch.cat([alone(bayes.network, example) for example in dataset]))
    return torch.stack(draws)


def alone(network, example):
    return network(input_ids=torch.tensor([example["input_ids"]])).logits


def count_rows(layer):
    """The rows of every call of ``layer`` from now on."""
    rows = []
    layer.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    return rows


def without_labels(dataset):
    return [{name: value for name, value in example.items() if name != "labels"} for example in dataset]


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_the_mean_over_coherent_draws(kind):
    """A prediction averages over networks: evaluated at one point, a posterior would never be better calibrated.

    The last token that is no padding decides for gpt2 and llama, and padding does not leak.
    """
    bayes, data = fitted(kind), tiny_dataset(10)
    prediction = bayes.predict(data, num_samples=4, batch_size=5, seed=3)
    expected = outputs_by_hand(bayes, data, 4, seed=3).double().softmax(-1).numpy()
    np.testing.assert_allclose(prediction.sample_probs, expected, atol=1e-6)
    np.testing.assert_allclose(prediction.probs, expected.mean(0), atol=1e-6)
    assert np.ptp(expected, axis=0).max() > 0.02  # the draws differ, so a single one would not pass
    assert prediction.labels.tolist() == [example["labels"] for example in data]
    assert prediction.label_names == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("kind", KINDS)
def test_no_draws_is_the_mean_network(kind):
    bayes, data = fitted(kind), tiny_dataset(6)
    prediction = bayes.predict(data, num_samples=0)
    bayes.eval()
    with torch.no_grad():
        expected = torch.cat([alone(bayes.network, example) for example in data]).double().softmax(-1)
    np.testing.assert_allclose(prediction.probs, expected.numpy(), atol=1e-6)
    assert prediction.sample_probs.shape == (1, 6, 2)
    np.testing.assert_allclose(prediction.mutual_information, 0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_changes_nothing_but_rounding(kind):
    """Batches are sorted by length, the result is not: nothing in it depends on which examples shared a batch."""
    bayes, data = fitted(kind), tiny_dataset(11)
    assert [len(e["input_ids"]) for e in data] != sorted([len(e["input_ids"]) for e in data], reverse=True)
    one, five, hundred = (bayes.predict(data, num_samples=3, batch_size=size) for size in (1, 5, 100))
    for other in (five, hundred):
        np.testing.assert_allclose(other.sample_probs, one.sample_probs, atol=1e-6)
        np.testing.assert_allclose(other.mutual_information, one.mutual_information, atol=1e-6)
        assert other.labels.tolist() == one.labels.tolist()


def test_one_draw_is_one_function_for_all_batches():
    """Noise drawn anew for every batch, or every token, would make predictions that no network makes."""
    bayes, example = fitted(), tiny_dataset(1)[0]
    draws = bayes.predict([example] * 5, num_samples=3, batch_size=2).sample_probs
    np.testing.assert_allclose(draws, draws[:, :1].repeat(5, axis=1), atol=1e-7)
    assert np.ptp(draws[:, 0], axis=0).max() > 1e-3


def test_seed_decides_the_draws():
    bayes, data = fitted(), tiny_dataset(6)
    few, many = (bayes.predict(data, num_samples=count, seed=5).sample_probs for count in (2, 4))
    np.testing.assert_allclose(few, many[:2], atol=1e-6)  # draw s does not depend on S
    assert np.array_equal(many, bayes.predict(data, num_samples=4, seed=5).sample_probs)
    part = bayes.predict(data[:3], num_samples=4, seed=5).sample_probs
    np.testing.assert_allclose(part, many[:, :3], atol=1e-6)  # nor on the data set
    assert not np.allclose(few, bayes.predict(data, num_samples=2, seed=6).sample_probs, atol=1e-4)
    fresh = [bayes.predict(data, num_samples=2, seed=None).sample_probs for _ in range(2)]
    assert not np.allclose(*fresh, atol=1e-4)


def test_fresh_draws_are_the_same_for_all_batches(monkeypatch):
    for limit in (2**30, 0):
        monkeypatch.setattr(predict_module, "MAX_KEPT_BYTES", limit)
        draws = fitted().predict(tiny_dataset(1) * 4, num_samples=3, batch_size=1, seed=None).sample_probs
        assert np.array_equal(draws, draws[:, :1].repeat(4, axis=1))


def test_draws_too_large_to_keep(monkeypatch):
    bayes, data = fitted(), tiny_dataset(5)
    expected = bayes.predict(data, num_samples=4, batch_size=2).sample_probs
    each = sum(group.mean().nbytes for group in bayes.model.groups)
    passes = count_rows(bayes.network.get_base_model().classifier)
    for limit, rows in ((3 * each, [6, 2]), (0, [2, 2, 2, 2])):  # memory for three draws, or for none
        monkeypatch.setattr(predict_module, "MAX_KEPT_BYTES", limit)
        passes.clear()
        draws = bayes.predict(data[:2], num_samples=4, batch_size=32).sample_probs
        np.testing.assert_allclose(draws, expected[:, :2], atol=1e-6)
        assert passes == rows


class TestAntithetic:
    def test_each_odd_draw_mirrors_the_one_before(self):
        bayes, data = fitted(), tiny_dataset(7)
        with torch.no_grad():
            plain, pairs = Draws(bayes, 4, 3).kept, Draws(bayes, 4, 3, antithetic=True).kept
        for group in bayes.model.groups:
            mean, one, two = group.mean(), plain[group.name], pairs[group.name]
            assert torch.equal(two[::2], one[::2])
            torch.testing.assert_close(two[1::2] + two[::2], 2 * mean.expand_as(two[::2]))
        there = bayes.predict(data, num_samples=5, antithetic=True).sample_probs
        np.testing.assert_allclose(there[::2], bayes.predict(data, num_samples=5).sample_probs[::2], atol=1e-6)
        assert np.abs(there[1::2] - there[:4:2]).max() > 1e-2

    @pytest.mark.parametrize("limit", [2**30, 0])
    def test_blocks_and_memory_change_nothing(self, monkeypatch, limit):
        """A block may begin with an image; half of the noise is half of it there too."""
        bayes, data = fitted(), tiny_dataset(3)
        options = {"antithetic": True, "noise_factor": 0.5, "batch_size": 4}
        expected = bayes.predict(data, num_samples=5, **options).sample_probs
        monkeypatch.setattr(predict_module, "MAX_KEPT_BYTES", limit)
        blocks = [bayes.predict(data, num_samples=n, first_draw=i, **options).sample_probs for i, n in ((0, 1), (1, 4))]
        np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-6)
        mirrored = bayes.predict(data, num_samples=2, first_draw=2, noise_factor=-0.5).sample_probs[0]
        np.testing.assert_allclose(expected[3], mirrored, atol=1e-6)

    @pytest.mark.parametrize("options", [{}, {"components": "explicit"}, {"guide": "gaussian"}])
    @pytest.mark.parametrize("prior", [False, True])
    def test_what_is_odd_in_the_noise_cancels(self, options, prior):
        """For little noise a pair's average is off from the mean network by its second order only."""
        bayes, data = fitted(sample_scaler=5e-4, **options), tiny_dataset(6)
        mean = bayes.predict(data, num_samples=0).sample_log_probs
        pair = bayes.predict(data, num_samples=2, antithetic=True, prior=prior).sample_log_probs - mean
        assert np.abs(pair.mean(0)).max() < 0.1 * np.abs(pair).max()

    def test_same_average_with_less_error(self):
        bayes, data = fitted(sample_scaler=2e-3), tiny_dataset(4)
        plain = bayes.predict(data, num_samples=256).sample_probs[..., 0]
        pairs = bayes.predict(data, num_samples=256, seed=1, antithetic=True).sample_probs[..., 0]
        pairs = pairs.reshape(128, 2, 4).mean(1)
        variances = plain.var(0, ddof=1) / 256, pairs.var(0, ddof=1) / 128
        assert (np.abs(plain.mean(0) - pairs.mean(0)) < 4 * np.sqrt(sum(variances))).all()
        assert (variances[1] < 0.5 * variances[0]).all()

    def test_needs_a_symmetric_posterior(self):
        class Shifted(MeanFieldGuide):
            symmetric_rows = False

        bayes = BayesLoRA(tiny_network("bert"), MonteCLoRAConfig(r=2), guide=Shifted)
        with pytest.raises(InputError, match="Shifted does not promise it"):
            bayes.predict(tiny_dataset(2), antithetic=True)
        bayes.predict(tiny_dataset(2), num_samples=2, antithetic=True, prior=True)  # the prior is


class TestCost:
    """Counted in rows, the examples times draws that go through a layer."""

    @pytest.mark.parametrize(
        ("examples", "num_samples", "batch_size", "expected"),
        [(1, 16, 32, [16]), (3, 8, 12, [12, 12]), (3, 5, 8, [6, 6, 3]), (5, 3, 5, [5] * 3), (5, 3, 4, [4] * 3 + [3])],
    )
    def test_draws_fill_a_forward_pass(self, examples, num_samples, batch_size, expected):
        bayes, data = fitted(), tiny_dataset(examples)
        alone = bayes.predict(data, num_samples=num_samples, batch_size=1).sample_probs
        bayes.predict(data[:1], num_samples=2)  # finds out, once, whether rows are examples
        passes = count_rows(bayes.network.get_base_model().classifier)
        stacked = bayes.predict(data, num_samples=num_samples, batch_size=batch_size).sample_probs
        np.testing.assert_allclose(stacked, alone, atol=1e-6)
        assert passes == expected

    @pytest.mark.parametrize("kind", ["bert", "llama"])
    def test_frozen_blocks_run_once_for_all_draws(self, kind):
        bayes, data = adapted(kind, last_block=True), tiny_dataset(6)
        blocks = next(part for part in bayes.network.modules() if isinstance(part, torch.nn.ModuleList))
        norms = [[part for part in block.modules() if "Norm" in type(part).__name__][-1] for block in blocks]
        bayes.predict(data, num_samples=0)  # finds out, once, how examples are padded
        first, second = (count_rows(norm) for norm in norms)
        bayes.predict(data, num_samples=8, batch_size=3)
        assert sum(first) == 6
        assert sum(second) == 6 * 8
        bayes.predict(data[:1], num_samples=8)
        for passes in (first, second):
            passes.clear()
        bayes.predict(data[:1], num_samples=8)
        assert sum(first) == 1 + 2
        assert second == [8]

    @pytest.mark.parametrize("kind", ["longformer", "deberta"])
    def test_one_draw_at_a_time_where_rows_are_not_examples(self, kind):
        bayes, data = adapted(kind), tiny_dataset(2)
        draws = bayes.predict(data, num_samples=3).sample_probs
        expected = bayes.predict(data, num_samples=3, batch_size=2).sample_probs
        assert bayes.rows_are_examples({}) is False
        assert np.array_equal(draws, expected)
        assert np.ptp(draws, axis=0).max() > 1e-4

    def test_one_draw_at_a_time_without_a_padding_token(self):
        """Transformers refuses more than one row then."""
        bayes, data = fitted("gpt2"), tiny_dataset(1)
        expected = bayes.predict(data, num_samples=3).sample_probs
        bayes.config.pad_token_id = None
        np.testing.assert_allclose(bayes.predict(data, num_samples=3).sample_probs, expected, atol=1e-6)


def test_with_adapters_switched_off():
    bayes, data = fitted(), tiny_dataset(5)
    with bayes.disable_adapter():
        draws = bayes.predict(data, num_samples=3).sample_probs
        bayes.eval()
        with torch.no_grad():
            expected = torch.cat([alone(bayes.network, example) for example in data]).double().softmax(-1)
    np.testing.assert_allclose(draws, np.stack([expected] * 3), atol=1e-6)


class TestLeavesNoTrace:
    def test_callers_generators(self):
        bayes = fitted()
        for state in (torch.random.get_rng_state, lambda: torch.tensor(np.random.get_state()[1])):  # noqa: NPY002
            before = state()
            bayes.predict(tiny_dataset(3), num_samples=2)
            assert torch.equal(state(), before)

    @pytest.mark.parametrize("training", [True, False])
    def test_training_mode_of_every_part(self, training):
        bayes = fitted().train(training)
        bayes.network.get_base_model().classifier.train(not training)
        before = {name: part.training for name, part in bayes.named_modules()}
        bayes.predict(tiny_dataset(3), num_samples=1)
        assert {name: part.training for name, part in bayes.named_modules()} == before
        assert set(before.values()) == {True, False}

    def test_after_an_error_too(self):
        bayes = fitted()
        bayes.config.use_cache = True
        last = list(bayes.network.get_base_model().bert.encoder.layer)[-1]

        def break_down(*_):
            raise IndexError

        broken = last.register_forward_hook(break_down)
        with pytest.raises(IndexError):
            bayes.predict(tiny_dataset(3)[:1], num_samples=2)
        broken.remove()
        assert bayes.training
        assert bayes.config.use_cache
        assert not any("forward" in vars(part) for part in bayes.modules())
        assert all(a.lora_A.draw.weight is None for g in bayes.model.groups for a in g.adapters)

    @pytest.mark.parametrize("kind", KINDS)
    def test_training_goes_on(self, kind):
        """Nothing made in inference mode (such as llama's rotary tables) stays behind."""
        bayes = fitted(kind)
        bayes.predict(tiny_dataset(4), num_samples=1)
        bayes(**tiny_batch()).loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in bayes.parameters() if p.requires_grad)


class TestUncertainty:
    def test_entropy_and_mutual_information(self):
        prediction = fitted().predict(tiny_dataset(8), num_samples=6)
        draws = prediction.sample_probs
        total = -(draws.mean(0) * np.log(draws.mean(0))).sum(-1)
        within = -(draws * np.log(draws)).sum(-1).mean(0)
        np.testing.assert_allclose(prediction.entropy, total, atol=1e-12)
        np.testing.assert_allclose(prediction.mutual_information, total - within, atol=1e-12)
        assert prediction.mutual_information.min() >= 0
        assert prediction.mutual_information.max() > 1e-4

    def test_log_likelihood_of_the_labels(self):
        data = tiny_dataset(5)
        prediction = fitted().predict(data, num_samples=3)
        expected = [
            [np.log(p[e["labels"]]) for p, e in zip(draw, data, strict=True)] for draw in prediction.sample_probs
        ]
        np.testing.assert_allclose(prediction.sample_log_likelihood, expected, atol=1e-12)

    def test_draws_need_not_be_kept(self):
        bayes, data = fitted(), tiny_dataset(5)
        full, lean = (bayes.predict(data, num_samples=3, keep_draws=keep) for keep in (True, False))
        assert lean.sample_log_probs is lean.sample_probs is lean.sample_log_likelihood is None
        assert np.array_equal(lean.probs, full.probs)
        assert np.array_equal(lean.mutual_information, full.mutual_information)

    def test_without_noise_all_draws_are_equal(self):
        prediction = fitted(sample_scaler=0.0).predict(tiny_dataset(5), num_samples=4)
        assert prediction.sample_probs.shape == (4, 5, 2)
        assert (prediction.sample_probs == prediction.sample_probs[:1]).all()
        np.testing.assert_allclose(prediction.mutual_information, 0, atol=1e-12)


class TestRegression:
    def test_mean_and_standard_deviation(self):
        bayes, data = regression()
        prediction = bayes.predict(data, num_samples=5, batch_size=4)
        expected = outputs_by_hand(bayes, data, 5)[..., 0].numpy()
        np.testing.assert_allclose(prediction.sample_means, expected, atol=1e-6)
        np.testing.assert_allclose(prediction.mean, expected.mean(0), atol=1e-6)
        np.testing.assert_allclose(prediction.std, np.sqrt(expected.var(0) + 0.4**2), atol=1e-6)
        assert expected.var(0).max() > 1e-4
        assert prediction.probs is prediction.entropy is prediction.mutual_information is None

    def test_log_likelihood_of_the_labels(self):
        bayes, data = regression()
        prediction = bayes.predict(data, num_samples=3)
        normal = torch.distributions.Normal(torch.as_tensor(prediction.sample_means), 0.4)
        expected = normal.log_prob(torch.tensor([example["labels"] for example in data]))
        np.testing.assert_allclose(prediction.sample_log_likelihood, expected.numpy(), atol=1e-5)
        lean = bayes.predict(data, num_samples=3, keep_draws=False)
        assert lean.sample_means is lean.sample_log_likelihood is None
        assert np.array_equal(lean.std, prediction.std)


class TestInput:
    def test_hugging_face_data_set(self):
        """Text columns are left out, and a torch-formatted set is as good as a list."""
        bayes, data = fitted(), tiny_dataset(6)
        expected = bayes.predict(data, num_samples=2).probs
        table = datasets.Dataset.from_list([example | {"text": "so be it", "note": None} for example in data])
        assert np.array_equal(bayes.predict(table, num_samples=2).probs, expected)
        assert np.array_equal(bayes.predict(table.with_format("torch"), num_samples=2).probs, expected)

    @pytest.mark.parametrize("marked", [False, True])
    def test_unlabelled(self, marked):
        """No label column, or the -1 of official test splits, which would otherwise index the last class."""
        bayes, data = fitted(), tiny_dataset(5)
        bare = [example | {"labels": -1} for example in data] if marked else without_labels(data)
        prediction = bayes.predict(bare, num_samples=2)
        assert prediction.labels is None
        assert prediction.sample_log_likelihood is None
        assert np.array_equal(prediction.probs, bayes.predict(data, num_samples=2).probs)

    def test_what_cannot_be_predicted(self):
        bayes = fitted()
        with pytest.raises(InputError, match="the data set is empty"):
            bayes.predict([])
        with pytest.raises(InputError, match=r"num_samples must be 0 .* got -1"):
            bayes.predict(tiny_dataset(2), num_samples=-1)
        with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
            bayes.predict(tiny_dataset(2), batch_size=0)
