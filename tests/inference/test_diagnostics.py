"""Diagnostics against closed forms and constructed cases, good ones and ones that are wrong on purpose."""

import json
import math
import subprocess
import sys

import arviz
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import ReshapeTransform

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, diagnose
from bayeslora.analysis.tables import diagnostics
from bayeslora.guides import GUIDES, Guide
from bayeslora.inference.diagnostics import _curvature, log_importance_weights
from bayeslora.inference.draws import draw_trace
from bayeslora.models import low_rank_regression
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.modules import randomize_b


class TestParetoK:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("draws", [100, 1000])
    def test_is_what_arviz_computes(self, seed, draws):
        log_weights = np.random.default_rng(seed).standard_t(3 + seed, size=draws)
        _, k = arviz.psislw(log_weights)
        assert diagnostics.pareto_k(log_weights - 7) == pytest.approx(float(k), abs=1e-6)

    @pytest.mark.parametrize("shape", [0.3, 0.9])
    def test_finds_the_shape_of_pareto_weights(self, shape):
        """w = u^(−k) has a Pareto tail of shape k; the estimate's standard error is (1 + k)/sqrt(tail)."""
        uniform = np.random.default_rng(0).uniform(size=20_000)
        found = diagnostics.pareto_k(-shape * np.log(uniform))
        assert abs(found - shape) < 4 * (1 + shape) / math.sqrt(3 * math.sqrt(20_000))

    def test_equal_weights_need_no_smoothing(self):
        assert diagnostics.pareto_k(np.full(50, 3.0)) == 0

    def test_one_draw_with_all_the_weight(self):
        assert diagnostics.importance_sampling([0.0] * 99 + [800.0]).verdict == "bad"

    def test_bad_input(self):
        with pytest.raises(InputError, match="at least 25"):
            diagnostics.pareto_k(np.zeros(24))
        with pytest.raises(InputError, match="NaN"):
            diagnostics.pareto_k([np.nan] * 30)


class TestVerdicts:
    @pytest.mark.parametrize(("value", "verdict"), [(0.5, "good"), (0.6, "doubtful"), (0.71, "bad"), (math.nan, "bad")])
    def test_small_is_good(self, value, verdict):
        advice = {"good": "a", "doubtful": "b", "bad": "c"}
        found = diagnostics._judge("k", value, (0.5, 0.7), "somebody", advice)
        assert (found.verdict, found.advice) == (verdict, advice[verdict])
        assert found.rule == "good if ≤ 0.5, bad if > 0.7"

    @pytest.mark.parametrize(("change", "verdict"), [(0.2, "good"), (0.02, "doubtful"), (0.0004, "bad")])
    def test_large_is_good(self, change, verdict):
        found = diagnostics.data_drivenness([change, -2 * change, 0.0], [1.0, 2.0, 0.0])
        assert found.value == pytest.approx(change)
        assert found.verdict == verdict
        assert found.rule == "good if ≥ 0.05, bad if < 0.01"

    def test_json(self):
        for value in (0.25, math.inf):
            found = diagnostics._judge("k", value, (0.5, 0.7), "somebody", {"good": "a", "bad": "c"})
            record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
            assert record["value"] == (value if math.isfinite(value) else None)
            assert set(record) == {"name", "value", "threshold", "verdict", "source", "advice"}

    def test_gap_is_the_mean_difference(self):
        found = diagnostics.amortization_gap([1.0, 2.0], [0.9, 1.7])
        assert found.value == pytest.approx(0.2)
        assert found.verdict == "bad"
        assert diagnostics.amortization_gap([1.0], [1.1]).verdict == "good"


class TestRestarts:
    def test_the_same_posterior(self):
        draws = np.random.default_rng(0).normal(size=(3, 200, 50))
        found = diagnostics.restart_agreement(draws)
        assert found.value == pytest.approx(1, abs=0.01)
        assert found.verdict == "good"

    def test_runs_as_far_apart_as_draws_are_on_the_threshold(self):
        rng = np.random.default_rng(0)
        draws = rng.normal(size=(4, 200, 2000)) + rng.normal(size=(4, 1, 2000))
        assert diagnostics.restart_agreement(draws).value == pytest.approx(math.sqrt(2), rel=0.02)

    def test_runs_apart(self):
        draws = np.random.default_rng(0).normal(size=(2, 50, 20)) + np.array([0.0, 3.0])[:, None, None]
        assert diagnostics.restart_agreement(draws).verdict == "bad"

    def test_draws_without_spread(self):
        assert diagnostics.restart_agreement(np.ones((2, 5, 3))).verdict == "good"
        assert diagnostics.restart_agreement(np.arange(2.0)[:, None, None] * np.ones((2, 5, 3))).verdict == "bad"

    def test_one_run_is_refused(self):
        with pytest.raises(InputError, match="two of each"):
            diagnostics.restart_agreement(np.ones((1, 5, 3)))


