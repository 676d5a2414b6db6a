"""Closed forms first: every density, moment and KL against torch.distributions or a number worked by hand."""

import math

import pytest
import torch
from pyro.distributions import Dirichlet
from torch.distributions import MultivariateNormal, Wishart, biject_to, kl_divergence

from bayeslora.distributions import (
    CollapsedMixture,
    WishartCholesky,
    active_weights,
    expected_column_kl,
    expected_cooperation,
)

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def random_factor(rank, *batch):
    return WishartCholesky(rank + 1.0, torch.ones(rank, dtype=F64)).sample(torch.Size(batch))


def within(sample, expected, std, draws, sigmas=5.0):
    """Whether a sample mean lies within so many of its own standard errors."""
    return bool(((sample - expected).abs() <= sigmas * std / math.sqrt(draws) + 1e-12).all())


class TestWishartCholesky:
    @pytest.mark.parametrize(("rank", "df"), [(1, 1.0), (3, 3.0), (4, 6.5)])
    def test_log_prob_is_the_wisharts_with_the_jacobian(self, rank, df):
        scale = torch.rand(rank, dtype=F64) + 0.2
        factor = WishartCholesky(df, scale).sample(torch.Size((5,)))
        covariance = factor @ factor.mT
        row = torch.arange(rank, 0, -1, dtype=F64)
        log_jacobian = rank * math.log(2) + (row * factor.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
        if df > rank - 1 and rank > 1:
            wishart = Wishart(torch.tensor(df, dtype=F64), torch.diag(scale)).log_prob(covariance)
        else:  # one dimension: Σ/v is χ²(1)
            gamma = torch.distributions.Gamma(torch.tensor(df / 2, dtype=F64), 1 / (2 * scale[0]))
            wishart = gamma.log_prob(covariance[:, 0, 0])
        torch.testing.assert_close(WishartCholesky(df, scale).log_prob(factor), wishart + log_jacobian)

    def test_moments_match_the_draws(self):
        law, draws = WishartCholesky(5, tensor(0.3, 1.0, 2.0, 4.0)), 40_000
        factor = law.sample(torch.Size((draws,)))
        assert within(factor.mean(0), law.mean, factor.std(0), draws)
        squared = (factor - law.mean).square()
        assert within(squared.mean(0), law.variance, squared.std(0), draws)
        covariance = factor @ factor.mT
        assert within(covariance.mean(0), law.covariance_mean, covariance.std(0), draws)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        assert within(log_det.mean(0), law.expected_log_det, log_det.std(0), draws)

    def test_off_diagonal_mass_is_kept(self):
        """With df = r, a third of Σ's squared mass (r = 4) is off the diagonal, and lost where only that is kept."""
        factor = WishartCholesky(4, torch.ones(4, dtype=F64)).sample(torch.Size((20_000,)))
        covariance = factor @ factor.mT
        diagonal = covariance.diagonal(dim1=-2, dim2=-1).square().sum(-1)
        off = covariance.square().sum((-2, -1)) - diagonal
        share = (off.mean() / (off.mean() + diagonal.mean())).item()
        assert share == pytest.approx(12 * 4 / (12 * 4 + 4 * (16 + 8)), abs=0.02)  # E Σij² = ν, E Σii² = ν² + 2ν

    def test_rsample_is_lower_triangular_and_positive(self):
        factor = WishartCholesky(8, torch.ones(3, 8)).sample(torch.Size((200,)))
        assert factor.shape == (200, 3, 8, 8)
        assert WishartCholesky.support.check(factor).all()

    def test_gradient_of_the_mean_covariance_reaches_the_scale(self):
        scale = tensor(0.5, 2.0).requires_grad_()
        factor = WishartCholesky(3, scale).rsample(torch.Size((20_000,)))
        trace = (factor @ factor.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
        (gradient,) = torch.autograd.grad(trace.mean(), scale)
        per_draw = factor.square().sum(-1) / scale  # its expectation is ν
        assert within(gradient, torch.full((2,), 3.0, dtype=F64), per_draw.detach().std(0), 20_000)

    def test_expand_keeps_law_and_shape(self):
        law = WishartCholesky(2, tensor(1.0, 3.0))
        wide = law.expand([4, 5])
        assert wide.batch_shape == (4, 5)
        factor = wide.sample()
        assert factor.shape == (4, 5, 2, 2)
        torch.testing.assert_close(wide.log_prob(factor), law.log_prob(factor))

    def test_too_few_degrees_of_freedom_are_refused(self):
        with pytest.raises(ValueError, match="df >= r"):
            WishartCholesky(3, torch.ones(4))

    def test_float32_factors_are_never_singular(self):
        """The factor itself is drawn: no Cholesky can fail, even at r = 32, where Σ's condition number is about 1e4."""
        factor = WishartCholesky(32, torch.ones(500, 32)).sample()
        assert torch.isfinite(factor).all()
        assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()


class TestVectorToCholesky:
    def test_bijection_and_jacobian(self):
        transform = biject_to(WishartCholesky.support)
        x = torch.randn(6, dtype=F64)
        factor = transform(x)
        assert factor.shape == transform.forward_shape(x.shape) == (3, 3)
        assert WishartCholesky.support.check(factor)
        torch.testing.assert_close(transform.inv(factor), x)
        assert transform.inverse_shape(factor.shape) == x.shape
        rows, columns = torch.tril_indices(3, 3)
        jacobian = torch.autograd.functional.jacobian(lambda t: transform(t)[rows, columns], x)
        log_det = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, factor), log_det)


