"""The yardstick's closed forms, checked by dense algebra, quadrature and simulation; then the guides against it."""

import dataclasses
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO
from scipy.stats import multivariate_normal
from torch.distributions import kl_divergence

from bayeslora import BayesLoRA, CooperativeELBO, InputError
from bayeslora.adapters.drawing import using_draw
from bayeslora.distributions import MixtureWeights, WishartCholesky, expected_column_kl, expected_cooperation
from bayeslora.guides import GUIDES, MeanFieldGuide
from bayeslora.models import low_rank_regression

GROUP = "r2_in3"


@pytest.fixture(autouse=True)
def _double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def dense(problem, pi):
    """Prior mean and covariance of vec A, Φ and y − W0 x as numpy arrays, by another route than the module's."""
    layer = problem.group.adapters[0].layer
    update = layer.scaling["default"] * layer.lora_B["default"].weight.detach().numpy()
    frozen = layer.get_base_layer().weight.detach().numpy()
    features = problem.features.numpy()
    design = np.concatenate([np.kron(x[None], update) for x in features])
    target = (problem.labels.numpy().reshape(len(features), -1) - features @ frozen.T).ravel()
    variance = problem.model.config.sample_scaler**2 * float((pi**2).sum())
    mean = layer.lora_A["default"].weight.detach().numpy().T.ravel()
    return mean, variance * np.eye(len(mean)), design, target


def log_joint(problem, pi):
    mean, covariance, design, target = dense(problem, pi)
    total = design @ covariance @ design.T + problem.noise**2 * np.eye(len(target))
    return multivariate_normal(design @ mean, total).logpdf(target)


def dense_posterior(problem, pi):
    mean, covariance, design, target = dense(problem, pi)
    gain = (
        covariance @ design.T @ np.linalg.inv(design @ covariance @ design.T + problem.noise**2 * np.eye(len(target)))
    )
    return mean + gain @ (target - design @ mean), covariance - gain @ design @ covariance


def as_double(tensor):
    return torch.as_tensor(tensor, dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 3])
class TestClosedForms:
    pi = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)

    def problem(self, outputs, **options):
        return low_rank_regression(12, outputs=outputs, num_components=3, sample_scaler=0.7, lora_alpha=3, **options)

    def test_outputs_are_the_networks(self, outputs):
        problem = self.problem(outputs)
        A = torch.randn(1, 3, 2)
        with using_draw(problem.model.groups, {GROUP: A}):
            expected = problem.network(features=problem.features).logits
        torch.testing.assert_close(problem.outputs(A.reshape(1, -1), problem.features)[0], expected)

    def test_evidence_and_posterior_given_the_weights(self, outputs):
        problem = self.problem(outputs)
        assert float(problem.log_evidence_given(self.pi)) == pytest.approx(log_joint(problem, self.pi), rel=1e-10)
        mean, covariance = dense_posterior(problem, self.pi)
        posterior = problem.posterior_given(self.pi)
        torch.testing.assert_close(posterior.mean, as_double(mean))
        torch.testing.assert_close(posterior.covariance, as_double(covariance))

    def test_predictive_density_given_the_weights(self, outputs):
        problem = self.problem(outputs)
        new = problem.simulate(7)
        log_density = problem.log_predictive(new.features, new.labels, pi=self.pi)
        posterior = problem.posterior_given(self.pi)
        design = problem.design(new.features)
        mean = problem.outputs(posterior.mean.unsqueeze(0), new.features)[0]
        for i in range(12):
            covariance = design[i] @ posterior.covariance @ design[i].T + problem.noise**2 * torch.eye(outputs)
            expected = multivariate_normal(mean[i].numpy(), covariance.numpy()).logpdf(new.labels[i].numpy())
            assert float(log_density[i]) == pytest.approx(expected, rel=1e-8)

    def test_integral_over_the_weights_by_quadrature(self, outputs):
        """N = 2 under Dir(1, 1): π₁ is uniform on [0, 1]."""
        problem = low_rank_regression(2, outputs=outputs, num_components=2, noise=1.5, sample_scaler=3)

        problem = problem.simulate(0, A=torch.full((1, 3, 2), 4.0))  # far from μ, so that π matters to the mean

        def integral(integrand):
            return np.asarray(scipy.integrate.quad_vec(integrand, 0, 1, epsrel=1e-10)[0])

        def at(u):
            return torch.tensor([u, 1 - u])

        evidence = integral(lambda u: math.exp(log_joint(problem, at(u))))
        estimate, error = problem.log_evidence()
        assert 0 < error < 0.01
        assert abs(estimate - math.log(evidence)) <= 4 * error

        weight = lambda u: math.exp(log_joint(problem, at(u))) / evidence  # noqa: E731
        mean = integral(lambda u: weight(u) * dense_posterior(problem, at(u))[0])
        second = integral(
            lambda u: (
                weight(u) * (dense_posterior(problem, at(u))[1] + np.outer(*2 * [dense_posterior(problem, at(u))[0]]))
            )
        )
        posterior = problem.posterior()
        torch.testing.assert_close(posterior.mean, as_double(mean), rtol=1e-2, atol=2e-3)
        torch.testing.assert_close(posterior.covariance, as_double(second - np.outer(mean, mean)), rtol=2e-2, atol=2e-3)

    def test_one_component_has_nothing_to_integrate(self, outputs):
        problem = low_rank_regression(12, outputs=outputs, num_components=1)
        estimate, error = problem.log_evidence()
        assert estimate == pytest.approx(float(problem.log_evidence_given(torch.ones(1))), rel=1e-12)
        assert error == 0

    def test_posterior_draws_have_its_moments(self, outputs):
        problem = self.problem(outputs)
        draws = problem.posterior_draws(20_000)
        assert {name: tuple(value.shape[1:]) for name, value in draws.items()} == {
            name: tuple(value.shape) for name, value in problem.truth.items()
        }
        A, posterior = draws[f"A_{GROUP}"].flatten(1), problem.posterior()
        error = posterior.covariance.diagonal().sqrt() / math.sqrt(len(A))
        assert ((A.mean(0) - posterior.mean).abs() <= 5 * error).all()
        centred = A - posterior.mean
        products = torch.einsum("si,sj->sij", centred, centred)
        error = products.std(0) / math.sqrt(len(A))
        assert ((products.mean(0) - posterior.covariance).abs() <= 5 * error).all()

    def test_predictive_density_averages_over_the_posterior(self, outputs):
        problem = self.problem(outputs)
        new = problem.simulate(7)
        A = problem.posterior_draws(20_000)[f"A_{GROUP}"].flatten(1)
        mean = problem.outputs(A, new.features[:4])
        labels = new.labels[:4].reshape(4, outputs)
        densities = dist.Normal(mean, problem.noise).to_event(1).log_prob(labels).exp()
        error = densities.std(0) / math.sqrt(len(A))
        exact = problem.log_predictive(new.features[:4], new.labels[:4]).exp()
        assert ((densities.mean(0) - exact).abs() <= 5 * error).all()