class TestConvergence:
    def history(self, **traces):
        return [dict(zip(traces, values, strict=True)) for values in zip(*traces.values(), strict=True)]

    def test_flat_noise_and_a_slope(self):
        noise = np.random.default_rng(0).normal(size=40)
        history = self.history(**{"loss": 1 + 0.1 * noise, "elbo/kl": 10 - 0.1 * np.arange(40) + 0.01 * noise})
        loss, kl = diagnostics.convergence(history)
        assert (loss.name, loss.value, loss.verdict) == ("convergence_loss", 0.0, "good")
        assert (kl.name, kl.verdict) == ("convergence_kl", "bad")
        assert kl.value == pytest.approx(1.0 / (10 - 0.1 * 34.5), rel=0.5)  # 1 between quarters, less its error

    def test_other_entries_and_short_logs(self):
        assert diagnostics.convergence([{"eval_loss": 1.0}] * 30) == []
        assert diagnostics.convergence(self.history(loss=np.ones(7))) == []


def test_verdicts_do_without_torch():
    code = (
        "import sys, bayeslora.analysis.tables.diagnostics; "
        "import bayeslora.analysis.metrics.simulation_based_calibration; print('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


class ExactGuide(Guide):
    """The yardstick's posterior of A for N = 1, stretched and shifted by so many of its standard deviations."""

    problem, stretch, shift = None, 1.0, 0.0

    def sample_group(self, group, program):
        adapters, _ = self.plates(group, program)
        with adapters:
            sites = self.sample_priors(group, program)
        mean, covariance = self.problem.posterior_given(torch.ones(1))
        mean = mean + self.shift * covariance.diagonal().sqrt()
        normal = dist.MultivariateNormal(mean.float()[None], (self.stretch**2 * covariance).float())
        shaped = dist.TransformedDistribution(normal, ReshapeTransform(mean.shape, (group.columns, group.rank)))
        return sites | {f"A_{group.name}": program.sample(f"A_{group.name}", shaped.to_event(1))}


def with_exact_guide(**changes):
    problem = low_rank_regression(20, num_components=1)
    guide = type("Guide", (ExactGuide,), {"problem": problem, **changes})
    return problem, BayesLoRA(problem.network, problem.model.config, guide=guide, likelihood=problem.model.likelihood)


class TestImportanceWeights:
    def test_of_the_exact_posterior_are_the_evidence(self):
        problem, bayes = with_exact_guide()
        weights = log_importance_weights(bayes, problem.dataset, num_samples=50)
        evidence = float(problem.log_evidence_given(torch.ones(1)))
        np.testing.assert_allclose(weights, evidence, atol=2e-4)
        assert diagnostics.importance_sampling(weights).value == 0

    @pytest.mark.parametrize("changes", [{"stretch": 0.25}, {"shift": 2.0}])
    def test_of_a_wrong_posterior_are_bad(self, changes):
        problem, bayes = with_exact_guide(**changes)
        found = diagnostics.importance_sampling(log_importance_weights(bayes, problem.dataset, num_samples=200))
        assert found.value > 0.7
        assert found.verdict == "bad"

    def test_a_wide_guide_covers(self):
        problem, bayes = with_exact_guide(stretch=1.2)
        weights = log_importance_weights(bayes, problem.dataset, num_samples=200)
        assert diagnostics.importance_sampling(weights).value < 0.5


def bayes_with(guide="mean_field", **options):
    options = {
        "r": 2,
        "num_components": 3,
        "target_modules": ["query", "value"],
        "alpha_init": "ones",
        "sample_scaler": 0.3,
        "cooperation": 0.0,
        "guide": guide,
    } | options
    return BayesLoRA(tiny_network(layers=1), MonteCLoRAConfig(**options)).eval()


def fitted(**options):
    """A network that is sure of every label, as a fitted one is: the labels are its own, half of them 1."""
    bayes = randomize_b(bayes_with(**options))
    head = bayes.network.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        head.weight.mul_(100)
        logits = bayes.predict(tiny_dataset(32), num_samples=0).sample_log_probs[0]
        head.bias[1] -= float(np.median(logits[:, 1] - logits[:, 0]))
    probs = bayes.predict(tiny_dataset(32), num_samples=0).probs
    return bayes, [one | {"labels": int(p.argmax())} for one, p in zip(tiny_dataset(32), probs, strict=True)]


def answers(bayes, data=None, **options):
    options = {"num_samples": 25, "steps": 20} | options
    return {one.name: one for one in diagnose(bayes, data or tiny_dataset(32), **options)}


class TestDiagnose:
    @pytest.mark.parametrize("guide", sorted(GUIDES))
    def test_answers_and_leaves_no_trace(self, guide):
        bayes = randomize_b(bayes_with(guide))
        before = {name: value.clone() for name, value in bayes.state_dict().items()}
        trained = [p.requires_grad for p in bayes.parameters()]
        own, state = bayes.guide, torch.get_rng_state()
        history = [{"loss": 1.0, "elbo/task": 0.9, "elbo/kl": 2.0}] * 8
        found = answers(bayes, restarts=[randomize_b(bayes_with(guide))], history=history)
        names = {
            "pareto_k",
            "restart_r_hat",
            "convergence_loss",
            "convergence_task",
            "convergence_kl",
            "data_drivenness",
        }
        assert set(found) == names | ({"amortization_gap"} if guide != "gaussian" else set())
        assert bayes.guide is own
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in bayes.state_dict().items())
        assert [p.requires_grad for p in bayes.parameters()] == trained
        assert all(p.grad is None for p in bayes.parameters())
        assert not any(module.training for module in bayes.modules())
        assert all(0 <= one.value < math.inf for one in found.values() if one.name != "amortization_gap")

    @pytest.mark.parametrize("components", ["collapsed", "explicit"])
    @pytest.mark.parametrize(("scaler", "verdict"), [(0.5, "good"), (1e-4, "bad")])
    def test_data_move_the_noise_of_a_large_perturbation_alone(self, components, scaler, verdict):
        """With a tiny ε the labels cannot be told from permuted ones: the data do not reach the posterior."""
        bayes, data = fitted(sample_scaler=scaler, kl_weight=1e-3, components=components)
        assert answers(bayes, data)["data_drivenness"].verdict == verdict

    def test_data_do_not_move_a_posterior_that_ignores_them(self):
        found = answers(bayes_with())["data_drivenness"]  # B is zero: A has no effect
        assert found.value == 0
        assert found.verdict == "bad"

    @pytest.mark.parametrize("components", ["collapsed", "explicit"])
    @pytest.mark.parametrize("normalization", ["paper", "elbo"])
    def test_curvature_is_the_objectives(self, normalization, components):
        """Against the second difference of the objective's own KL in t, with v scaled by e^(2t)."""
        bayes = bayes_with(normalization=normalization, components=components, kl_weight=0.7)
        bayes.num_examples, batch = 32, tiny_batch()
        group = bayes.model.groups[0]
        sites = [draw_trace(bayes, 0, i).nodes for i in range(200)]
        values = [{n: s["value"] for n, s in nodes.items() if s["type"] == "sample"} for nodes in sites]
        found = torch.stack([_curvature(bayes, value, 32) for value in values]).mean(0).sum()

        def kl(t):
            with torch.no_grad():
                bayes.guide.log_v_r2_in16.add_(2 * t)
                bayes.train()(**batch)
                bayes.guide.log_v_r2_in16.sub_(2 * t)
            return float(bayes.elbo.parts.kl[f"{'S' if components == 'explicit' else 'A'}_{group.name}"])

        second = 0.7 * (kl(0.1) - 2 * kl(0.0) + kl(-0.1)) / 0.1**2
        assert float(found) == pytest.approx(second, rel=0.15)

    def test_no_gap_at_the_optimum(self):
        """B is zero, so the optimum is the KL's own, where v and α start."""
        for guide in ("mean_field", "amortized"):
            assert abs(answers(bayes_with(guide))["amortization_gap"].value) < 1e-3

    def test_gap_of_an_amortized_guide_far_from_it(self):
        bayes = bayes_with("amortized", kl_weight=1.0)
        with torch.no_grad():
            bayes.guide.output.bias[:2] += 2.0
        found = answers(bayes)["amortization_gap"]
        assert found.verdict == "bad"

    def test_mistakes(self):
        with pytest.raises(InputError, match="no posterior"):
            answers(bayes_with(sample_scaler=0.0))
        bayes = bayes_with()
        with pytest.raises(InputError, match="at least 25"):
            answers(bayes, num_samples=24)
        with pytest.raises(InputError, match="no labels"):
            answers(bayes, [{"input_ids": [3, 4], "attention_mask": [1, 1]}] * 4)
        bayes.num_examples = 16
        with pytest.raises(InputError, match="16 examples it was fitted to"):
            answers(bayes)
