"""Far from the defaults - α from 1e-4 to 1e6, v from 1e-6 to 1e6, r to 256, N to 64, n_in to 16384 - draws keep their
law, KLs their value, and loss and gradients are finite, all in float32. References are scipy's, in float64."""

import math
import warnings

import numpy as np
import pyro
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import digamma, gammaln, polygamma
from scipy.stats import beta, chi2, kstest
from torch.distributions import kl_divergence

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.distributions import (
    CollapsedMixture,
    MixtureWeights,
    WishartCholesky,
    active_weights,
    expected_column_kl,
    expected_cooperation,
)
from tests.conftest import tiny_batch, tiny_network
from tests.modules import randomize_b

ALPHAS = [1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6]
SCALES = [1e-6, 1e-3, 0.1, 0.999, 1.0, 1.001, 1e3, 1e6]
FLOAT32 = 2.0**-24  # relative error of rounding to float32
SEVERAL = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def around(value, size, seed=0):
    """``size`` float32 numbers within 30 % of ``value``, and the same in float64 for the reference."""
    generator = torch.Generator().manual_seed(seed)
    found = value * (1 + 0.3 * torch.rand(size, generator=generator))
    return found, found.double().numpy()


def dirichlet_kl(alpha, prior):
    constants = gammaln(alpha.sum()) - gammaln(alpha).sum() - gammaln(prior.sum()) + gammaln(prior).sum()
    return constants + ((alpha - prior) * (digamma(alpha) - digamma(alpha.sum()))).sum()


def wishart_kl(scale, df):
    return df / 2 * (np.expm1(np.log(scale)) - np.log(scale)).sum()


def column_kl(scale, df):
    rank = len(scale)
    log_det = digamma((df - np.arange(rank)) / 2).sum() + rank * math.log(2) + np.log(scale).sum()
    return (df * scale.sum() - log_det - rank) / 2


def cooperation(alpha):
    return (alpha * (alpha + 1)).sum() / (alpha.sum() * (alpha.sum() + 1))


def close(found, expected, relative, absolute=0.0):
    return abs(found.item() - expected) <= relative * abs(expected) + absolute


class TestExactValues:
    @pytest.mark.parametrize("prior", [1e-4, 1.0, 1e6])
    @pytest.mark.parametrize("size", [1, 4, 64])
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_dirichlet(self, alpha, size, prior):
        """KL and gradient; in float32 itself they are off by 22 % and 180 % at α = 1e6, N = 4."""
        concentration, exact = around(alpha, size)
        concentration.requires_grad_()
        other, other_exact = around(prior, size, seed=1)
        kl = kl_divergence(MixtureWeights(concentration), MixtureWeights(other))
        # scipy's own log-gammas are as large as N·α·log(N·α), with a relative error of 1e-16
        largest = max(exact.sum(), other_exact.sum())
        assert close(kl, dirichlet_kl(exact, other_exact), 2 * FLOAT32, 1e-14 * largest * max(math.log(largest), 1))
        assert kl.dtype == torch.float32
        (gradient,) = torch.autograd.grad(kl, concentration)
        away, total = exact - other_exact, exact.sum() - other_exact.sum()
        expected = away * polygamma(1, exact) - total * polygamma(1, exact.sum())
        largest = np.abs(away * polygamma(1, exact)).max() + abs(total * polygamma(1, exact.sum()))
        assert np.abs(gradient.numpy() - expected).max() <= 2 * FLOAT32 * np.abs(expected).max() + 1e-12 * largest

    @pytest.mark.parametrize("size", [1, 4, 64])
    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_cooperation(self, alpha, size):
        concentration, exact = around(alpha, size)
        assert close(expected_cooperation(MixtureWeights(concentration)), cooperation(exact), 10 * FLOAT32)

    @pytest.mark.parametrize("more", [0.0, 0.5, 1e6])
    @pytest.mark.parametrize("rank", [1, 8, 256])
    @pytest.mark.parametrize("scale", SCALES)
    def test_wishart(self, scale, rank, more):
        """KL of Σ and expected KL of a column, and their gradients."""
        v, exact = around(scale, rank)
        v.requires_grad_()
        df = rank + more
        posterior, prior = WishartCholesky(df, v), WishartCholesky(df, torch.ones(rank))
        kl, column = kl_divergence(posterior, prior), expected_column_kl(posterior)
        assert close(kl, wishart_kl(exact, df), 2 * FLOAT32)
        # the degrees of freedom are float32 numbers, whose error reaches digamma undiminished
        assert close(column, column_kl(exact, df), 2 * FLOAT32, 2 * rank * FLOAT32)
        for value, expected in ((kl, df / 2 * (1 - 1 / exact)), (column, (df - 1 / exact) / 2)):
            (gradient,) = torch.autograd.grad(value, v)
            np.testing.assert_allclose(gradient.numpy(), expected, rtol=4 * FLOAT32, atol=4 * FLOAT32 * df)

    def test_equal_laws(self):
        for alpha in ALPHAS:
            law = MixtureWeights(torch.full((64,), alpha))
            assert abs(kl_divergence(law, law)) <= 1e-6


