"""The objective against its formulas, term by term, and its independence of batch, accumulation and depth.

With π ~ Dir(α) and Σ ~ Wishart(V, ν), V = diag(v), an adapter has KL_D = KL(Dir(α) ‖ Dir(1)),
KL_W = (ν/2)(tr V − log|V| − r), E[L_C] = Σ_k α_k(α_k + 1) / (α_0(α_0 + 1)) where α_0 = Σ_k α_k, and for each column
E[KL_N] = ½(ν·tr V − E[log|Σ|] − r). The loss is task + η·(KL_N + KL_W + KL_D) + λ·L_C. The paper takes means over the
adapters and counts one column, N times, in each; the ELBO takes sums over the adapters with all of their columns, and
divides them by the number of training examples.
"""

import math

import pytest
import torch
from torch.distributions import Dirichlet, kl_divergence

from bayeslora import BayesLoRA, CooperativeELBO, InputError, MonteCLoRAConfig
from bayeslora.distributions import WishartCholesky, expected_column_kl
from bayeslora.elbo import ELBOParts, Score
from tests.conftest import tiny_batch, tiny_network

TARGETS = ["query", "output.dense"]


def fitted(**options):
    """A module whose posterior is away from its prior."""
    options = {"r": 2, "num_components": 3, "target_modules": TARGETS, "guide": "mean_field"} | options
    bayes = BayesLoRA(tiny_network(), MonteCLoRAConfig(**options))
    with torch.no_grad():
        for parameter in bayes.guide.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    bayes.num_examples = 40
    return bayes.train()


def terms_by_hand(bayes):
    """Per adapter: KL_D, KL_W, one column's E[KL_N], E[L_C], and the number of columns."""
    rows = []
    for group in bayes.model.groups:
        log_v, log_alpha = bayes.guide.variational_parameters(group)
        for v, alpha in zip(log_v.exp(), log_alpha.exp(), strict=True):
            total = alpha.sum()
            rows.append(
                {
                    "pi": kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones_like(alpha))),
                    "sigma": group.rank / 2 * (v.sum() - v.log().sum() - group.rank),
                    "column": expected_column_kl(WishartCholesky(group.rank, v)),
                    "cooperation": (alpha * (alpha + 1)).sum() / (total * (total + 1)),
                    "columns": group.columns,
                }
            )
    return rows


@pytest.mark.parametrize("components", ["collapsed", "explicit"])
def test_paper_normalization(components):
    bayes = fitted(components=components, kl_weight=0.01, cooperation=0.7)
    loss = bayes(**tiny_batch()).loss.detach()
    rows, parts = terms_by_hand(bayes), bayes.elbo.parts
    kl = sum(row["pi"] + row["sigma"] + 3 * row["column"] for row in rows) / len(rows)
    cooperation = sum(row["cooperation"] for row in rows) / len(rows)
    torch.testing.assert_close(sum(parts.kl.values()), kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.cooperation, cooperation)
    torch.testing.assert_close(loss, parts.task + 0.01 * kl + 0.7 * cooperation)
    assert set(parts.to_floats()) >= {"task", "kl", "cooperation", "kl_pi_r2_in16", "kl_sigma_tril_r2_in24"}


@pytest.mark.parametrize(("components", "times"), [("collapsed", 1), ("explicit", 3)])
def test_elbo_normalization(components, times):
    bayes = fitted(components=components, normalization="elbo", kl_weight=0.5, cooperation=0.7)
    loss = bayes(**tiny_batch()).loss.detach()
    rows, parts = terms_by_hand(bayes), bayes.elbo.parts
    kl = sum(row["pi"] + row["sigma"] + times * row["columns"] * row["column"] for row in rows) / 40
    cooperation = sum(row["cooperation"] for row in rows) / 40
    torch.testing.assert_close(sum(parts.kl.values()), kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, parts.task + 0.5 * kl + 0.7 * cooperation)


@pytest.mark.parametrize("normalization", ["paper", "elbo"])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_kl_weight_does_not_depend_on_the_batch(normalization, size):
    """The KL is that of the whole training set, however many of its examples the batch holds."""
    bayes = fitted(normalization=normalization)
    bayes(**tiny_batch(6))
    whole = bayes.elbo.parts.to_floats()["kl"]
    bayes(**{name: value[:size] for name, value in tiny_batch(6).items()})
    assert bayes.elbo.parts.to_floats()["kl"] == pytest.approx(whole, rel=1e-5)