class TestSimulation:
    def test_draws_are_the_priors(self):
        """Var A_ij = ε² E[Σπ²] around μ, and labels miss the network's outputs by σ."""
        problem = low_rank_regression(4, num_components=3, noise=0.5, sample_scaler=0.7)
        simulated = [problem.simulate(seed) for seed in range(400)]
        A = torch.stack([s.truth[f"A_{GROUP}"].flatten() for s in simulated]) - problem.mean
        squares = A.square().mean(1)
        error = squares.std() / math.sqrt(len(squares))
        assert abs(squares.mean() - 0.7**2 * expected_cooperation(dist.Dirichlet(torch.ones(3)))) <= 5 * error
        outputs = torch.stack([s.outputs(s.truth[f"A_{GROUP}"].reshape(1, -1), s.features)[0, :, 0] for s in simulated])
        noise = torch.stack([s.labels for s in simulated]) - outputs
        squares = noise.square().mean(1)
        assert abs(squares.mean() - 0.5**2) <= 5 * squares.std() / math.sqrt(len(squares))

    def test_seed_decides(self):
        first, second, third = (low_rank_regression(seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.labels, second.labels)
        assert not torch.equal(first.labels, third.labels)
        assert torch.equal(first.simulate(5).labels, second.simulate(5).labels)

    def test_a_given_adapter(self):
        A = torch.full((1, 3, 2), 0.25)
        problem = low_rank_regression(4000, A=A)
        torch.testing.assert_close(problem.truth[f"A_{GROUP}"], A)
        posterior = problem.posterior()
        update = problem.design(problem.features)[:, 0]
        error = update @ (posterior.mean - A.flatten())
        assert error.abs().max() < 0.1

    def test_new_examples_of_the_same_truth(self):
        problem = low_rank_regression(5, noise=0.01)
        new = problem.with_features(torch.randn(2000, 3), seed=1)
        fitted = new.outputs(problem.truth[f"A_{GROUP}"].reshape(1, -1), new.features)[0, :, 0]
        noise = new.labels - fitted
        assert abs(noise.square().mean() - 0.01**2) <= 5 * noise.square().std() / math.sqrt(2000)
        assert torch.equal(new.labels, problem.with_features(new.features, seed=1).labels)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"num_examples": 0}, "num_examples"), ({"noise": 0}, "noise"), ({"components": "explicit"}, "collapsed")],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(InputError, match=message):
            low_rank_regression(**options)