class TestDraws:
    @pytest.mark.parametrize("size", [1, 2, 4, 64])
    @pytest.mark.parametrize("alpha", [1e-4, 1e-3, 1e-2, 0.1, 0.9, 1.0, 30.0, 1e3, 1e6])
    def test_mixture_weights(self, alpha, size):
        """On the simplex, never 0, and Σ_k π_k² has its exact mean; torch's Dirichlet halves it at α = 1e-4."""
        draws = 4000
        concentration, exact = around(alpha, size)
        weights = MixtureWeights(concentration).sample(torch.Size((draws,)))
        assert (weights >= torch.finfo(torch.float32).tiny).all()
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
        squares, expected = weights.double().square().sum(-1), cooperation(exact)
        # 1 − Σ_k π_k² lies in [0, 1], so its variance is at most its mean: for draws too alike to show their own
        spread = max(squares.std().item(), math.sqrt(1 - expected) if alpha <= 1e-3 else 0)
        assert abs(squares.mean() - expected) <= 5 * spread / math.sqrt(draws) + 2e-6

    @pytest.mark.parametrize("alpha", [1e-3, 0.02, 0.3, 0.999, 1.0, 4.0, 200.0])
    def test_each_weight_is_beta(self, alpha):
        """The share of draws below each level; levels reach where weights underflow."""
        concentration, exact = around(alpha, 3)
        draws = 4000
        weights = MixtureWeights(concentration).sample(torch.Size((draws,))).double().numpy()
        for index in range(3):
            law = beta(exact[index], exact.sum() - exact[index])
            for level in (1e-35, 1e-20, 1e-5, 0.2, law.mean(), 0.5, 0.9, 1 - 1e-5):
                expected = law.cdf(level)
                error = 5 * math.sqrt(expected * (1 - expected) / draws)
                assert abs((weights[:, index] < level).mean() - expected) <= error + 1 / draws

    @pytest.mark.parametrize("alpha", [0.05, 0.5, 0.999, 3.0, 50.0])
    def test_pathwise_gradient_is_unbiased(self, alpha):
        """The mean of d Σ_k π_k² / dα over draws is the derivative of its expectation."""
        draws = 20_000
        concentration = around(alpha, 3)[0].double()
        one = concentration.clone().requires_grad_()
        (expected,) = torch.autograd.grad(expected_cooperation(MixtureWeights(one)), one)
        many = concentration.expand(draws, 3).clone().requires_grad_()
        (found,) = torch.autograd.grad(MixtureWeights(many).rsample().square().sum(), many)
        assert ((found.mean(0) - expected).abs() <= 5 * found.std(0) / math.sqrt(draws)).all()

    @pytest.mark.parametrize("alpha", ALPHAS)
    def test_gradients_of_the_weights(self, alpha):
        concentration = torch.full((2000, 4), alpha, requires_grad=True)
        weights = MixtureWeights(concentration).rsample()
        for mixture in ("dense", "sparse"):
            spread = active_weights(weights, mixture).square().sum(-1).sqrt()
            assert ((spread >= 0.25 - 1e-6) & (spread <= 1 + 1e-6)).all()
            (gradient,) = torch.autograd.grad(spread.sum(), concentration, retain_graph=True)
            assert torch.isfinite(gradient).all()

    @pytest.mark.parametrize("prior", [1e-4, 1.0, 1e6])
    def test_log_prob_of_ones_own_draws(self, prior):
        """What an ELBO without the closed form needs: finite at every draw of every guide."""
        for alpha in ALPHAS:
            weights = MixtureWeights(torch.full((500, 4), alpha)).sample()
            assert torch.isfinite(MixtureWeights(torch.full((500, 4), prior)).log_prob(weights)).all()

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_diagonal_of_the_factor_is_chi(self, scale):
        """Down to one degree of freedom, in float32."""
        rank = 6
        factor = WishartCholesky(rank, torch.full((rank,), scale)).sample(torch.Size((4000,)))
        squares = (factor.diagonal(dim1=-2, dim2=-1).double() ** 2 / scale).numpy()
        for index in range(rank):
            assert kstest(squares[:, index], chi2(rank - index).cdf).pvalue > 1e-4

    @pytest.mark.parametrize("epsilon", [1e-6, 1e-1, 1e3])
    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    @pytest.mark.parametrize("rank", [1, 256])
    def test_columns(self, rank, scale, epsilon):
        """16384 columns: density at the draws, and KL, against float64; the density's own size sets the tolerance."""
        factor = WishartCholesky(rank, torch.full((rank,), scale)).sample()
        weights = torch.full((64,), 1 / 64)
        law = CollapsedMixture(torch.zeros(16384, rank), factor, weights, epsilon)
        wide = CollapsedMixture(law.loc.double(), factor.double(), weights.double(), epsilon)
        value = law.sample()
        assert torch.isfinite(value).all()
        torch.testing.assert_close(law.log_prob(value).double(), wide.log_prob(value.double()), rtol=2e-3, atol=1e-3)
        prior = CollapsedMixture(law.loc, torch.eye(rank), weights, epsilon)
        wide_prior = CollapsedMixture(wide.loc, torch.eye(rank).double(), wide.weights, epsilon)
        kl, exact = kl_divergence(law, prior)[0], kl_divergence(wide, wide_prior)[0]
        assert close(kl, exact.item(), 1e-5, 1e-6 * rank)


