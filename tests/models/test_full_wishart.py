"""A Wishart whose scale is a full matrix: density, moments and KLs in closed form, in the model and in the guides."""

import math

import pyro
import pytest
import torch
from torch.distributions import MultivariateNormal, Wishart, kl_divergence

from bayeslora import InputError
from bayeslora.distributions import WishartCholesky, expected_column_kl
from bayeslora.recorder import Recorder
from tests.conftest import tiny_batch
from tests.modules import module, randomize_b

F64 = torch.float64
SCALE = torch.tensor([0.3, 1.0, 2.5], dtype=F64)
FACTOR = torch.tensor([[0.7, 0, 0], [-0.4, 1.2, 0], [0.9, 0.3, 2.0]], dtype=F64)
OTHER = torch.tensor([[1.5, 0, 0], [0.2, 0.4, 0], [-1.0, 0.6, 0.9]], dtype=F64)
V = FACTOR @ torch.diag(SCALE) @ FACTOR.mT


def law(df=4.5, factor=FACTOR, scale=SCALE):
    return WishartCholesky(df, scale, factor)


def wishart(df, scale):
    return Wishart(torch.tensor(df, dtype=F64), scale)


class TestLaw:
    def test_log_prob_is_the_wisharts_with_the_jacobian(self):
        factor = law().sample(torch.Size((5,)))
        row = torch.arange(3, 0, -1, dtype=F64)
        jacobian = 3 * math.log(2) + (row * factor.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
        expected = wishart(4.5, V).log_prob(factor @ factor.mT) + jacobian
        torch.testing.assert_close(law().log_prob(factor), expected)

    def test_moments_match_the_draws(self):
        draws = 40_000
        factor = law().sample(torch.Size((draws,)))
        covariance = factor @ factor.mT
        squared, log_det = (factor - law().mean).square(), 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        expected = (law().mean, law().variance, law().covariance_mean, law().expected_log_det)
        for values, mean in zip((factor, squared, covariance, log_det), expected, strict=True):
            error = 5 * values.std(0) / math.sqrt(draws) + 1e-12
            assert ((values.mean(0) - mean).abs() <= error).all()
        torch.testing.assert_close(law().covariance_mean, 4.5 * V)
        torch.testing.assert_close(law().scale_tril @ law().scale_tril.mT, V)

    def test_the_identity_changes_nothing(self):
        plain, turned = law(factor=None), law(factor=torch.eye(3, dtype=F64))
        factor = plain.sample(torch.Size((4,)))
        torch.testing.assert_close(plain.log_prob(factor), turned.log_prob(factor))
        for name in ("mean", "variance", "covariance_mean", "expected_log_det"):
            torch.testing.assert_close(getattr(plain, name), getattr(turned, name))

    def test_expand(self):
        wide = law().expand([4, 5])
        factor = wide.sample()
        assert (wide.batch_shape, factor.shape) == ((4, 5), (4, 5, 3, 3))
        torch.testing.assert_close(wide.log_prob(factor), law().log_prob(factor))

    @pytest.mark.parametrize("df", [4.5, 7.0])
    @pytest.mark.parametrize("factor", [None, FACTOR, OTHER])
    def test_kl_is_torchs(self, factor, df):
        prior = law(df, factor, torch.tensor([1.0, 0.2, 3.0], dtype=F64))
        full = prior.scale_tril @ prior.scale_tril.mT
        expected = kl_divergence(wishart(4.5, V), wishart(df, full))
        torch.testing.assert_close(kl_divergence(law(), prior), expected)

    def test_columns_kl_is_the_mean_over_draws(self):
        """The closed form against KLs of Gaussians at drawn Σ."""
        draws = 20_000
        factor = law().sample(torch.Size((draws,)))
        zero = torch.zeros(3, dtype=F64)
        prior = MultivariateNormal(zero, scale_tril=FACTOR)
        each = kl_divergence(MultivariateNormal(zero, scale_tril=factor), prior)
        assert abs(each.mean() - expected_column_kl(law())) <= 5 * each.std() / math.sqrt(draws)


def turned(guide="amortized", seed=0, **options):
    """A posterior whose factors are random, and whose v and α are anything."""
    bayes = randomize_b(module(guide=guide, seed=seed, wishart_scale="full", r=3, **options))
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for group in bayes.model.groups:
        entries = torch.randn(len(group), 3, 3, generator=generator)
        factors[group.name] = entries.tril(-1) / 2 + torch.diag_embed(entries.diagonal(dim1=-2, dim2=-1).exp())
    bayes.model.set_wishart_factors(factors)
    with torch.no_grad():
        for parameter in bayes.guide.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return bayes


GUIDES = ("amortized", "mean_field")


class TestModelAndGuide:
    @pytest.mark.parametrize("components", ["collapsed", "explicit"])
    @pytest.mark.parametrize("guide", GUIDES)
    def test_every_kl_is_what_the_densities_say(self, guide, components):
        """The exact KLs against −log p + log q at draws of the guide, site by site."""
        bayes, draws = turned(guide, components=components), 400
        model, found = bayes.model, []
        with torch.no_grad():
            for _ in range(draws):
                own = Recorder()
                bayes.guide.run(own)
                prior = Recorder(own.values())
                model.run(prior)
                ratios = {}
                for name, site in own.nodes.items():
                    value = site["value"]
                    ratios[name] = float((site["fn"].log_prob(value) - prior.nodes[name]["fn"].log_prob(value)).sum())
                found.append(ratios)
            for name, site in prior.nodes.items():
                exact = bayes.elbo._batched_kl(site, own.nodes[name]).expand(site["fn"].batch_shape).sum()
                values = torch.tensor([ratios[name] for ratios in found])
                assert abs(values.mean() - exact) <= 5 * values.std() / math.sqrt(draws), name

    @pytest.mark.parametrize("guide", GUIDES)
    def test_kl_does_not_depend_on_the_factor(self, guide):
        bayes, plain = turned(guide, num_components=2), turned(guide, num_components=2)
        plain.model.set_wishart_factors({g.name: torch.eye(3).repeat(len(g), 1, 1) for g in plain.model.groups})
        parts = []
        for one in (bayes, plain):
            one.train()(**tiny_batch())
            parts.append({name: float(value) for name, value in one.elbo.parts.kl.items()})
        assert parts[0] == pytest.approx(parts[1], rel=1e-4)

    @pytest.mark.parametrize("guide", GUIDES)
    def test_variance_of_the_draws_is_the_formulas(self, guide):
        bayes, draws = turned(guide, sample_scaler=0.4), 500
        with torch.no_grad():
            expected = torch.cat([bayes.guide.noise_variance(group) for group in bayes.model.groups]).numpy()
        squares = bayes.posterior_draws(num_samples=draws).noise_scale ** 2
        assert (abs(squares.mean(0) - expected) <= 5 * squares.std(0) / math.sqrt(draws)).all()

    def test_covariance_of_a_column_is_the_factors(self):
        """With many degrees of freedom and one component, A − μ is Gaussian with covariance ε²·FFᵀ·ν."""
        bayes = turned(num_components=1, degrees_of_freedom=1000.0, sample_scaler=0.05)
        group = bayes.model.groups[0]
        (name,) = [group.adapters[0].name]
        draws = bayes.posterior_draws(num_samples=500, adapters=[name])
        noise = torch.as_tensor(draws.A[name]) - group.mean()[0].detach().mT
        found = torch.einsum("src,stc->rt", noise, noise) / (noise.shape[0] * noise.shape[2])
        with torch.no_grad():
            log_v, _ = bayes.guide.variational_parameters(group)
        factor = bayes.model.wishart_factor(group)[0]
        expected = 0.05**2 * 1000 * factor @ torch.diag(log_v[0].exp()) @ factor.mT
        root = expected.diagonal().sqrt()
        assert ((found - expected).abs() / torch.outer(root, root)).max() < 5 / math.sqrt(500 * group.columns) + 0.01

    def test_each_example_of_a_batch_has_the_same_law(self):
        """Rows that are correlated turn together: a sign for each would undo the correlation."""
        bayes = turned()
        signs = bayes._signs(50, 1)
        for group in bayes.model.groups:
            values = signs[group.name]
            assert (values == values[..., :1]).all()
            assert values[..., 0].abs().eq(1).all()
            assert values[..., 0].unique().numel() == 2

    def test_trains_under_svi_and_by_fit(self):
        bayes = turned(sample_scaler=0.05)
        before = [parameter.clone() for parameter in bayes.guide.parameters()]
        svi = pyro.infer.SVI(bayes.model, bayes.guide, pyro.optim.Adam({"lr": 1e-2}), bayes.elbo)
        losses = [svi.step(**tiny_batch()) for _ in range(3)]
        assert all(math.isfinite(loss) for loss in losses)
        assert any((a != b).any() for a, b in zip(before, bayes.guide.parameters(), strict=True))

    def test_the_gaussian_guide_is_refused(self):
        with pytest.raises(InputError, match="use the guide 'amortized' or 'mean_field'"):
            module(guide="gaussian", wishart_scale="full")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda f: f.mT, "lower triangular"),
            (lambda f: -f, "positive diagonal"),
            (lambda f: f[:, :2, :2], r"of shape \(.*3, 3\), got"),
            (lambda f: f * math.inf, "lower triangular"),
        ],
        ids=["upper", "negative", "smaller", "infinite"],
    )
    def test_what_is_no_factor_is_refused(self, change, says):
        bayes = turned()
        good = {group.name: bayes.model.wishart_factor(group).clone() for group in bayes.model.groups}
        with pytest.raises(InputError, match=says):
            bayes.model.set_wishart_factors({name: change(value) for name, value in good.items()})
        for group in bayes.model.groups:
            assert torch.equal(bayes.model.wishart_factor(group), good[group.name])

    def test_a_diagonal_scale_has_no_factor(self):
        bayes = module()
        with pytest.raises(InputError, match="wishart_scale='full'"):
            bayes.model.set_wishart_factors({group.name: torch.eye(2) for group in bayes.model.groups})