def guide_at(problem, log_v, log_alpha):
    guide = MeanFieldGuide(problem.model)
    with torch.no_grad():
        getattr(guide, f"log_v_{GROUP}").copy_(as_double(log_v))
        getattr(guide, f"log_alpha_{GROUP}").copy_(as_double(log_alpha))
    return guide


def exact_elbo(problem, log_v, log_alpha, mean):
    """The ELBO of MonteCLoRA's guide without sampling: the mean and covariance of A are known, and so are all KLs."""
    config, df = problem.model.config, problem.model.degrees_of_freedom(problem.group)
    alpha = MixtureWeights(log_alpha.exp())
    wishart, prior = WishartCholesky(df, log_v.exp()), WishartCholesky(df, torch.ones_like(log_v))
    column = config.sample_scaler**2 * expected_cooperation(alpha) * wishart.covariance_mean
    covariance = torch.block_diag(*[column] * problem.group.columns)
    design = problem.design(problem.features).flatten(0, 1)
    target = problem.labels.reshape(-1) - problem.outputs(torch.zeros(1, 6), problem.features).reshape(-1)
    spread = (design @ covariance @ design.mT).diagonal().sum()
    squares = (target - design @ mean).square().sum() + spread
    variance = problem.noise**2
    likelihood = -squares / (2 * variance) - len(target) / 2 * math.log(2 * math.pi * variance)
    kl = kl_divergence(alpha, MixtureWeights(torch.ones_like(log_alpha))) + kl_divergence(wishart, prior)
    return likelihood - kl - problem.group.columns * expected_column_kl(wishart)


class ExactGuide:
    """π from its prior, Σ from its prior, A from the closed-form posterior given π."""

    def __init__(self, problem):
        self.problem = problem

    def __call__(self, *args, **kwargs):
        problem = self.problem
        concentration = torch.ones(1, 1, problem.model.config.num_components)
        with pyro.plate(f"adapters_{GROUP}", 1, dim=-2):
            pi = pyro.sample(f"pi_{GROUP}", MixtureWeights(concentration))
            pyro.sample(f"sigma_tril_{GROUP}", WishartCholesky(2, torch.ones(1, 1, 2)))
            joint = dist.MultivariateNormal(*problem.posterior_given(pi[0, 0])).expand([1, 1])
            flat = pyro.sample("flat", joint, infer={"is_auxiliary": True})
            with pyro.plate(f"columns_{GROUP}", 3, dim=-1):
                pyro.sample(f"A_{GROUP}", dist.Delta(flat.view(1, 3, 2), event_dim=1))


class TestELBO:
    @settings(max_examples=100, deadline=None)
    @given(
        st.integers(0, 5),
        st.lists(st.floats(-4, 3), min_size=2, max_size=2),
        st.lists(st.floats(-3, 4), min_size=3, max_size=3),
        st.floats(-2, 2),
    )
    def test_is_a_lower_bound_everywhere(self, seed, log_v, log_alpha, shift):
        """Each setting of v, α and μ has its own evidence (μ is the prior's mean too), and never passes it."""
        problem = dataclasses.replace(low_rank_regression(5, num_components=3, seed=seed), num_draws=4000)
        with torch.no_grad():
            problem.group.adapters[0].lora_A.weight.add_(shift)
        evidence, error = problem.log_evidence()
        assert exact_elbo(problem, as_double(log_v), as_double(log_alpha), problem.mean) <= evidence + 4 * error

    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("elbo", ["cooperative", "pyro"])
    def test_sampled_objective_is_that_bound(self, seed, elbo):
        problem = low_rank_regression(5, num_components=3, outputs=2, seed=seed)
        log_v, log_alpha = torch.randn(2) - 1, torch.randn(3)
        guide = guide_at(problem, log_v, log_alpha)
        objective, scale = (CooperativeELBO(1, 0, "elbo"), 5) if elbo == "cooperative" else (Trace_ELBO(), 1)
        draws = torch.tensor(
            [-scale * objective.loss(problem.model.joint, guide.forward, **problem.batch) for _ in range(300)]
        )
        error = draws.std() / math.sqrt(len(draws))
        assert abs(draws.mean() - exact_elbo(problem, log_v, log_alpha, problem.mean)) <= 5 * error
        evidence, evidence_error = problem.log_evidence()
        assert draws.mean() <= evidence + 5 * math.hypot(error, evidence_error)

    def test_equals_the_evidence_for_the_exact_guide(self):
        """With one component every single draw gives log p(y); with more, log p(y | π) of its own π."""
        problem = low_rank_regression(8, num_components=1)
        evidence, _ = problem.log_evidence()
        for elbo, scale in ((CooperativeELBO(1, 0, "elbo"), 8), (Trace_ELBO(), 1)):
            for _ in range(5):
                loss = elbo.loss(problem.model.joint, ExactGuide(problem), **problem.batch)
                assert -scale * loss == pytest.approx(evidence, rel=1e-10)

        problem = low_rank_regression(8, num_components=3)
        for seed in range(5):
            pyro.set_rng_seed(seed)
            loss = CooperativeELBO(1, 0, "elbo").loss(problem.model.joint, ExactGuide(problem), **problem.batch)
            pyro.set_rng_seed(seed)
            pi = pyro.poutine.trace(ExactGuide(problem)).get_trace().nodes[f"pi_{GROUP}"]["value"]
            assert -8 * loss == pytest.approx(float(problem.log_evidence_given(pi)), rel=1e-10)