# ---- the whole objective ----


def fill(bayes, alpha, v):
    """Posterior parameters around α and v in either guide; their float32 values are what the guide then reports."""
    with torch.no_grad():
        if bayes.monteclora_config.guide == "mean_field":
            for name, parameter in bayes.guide.named_parameters():
                parameter.copy_(around(1.0, parameter.shape)[0].log() + math.log(alpha if "alpha" in name else v))
        else:
            rank = bayes.guide._rank
            bayes.guide.output.bias[:rank] = math.log(v)
            bayes.guide.output.bias[rank:] = math.log(alpha)
            bayes.guide.output.weight.normal_(std=0.05)


def check_step(bayes):
    """One step's loss and every gradient are finite; μ, B, v and α all get one."""
    bayes.zero_grad()
    loss = bayes(**tiny_batch()).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in bayes.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    return loss


def exact_kl(bayes):
    """Every site's KL under the configured normalisation, in float64 from the guide's own v and α."""
    config, found = bayes.monteclora_config, {}
    adapters = sum(len(group) for group in bayes.model.groups)
    elbo = config.normalization == "elbo"
    for group in bayes.model.groups:
        log_v, log_alpha = bayes.guide.variational_parameters(group)
        v, alpha = log_v.exp().detach().double().numpy(), log_alpha.exp().detach().double().numpy()
        df, size = bayes.model.degrees_of_freedom(group), config.num_components
        prior = np.full(size, np.float32(config.prior_concentration), dtype=np.float64)
        divisor = bayes.num_examples if elbo else adapters
        columns = group.columns if elbo else size
        if elbo and config.components == "explicit":
            columns *= size
        site = "S" if config.components == "explicit" else "A"
        found[f"pi_{group.name}"] = sum(dirichlet_kl(a, prior) for a in alpha) / divisor
        found[f"sigma_tril_{group.name}"] = sum(wishart_kl(w, df) for w in v) / divisor
        found[f"{site}_{group.name}"] = columns * sum(column_kl(w, df) for w in v) / divisor
    return found


def module(network, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bayes = randomize_b(BayesLoRA(network, MonteCLoRAConfig(**options)).train())
    bayes.num_examples = 500
    return bayes


@pytest.mark.parametrize("guide", ["mean_field", "amortized"])
@pytest.mark.parametrize("normalization", ["paper", "elbo"])
@pytest.mark.parametrize("components", ["collapsed", "explicit"])
@pytest.mark.parametrize("mixture", ["dense", "sparse"])
def test_objective_over_the_grid(mixture, components, normalization, guide):
    bayes = module(
        tiny_network(layers=1),
        r=3,
        num_components=5,
        target_modules=["query"],
        mixture=mixture,
        components=components,
        normalization=normalization,
        guide=guide,
    )
    for alpha in (1e-4, 1.0, 1e6):
        for v in (1e-6, 1.0, 1e6):
            fill(bayes, alpha, v)
            check_step(bayes)
            for site, expected in exact_kl(bayes).items():
                assert close(bayes.elbo.parts.kl[site], expected, 5e-7, 1e-7), (site, alpha, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_objective_anywhere(dtype):
    """Any α and v of the range with any r and N, for networks in float32 and in bfloat16."""

    @settings(SEVERAL, max_examples=30)
    @given(
        alpha=st.floats(-4, 6),
        v=st.floats(-6, 6),
        rank=st.sampled_from([1, 2, 16, 256]),
        size=st.sampled_from([1, 2, 64]),
        mixture=st.sampled_from(["dense", "sparse"]),
        components=st.sampled_from(["collapsed", "explicit"]),
        normalization=st.sampled_from(["paper", "elbo"]),
        guide=st.sampled_from(["mean_field", "amortized"]),
        prior=st.floats(-4, 6),
    )
    def check(alpha, v, rank, size, prior, **options):
        pyro.set_rng_seed(0)
        network = tiny_network(layers=1).to(dtype)
        bayes = module(
            network, r=rank, num_components=size, target_modules=["query"], prior_concentration=10**prior, **options
        )
        fill(bayes, 10**alpha, 10**v)
        check_step(bayes)
        for site, expected in exact_kl(bayes).items():
            assert close(bayes.elbo.parts.kl[site], expected, 5e-7, 1e-6), site

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_objective_with_many_inputs(dtype):
    """n_in = 16384."""
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16384,
        num_labels=2,
        max_position_embeddings=40,
    )
    network = transformers.AutoModelForSequenceClassification.from_config(config).to(dtype)
    bayes = module(network, r=8, target_modules=r".*\d\.output\.dense", normalization="elbo", guide="mean_field")
    assert [group.columns for group in bayes.model.groups] == [16384]
    for alpha, v in ((1e-4, 1e-6), (1e-4, 1e6), (1e6, 1e-6), (1e6, 1e6)):
        fill(bayes, alpha, v)
        check_step(bayes)