class TestKL:
    """Exact, non-negative, finite, and KL(posterior ‖ prior).

    A wrong sign or an overflow in the Dirichlet's KL is quiet: −25.5 where 10.5 is exact, or inf where 3.24 is.
    """

    def test_check_values(self):
        def dirichlet(q, p):
            return kl_divergence(Dirichlet(q), Dirichlet(p)).item()

        ones8 = torch.ones(8, dtype=F64)
        assert dirichlet(tensor(1, 2, 3, 4), tensor(1, 1, 1, 1)) == pytest.approx(1.0513518, abs=5e-8)
        assert dirichlet(5 * ones8, ones8) == pytest.approx(3.2354577, abs=5e-8)
        assert dirichlet(2 * ones8, 0.1 * ones8) == pytest.approx(10.5318322, abs=5e-8)
        posterior = WishartCholesky(4, tensor(0.5, 1, 2, 3))
        prior = WishartCholesky(4, torch.ones(4, dtype=F64))
        assert kl_divergence(posterior, prior).item() == pytest.approx(2.8027754, abs=5e-8)
        assert expected_column_kl(posterior).item() == pytest.approx(10.1051252, abs=5e-8)
        factor = torch.linalg.cholesky(tensor(2, 0.5, 0.5, 1).reshape(2, 2))
        identity, loc, weights = torch.eye(2, dtype=F64), torch.zeros(1, 2, dtype=F64), tensor(1.0)
        column = CollapsedMixture(loc, factor, weights, 1.0), CollapsedMixture(loc, identity, weights, 1.0)
        assert kl_divergence(*column).item() == pytest.approx(0.2201921, abs=5e-8)
        assert expected_cooperation(Dirichlet(tensor(1, 2, 3, 4))).item() == pytest.approx(0.3636364, abs=5e-8)

    @pytest.mark.parametrize("trial", range(20))
    def test_dirichlet_kl_is_finite_and_not_negative(self, trial):
        torch.manual_seed(trial)
        q, p = (10 ** (6 * torch.rand(2, 8, dtype=F64) - 2)).unbind()  # from 1e-2 to 1e4
        kl = kl_divergence(Dirichlet(q), Dirichlet(p))
        assert torch.isfinite(kl)
        assert kl >= 0
        # worked from the definition, E_q[log q − log p], with E_q[log π_k] = ψ(α_k) − ψ(α_0)
        mean_log = torch.digamma(q) - torch.digamma(q.sum())
        by_hand = (
            torch.lgamma(q.sum())
            - torch.lgamma(q).sum()
            - torch.lgamma(p.sum())
            + torch.lgamma(p).sum()
            + ((q - p) * mean_log).sum()
        )
        torch.testing.assert_close(kl, by_hand, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("trial", range(10))
    def test_wishart_kl_is_that_of_torch(self, trial):
        torch.manual_seed(trial)
        rank = 1 + trial % 6
        v, w = (10 ** (4 * torch.rand(2, rank, dtype=F64) - 2)).unbind()
        df_q, df_p = rank + trial / 3, rank + (trial * 7 % 5) / 2
        ours = kl_divergence(WishartCholesky(df_q, v), WishartCholesky(df_p, w))
        theirs = kl_divergence(
            Wishart(torch.tensor(df_q, dtype=F64), torch.diag(v)),
            Wishart(torch.tensor(df_p, dtype=F64), torch.diag(w)),
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert ours >= -1e-12

    @pytest.mark.parametrize("trial", range(10))
    def test_column_kl_is_that_of_the_multivariate_normal(self, trial):
        torch.manual_seed(trial)
        rank = 1 + trial % 5
        q_factor, p_factor = random_factor(rank, 3), random_factor(rank, 3)
        loc = torch.randn(2, 3, 4, rank, dtype=F64)
        weights = torch.rand(3, 4, dtype=F64)
        q, p = (CollapsedMixture(m, f, weights, 0.3) for m, f in zip(loc, (q_factor, p_factor), strict=True))
        theirs = kl_divergence(*(MultivariateNormal(d.loc, scale_tril=d.scale_tril.unsqueeze(-3)) for d in (q, p)))
        torch.testing.assert_close(kl_divergence(q, p), theirs, rtol=1e-6, atol=1e-6)

    def test_expected_column_kl_is_the_mean_over_draws(self):
        posterior, draws = WishartCholesky(4, tensor(0.5, 1, 2, 3)), 40_000
        factor = posterior.sample(torch.Size((draws,)))
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        kl = (factor.square().sum((-2, -1)) - log_det - 4) / 2
        assert within(kl.mean(), expected_column_kl(posterior), kl.std(), draws)

    def test_direction_is_posterior_from_prior(self):
        """KL(prior ‖ posterior) is another number, and no bound; a narrower posterior costs log-many nats."""
        narrow, prior = (WishartCholesky(4, torch.full((4,), v, dtype=F64)) for v in (0.01, 1.0))
        assert kl_divergence(narrow, prior).item() == pytest.approx(2 * (0.04 - 4 * math.log(0.01) - 4))
        assert kl_divergence(prior, narrow).item() > 10 * kl_divergence(narrow, prior).item()


class TestMixture:
    def explicit(self, loc, factor, weights, scale, draws):
        """The N Gaussians one by one, as the paper writes them."""
        noise = torch.randn(draws, weights.shape[-1], *loc.shape, dtype=F64) @ factor.mT
        return loc + scale * torch.einsum("k,skcr->scr", weights, noise)

    @pytest.mark.parametrize("mixture", ["dense", "sparse"])
    def test_collapsed_and_explicit_agree_in_law(self, mixture):
        draws, rank, columns, scale = 40_000, 3, 2, 0.5
        factor, loc = random_factor(rank), torch.randn(columns, rank, dtype=F64)
        weights = active_weights(tensor(0.5, 0.3, 0.15, 0.05), mixture)
        law = CollapsedMixture(loc, factor, weights, scale)
        collapsed, explicit = (
            law.sample(torch.Size((draws,))),
            self.explicit(loc, factor, weights, scale, draws),
        )
        covariance = law.scale_tril @ law.scale_tril.mT
        for sample in (collapsed, explicit):
            centred = sample - loc
            assert within(sample.mean(0), loc, sample.std(0), draws)
            outer = centred.unsqueeze(-1) * centred.unsqueeze(-2)
            assert within(outer.mean(0), covariance, outer.std(0), draws)
        # quantiles: the two samples' fractions below a level differ by their binomial errors at most
        for level in (0.05, 0.25, 0.5, 0.75, 0.95):
            cut = collapsed.quantile(level, dim=0)
            below = (explicit <= cut).double().mean(0)
            assert within(below, torch.full_like(below, level), math.sqrt(2 * level * (1 - level)), draws)

    def test_log_prob_is_the_multivariate_normals(self):
        factor, loc = random_factor(4, 2), torch.randn(2, 5, 4, dtype=F64)
        law = CollapsedMixture(loc, factor, torch.rand(2, 3, dtype=F64), 0.7)
        value = torch.randn(2, 5, 4, dtype=F64)
        normal = MultivariateNormal(loc, scale_tril=law.scale_tril.unsqueeze(-3))
        torch.testing.assert_close(law.log_prob(value), normal.log_prob(value))
        torch.testing.assert_close(law.variance, normal.variance)
        torch.testing.assert_close(law.mean, normal.mean)

    def test_expand(self):
        law = CollapsedMixture(torch.zeros(5, 4), torch.eye(4), torch.ones(2) / 2, 1.0).expand([3, 5])
        assert law.sample().shape == (3, 5, 4)
        assert law.log_prob(torch.zeros(3, 5, 4)).shape == (3, 5)

    def test_active_weights(self):
        weights = tensor(0.2, 0.7, 0.1)
        assert active_weights(weights, "dense").tolist() == [0.2, 0.7, 0.1]
        assert active_weights(weights, "sparse").tolist() == [0.0, 0.7, 0.0]

    def test_expected_cooperation_is_the_mean_over_draws(self):
        law, draws = Dirichlet(tensor(0.4, 2.0, 3.0)), 40_000
        value = law.sample(torch.Size((draws,))).square().sum(-1)
        assert within(value.mean(), expected_cooperation(law), value.std(), draws)