def test_accumulated_halves_give_the_gradient_of_the_whole():
    """At fixed noise, two half batches at weight ½ are one batch, KL included.

    A KL added in full to every micro-batch would count once for each step of accumulation.
    """
    bayes = fitted(normalization="elbo")
    batch = tiny_batch(6)
    half = [{n: v[part] for n, v in batch.items()} for part in (slice(0, 3), slice(3, 6))]

    def gradients(batches):
        bayes.zero_grad()
        for piece in batches:
            torch.manual_seed(5)
            (bayes(**piece).loss / len(batches)).backward()
        return [p.grad.clone() for p in bayes.guide.parameters()]

    for whole, accumulated in zip(gradients([batch]), gradients(half), strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-3, atol=1e-6)


def test_particles_are_averaged():
    single, several = fitted(), fitted(num_particles=8)
    several.load_state_dict(single.state_dict())
    with torch.no_grad():
        values = torch.stack([single(**tiny_batch()).loss for _ in range(100)])
        averaged = torch.stack([several(**tiny_batch()).loss for _ in range(30)])
    error = math.sqrt(values.var() / 100 + averaged.var() / 30)
    assert abs(values.mean() - averaged.mean()) <= 5 * error
    assert averaged.std() < values.std()


def test_scores_of_particles_are_averaged_part_by_part():
    elbo = CooperativeELBO(num_particles=2)
    scores = [
        Score(torch.tensor(loss), ELBOParts(torch.tensor(loss / 2), {"A": torch.tensor(loss / 4)}, torch.tensor(1.0)))
        for loss in (2.0, 6.0)
    ]
    assert elbo.average(scores) == 4.0
    assert elbo.parts.to_floats() == {"task": 2.0, "cooperation": 1.0, "kl": 1.0, "kl_A": 1.0}


def test_exact_terms_take_noise_away_and_nothing_else():
    bayes = fitted(kl_weight=0.1)
    exact, sampled = (CooperativeELBO(0.1, 1.0, exact=exact) for exact in (True, False))
    with torch.no_grad():
        values = {}
        for elbo in (exact, sampled):
            draws = []
            for _ in range(300):
                elbo.differentiable_loss(bayes.model.joint, bayes.guide.forward, **tiny_batch(2))
                draws.append(float(elbo.parts.cooperation) + 0.1 * elbo.parts.to_floats()["kl"])
            values[elbo.exact] = torch.tensor(draws, dtype=torch.float64)
    assert values[True].std() < 1e-5
    assert abs(values[False].mean() - values[True].mean()) <= 5 * values[False].std() / math.sqrt(300)
    assert values[False].std() > 1e-3


def test_elbo_is_a_bound_where_the_evidence_is_known():
    """A Gaussian with a Gaussian prior; equality at the exact posterior, below it elsewhere.

    Only a case with a known answer shows a wrong sign, or a norm that was not squared: either still gives a number.
    """
    import pyro
    import pyro.distributions as dist

    y = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
        with pyro.plate("examples", 3):
            pyro.sample("labels", dist.Normal(z, 1.0), obs=y)

    def guide(mean, scale):
        return lambda: pyro.sample("z", dist.Normal(torch.as_tensor(mean, dtype=y.dtype), scale))

    covariance = torch.eye(3, dtype=y.dtype) + 1
    evidence = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=y.dtype), covariance).log_prob(y)
    elbo = CooperativeELBO(1.0, 0.0, "elbo")
    exact = [elbo.loss(model, guide(float(y.sum()) / 4, 0.5)) * 3 for _ in range(4000)]
    values = torch.tensor(exact, dtype=torch.float64)
    assert abs(-values.mean() - evidence) <= 5 * values.std() / math.sqrt(4000)
    for mean, scale in ((0.9, 0.5), (0.3, 0.2), (0.3, 1.5)):
        worse = torch.tensor([elbo.loss(model, guide(mean, scale)) * 3 for _ in range(1000)])
        assert -worse.mean() < evidence - 3 * worse.std() / math.sqrt(1000)


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="kl_weight"):
        CooperativeELBO(kl_weight=-1e-5)
    with pytest.raises(InputError, match="cooperation"):
        CooperativeELBO(cooperation=float("nan"))
    with pytest.raises(InputError, match="normalization"):
        CooperativeELBO(normalization="sum")


def test_elbo_without_the_number_of_examples_says_what_to_set():
    bayes = fitted(normalization="elbo")
    bayes.num_examples = None
    with pytest.raises(InputError, match="num_examples"):
        bayes(**tiny_batch())


def test_missing_labels_are_named():
    bayes = fitted()
    batch = tiny_batch()
    batch.pop("labels")
    with pytest.raises(InputError, match="labels"):
        CooperativeELBO().loss(bayes.model, bayes.guide, **batch)
