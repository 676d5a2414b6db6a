"""Relative noise: the same ρ in layers of any width, by formula and in the draws; absolute noise stays as it was."""

import math

import numpy as np
import pyro
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pyro.infer.autoguide import AutoNormal

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.distributions import MixtureWeights
from bayeslora.guides import GaussianGuide, MeanFieldGuide
from bayeslora.models import MonteCLoRA
from bayeslora.models.low_rank_regression import KnownNoise, LinearNetwork
from bayeslora.models.mixture_weights import expected_largest_square
from bayeslora.training.monitor import relative_noise
from tests.conftest import tiny_batch, tiny_dataset, tiny_network

RHO = 0.2
SHAPES = [(64, 1, 1), (64, 8, 64), (512, 64, 4), (4096, 8, 4), (16384, 1, 64), (16384, 64, 1)]  # n_in, r, N
FAMILIES = {
    "amortized": {"guide": "amortized"},
    "mean field": {"guide": "mean_field"},
    "gaussian": {"guide": "gaussian"},
    "sparse": {"mixture": "sparse"},
    "sparse mean field": {"mixture": "sparse", "guide": "mean_field"},
    "sparse gaussian": {"mixture": "sparse", "guide": "gaussian"},
    "explicit": {"components": "explicit"},
    "explicit sparse": {"components": "explicit", "mixture": "sparse", "guide": "mean_field"},
    "a v of its own": {"scale_init": 0.3, "guide": "mean_field"},
    "more degrees of freedom": {"degrees_of_freedom": 100.0},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def options(family="amortized", **changes):
    return {"sample_scaler": RHO, "noise_units": "relative", **FAMILIES[family], **changes}


def layer(columns, rank, count, **changes):
    """A posterior over one layer."""
    network = get_peft_model(LinearNetwork(torch.ones(1, columns)), LoraConfig(r=rank, target_modules=["linear"]))
    config = MonteCLoRAConfig(r=rank, num_components=count, target_modules=("linear",), **changes)
    bayes = BayesLoRA(network, config, likelihood=KnownNoise(1.0))
    bayes.num_examples = 10
    return bayes


def bert(guide_class=None, **changes):
    """Three groups: two widths, one of them at two ranks."""
    config = {"r": 2, "num_components": 3, "rank_pattern": {"query": 4}, **options(), **changes}
    return BayesLoRA(tiny_network(), MonteCLoRAConfig(**config), guide=guide_class)


def scores(bayes, expected, *, draws=200, prior=False):
    """By how many standard errors the mean square of A − μ over PEFT's variance is off ρ², for every adapter."""
    draw = bayes.prior_draws if prior else bayes.posterior_draws
    squares = draw(num_samples=draws, seed=0).noise_scale ** 2
    squares = squares * 3 * np.array([group.columns for group in bayes.model.groups for _ in group.adapters])
    error = squares.std(0) / math.sqrt(draws)
    assert (error < 0.25 * expected**2).all()  # or else anything would do
    return (squares.mean(0) - expected**2) / error


@every_family
@pytest.mark.parametrize("normalization", ["paper", "elbo"])
def test_it_is_the_same_whatever_the_shape(family, normalization):
    for shape in SHAPES:
        bayes = layer(*shape, **options(family, normalization=normalization))
        assert relative_noise(bayes).tolist() == pytest.approx([RHO], rel=1e-5), shape


@every_family
@pytest.mark.parametrize("shape", [(64, 8, 4), (512, 2, 16)], ids=str)
def test_draws_have_it(family, shape):
    assert abs(scores(layer(*shape, **options(family)), RHO)).max() < 4


@every_family
def test_it_holds_for_every_adapter_of_several_groups(family):
    bayes = bert(**FAMILIES[family])
    assert len(bayes.model.groups) == 3
    assert relative_noise(bayes).tolist() == pytest.approx([RHO] * len(bayes.adapter_names), rel=1e-5)
    assert abs(scores(bayes, RHO)).max() < 4.5  # of 13


def test_training_sees_it():
    """Not the draws of a prediction alone: A as the objective draws it."""
    bayes = bert(noise="shared", alpha_init="ones").train()
    group = bayes.model.groups[0]
    squares = []
    for _ in range(200):
        noise = bayes.guide.run(pyro, bayes.model.zero_means())[f"A_{group.name}"]
        squares.append(float(noise.detach().square().mean()) * 3 * group.columns)
    assert np.mean(squares) == pytest.approx(RHO**2, abs=4 * np.std(squares) / math.sqrt(len(squares)))


def test_factors_of_a_schedule_multiply_it():
    bayes = bert(noise_schedule="per_layer")
    factors = torch.linspace(0.25, 2.0, len(bayes.adapter_names))
    bayes.noise_schedule.set(factors)
    torch.testing.assert_close(relative_noise(bayes), RHO * factors)


class TestWithoutAGuide:
    """A model alone, and a guide without a formula: the prior's."""

    @pytest.mark.parametrize("family", ["amortized", "sparse", "explicit"])
    def test_a_model_has_the_priors(self, family):
        model = MonteCLoRA(tiny_network(), MonteCLoRAConfig(r=2, num_components=3, **options(family)))
        for group in model.groups:
            draws = [model.run(pyro, model.zero_means())[group.name] for _ in range(200)]
            squares = torch.stack(draws).square().mean((-1, -2)) * 3 * group.columns  # (draws, adapters)
            error = squares.std(0) / math.sqrt(len(squares))
            assert ((squares.mean(0) - RHO**2).abs() < 4.5 * error).all()
            assert (error < 0.2 * RHO**2).all()

    def test_a_guide_that_follows_without_a_formula(self):
        class Unknown(MeanFieldGuide):
            def noise_variance(self, group):
                return None

        bayes = bert(Unknown)
        alone = MonteCLoRA(tiny_network(), bayes.monteclora_config)
        for group, other in zip(bayes.model.groups, alone.groups, strict=True):
            torch.testing.assert_close(bayes.model.noise_units(group), alone.noise_units(other))

    def test_guides_that_do_not_follow_are_refused(self):
        class Fixed(GaussianGuide):
            follows_noise_schedule = False

        for guide in (AutoNormal, Fixed):
            with pytest.raises(InputError, match=f"sets ε layer by layer, and a {guide.__name__} does not follow: use"):
                bert(guide)
            assert isinstance(bert(guide, noise_units="absolute").guide, guide)


class TestAbsolute:
    @pytest.mark.parametrize("preset", ["paper", "calibrated", "constant"])
    def test_every_preset_is(self, preset):
        config = MonteCLoRAConfig.preset(preset, r=2)
        assert config.noise_units == "absolute"
        bayes = BayesLoRA(tiny_network(), config)
        assert not [name for name in bayes.state_dict() if "noise_unit" in name]
        assert [bayes.model.noise_units(group) for group in bayes.model.groups] == [None, None]

    def test_epsilon_stays_one_number(self):
        bayes = BayesLoRA(tiny_network(), MonteCLoRAConfig.preset("paper", r=2))
        assert [bayes.model.sample_scaler(group) for group in bayes.model.groups] == [5e-3, 5e-3]

    def test_it_is_louder_in_a_wider_layer(self):
        small, large = (
            relative_noise(layer(columns, 8, 4, sample_scaler=0.1, alpha_init="ones")) for columns in (384, 1536)
        )
        assert float(large / small) == pytest.approx(2.0, rel=1e-5)
        assert float(small) == pytest.approx(0.1 * math.sqrt(2 / 5 * 8 * 12 / 40 * 3 * 384), rel=1e-5)


def test_none_is_plain_lora():
    found = []
    for units in ("relative", "absolute"):
        bayes = bert(sample_scaler=0.0, noise_units=units).train()
        bayes.network.eval()
        output = bayes(**tiny_batch())
        prediction = bayes.eval().predict(tiny_dataset(3), num_samples=4, progress=False)
        found.append((output.loss.detach(), output.logits.detach(), torch.from_numpy(prediction.probs)))
        assert prediction.mutual_information.max() < 1e-7
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("guide", ["amortized", "mean_field", "gaussian"])
def test_reopened_it_has_the_same_draws(guide, tmp_path):
    """Mean field's α start at random: ε is what it was, not what it would be of another start."""
    bayes = bert(guide=guide)
    with torch.no_grad():
        for parameter in bayes.guide.parameters():
            parameter.add_(torch.rand_like(parameter) / 4)
    bayes.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    again = BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network())
    assert again.monteclora_config.noise_units == "relative"
    one, other = bayes.eval().sample(3, seed=1), again.sample(3, seed=1)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class TestLargestSquare:
    def test_one_component_has_it_all(self):
        for alpha in (1e-4, 0.5, 1.0, 300.0):
            assert float(expected_largest_square(torch.tensor([alpha]))) == pytest.approx(1.0, abs=1e-7)

    def test_even_weights_in_closed_form(self):
        """α = 1: the largest of N exponential variables has mean H_N and variance Σ 1/k²; for N = 2 it is 7/12."""
        assert float(expected_largest_square(torch.ones(2))) == pytest.approx(7 / 12, rel=1e-6)
        for n in (2, 3, 16, 64, 1024):
            k = np.arange(1, n + 1)
            expected = ((1 / k).sum() ** 2 + (1 / k**2).sum()) / (n * (n + 1))
            assert float(expected_largest_square(torch.ones(n))) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        "alpha",
        [[1e-3, 2e-3], [0.3, 0.3, 0.3], [0.5, 2.0, 7.0], [40.0, 50.0], [900.0] * 8, [1e-3, 1.0, 200.0]],
        ids=str,
    )
    def test_is_the_mean_over_draws(self, alpha):
        draws = MixtureWeights(torch.tensor(alpha)).sample((40_000,)).amax(-1).square()
        found = expected_largest_square(torch.tensor(alpha))
        assert float(found - draws.mean()) == pytest.approx(0, abs=4 * float(draws.std()) / 200 + 1e-6)

    def test_of_a_batch(self):
        alpha = torch.rand(2, 3, 4) + 0.5
        found = expected_largest_square(alpha)
        assert (found.shape, found.dtype) == ((2, 3), torch.float32)
        torch.testing.assert_close(found[1, 2], expected_largest_square(alpha[1, 2]))
        assert not expected_largest_square(alpha.requires_grad_()).requires_grad