class TestGradients:
    def problem_and_guide(self):
        problem = low_rank_regression(6, num_components=3, outputs=2)
        return problem, guide_at(problem, [-1.0, -0.5], [0.5, 1.0, -0.2])

    @pytest.mark.parametrize("exact", [True, False])
    def test_finite_differences_under_the_same_noise(self, exact):
        """μ and v enter a draw as a shift and a scale; α does not (its noise is drawn through an inverse CDF)."""
        problem, guide = self.problem_and_guide()
        mean, log_v = problem.group.adapters[0].lora_A.weight, getattr(guide, f"log_v_{GROUP}")
        elbo = CooperativeELBO(1, 0, "elbo", num_particles=2, exact=exact)

        def loss():
            pyro.set_rng_seed(3)
            return elbo.differentiable_loss(problem.model.joint, guide.forward, **problem.batch)

        gradients = torch.autograd.grad(loss(), [mean, log_v])
        for parameter, gradient in zip((mean, log_v), gradients, strict=True):
            for index in np.ndindex(*parameter.shape):
                sides = []
                for step in (1e-5, -1e-5):
                    parameter.data[index] += step
                    sides.append(loss().item())
                    parameter.data[index] -= step
                assert gradient[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6, abs=1e-7)

    def test_mean_gradient_is_the_bounds(self):
        """All parameters, α too: the average over draws against finite differences of the bound without sampling."""
        problem, guide = self.problem_and_guide()
        mean = problem.group.adapters[0].lora_A.weight
        log_v, log_alpha = getattr(guide, f"log_v_{GROUP}"), getattr(guide, f"log_alpha_{GROUP}")
        elbo = CooperativeELBO(1, 0, "elbo")
        draws = []
        for _ in range(400):
            loss = -6 * elbo.differentiable_loss(problem.model.joint, guide.forward, **problem.batch)
            draws.append(torch.cat([g.mT.flatten() for g in torch.autograd.grad(loss, [mean, log_v, log_alpha])]))
        draws = torch.stack(draws)

        point = torch.cat([problem.mean, log_v.detach()[0], log_alpha.detach()[0]])
        bound = lambda p: float(exact_elbo(problem, p[6:8], p[8:], p[:6]))  # noqa: E731
        steps = 1e-5 * torch.eye(len(point))
        expected = torch.tensor([(bound(point + step) - bound(point - step)) / 2e-5 for step in steps])
        error = draws.std(0) / math.sqrt(len(draws))
        assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-6).all()


@pytest.mark.parametrize("name", sorted(GUIDES))
@pytest.mark.parametrize("outputs", [1, 2])
def test_bayes_lora_runs_on_it_as_it_is(name, outputs):
    torch.set_default_dtype(torch.float32)
    problem = low_rank_regression(10, outputs=outputs)
    bayes = BayesLoRA(problem.network, problem.model.config.replace(guide=name), likelihood=problem.model.likelihood)
    bayes.num_examples = 10
    loss = bayes(**problem.batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    trained = {n: p for n, p in bayes.named_parameters() if p.requires_grad}
    assert not any("lora_B" in n for n in trained)
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    assert any(p.grad.abs().max() > 0 for n, p in trained.items() if n.startswith("guide"))
    if outputs == 1:
        prediction = bayes.predict(problem.dataset, num_samples=8, progress=False)
        assert prediction.mean.shape == (10,)
        assert prediction.noise_scale == pytest.approx(problem.noise)
