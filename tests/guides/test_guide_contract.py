"""What every guide must do: the shipped ones, the example's own, and Pyro's autoguides where it applies."""

import copy
import importlib.util
import math
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoNormal
from torch.distributions import kl_divergence
from transformers import TrainerCallback

from bayeslora import BayesLoRA, CooperativeELBO, InputError, MonteCLoRAConfig, fit
from bayeslora.analysis import to_arviz
from bayeslora.guides import GUIDES, GaussianGuide, Guide, MixtureGuide
from bayeslora.models import low_rank_regression
from bayeslora.recorder import Recorder
from bayeslora.training.monitor import posterior_logs
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.modules import randomize_b, small_model, trace


def _example_guide():
    path = Path(__file__).parents[2] / "examples" / "your_own_guide.py"
    spec = importlib.util.spec_from_file_location("your_own_guide", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LowRankGuide


ALL_GUIDES = {**GUIDES, "own": _example_guide()}
CASES = [(name, "collapsed") for name in ALL_GUIDES] + [(name, "explicit") for name in ("mean_field", "amortized")]
every_guide = pytest.mark.parametrize("name", list(ALL_GUIDES))
every_case = pytest.mark.parametrize(("name", "components"), CASES)


def make(name, components="collapsed", **options):
    model = small_model(components=components, **{"layers": 1, **options})
    return model, ALL_GUIDES[name](model)


def bayes_with(name, *, kind="bert", **options):
    options = {"r": 2, "num_components": 3, "sample_scaler": 0.1, "target_modules": ["query", "value"]} | options
    bayes = BayesLoRA(tiny_network(kind), MonteCLoRAConfig(**options), guide=ALL_GUIDES[name])
    return randomize_b(bayes).train()


def move(guide):
    """Every parameter off its initial value."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return guide


def draw(guide, seed=1, program=pyro, **options):
    pyro.set_rng_seed(seed)
    return guide.run(program, **options)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[site], other[site]) for site in one)


def latent_sites(nodes):
    return {n for n, s in nodes.items() if s["type"] == "sample" and n.startswith(("pi_", "sigma_tril_", "A_", "S_"))}


def prior_nodes(model, values):
    """The prior's sites at given values."""
    recorder = Recorder(values)
    model.run(recorder)
    return recorder.nodes


@every_case
class TestSites:
    def test_sites_and_shapes_are_the_models(self, name, components):
        model, guide = make(name, components)
        ours, theirs = trace(guide, **tiny_batch()).nodes, trace(model, **tiny_batch()).nodes
        assert latent_sites(ours) == latent_sites(theirs) != set()
        for site in latent_sites(ours):
            assert ours[site]["value"].shape == theirs[site]["value"].shape

    def test_values_lie_in_the_priors_support(self, name, components):
        model, guide = make(name, components)
        for node in prior_nodes(model, move(guide)()).values():
            assert node["fn"].support.check(node["value"]).all()
            assert torch.isfinite(node["fn"].log_prob(node["value"])).all()

    def test_seed_repeats_the_draw(self, name, components):
        _, guide = make(name, components)
        first, again, other = draw(guide, 3), draw(guide, 3), draw(guide, 4)
        assert equal(first, again)
        assert not any(torch.equal(first[site], other[site]) for site in first)

    def test_pyro_and_the_recorder_see_one_program(self, name, components):
        """Same sites, values and densities, so the same law, with and without Pyro's handlers."""
        _, guide = make(name, components)
        recorder = Recorder()
        drawn = draw(move(guide), program=recorder)
        pyro.set_rng_seed(1)
        nodes = trace(guide.forward).nodes
        assert latent_sites(nodes) == set(recorder.nodes) == set(drawn)
        for site, node in recorder.nodes.items():
            assert torch.equal(node["value"], nodes[site]["value"])
            density = node["fn"].log_prob(node["value"]).sum()
            torch.testing.assert_close(density, nodes[site]["fn"].log_prob(nodes[site]["value"]).sum())

    def test_draws_of_a_are_centred_at_the_networks_mean(self, name, components):
        model, guide = make(name, components)
        move(guide)
        values = [model.matrices(draw(guide, seed)) for seed in range(100)]
        for group in model.groups:
            deviation = torch.stack([value[group.name] for value in values]) - group.mean()
            scores = deviation.mean(0) / (deviation.std(0) / math.sqrt(len(values)))
            assert scores.abs().max() < 5
            if guide.takes_mean:
                recorder = Recorder(draw(guide, 0, means=model.zero_means()))
                around_zero = model.run(recorder, model.zero_means())[group.name]
                assert around_zero.sub(deviation[0]).abs().max() < 1e-5

    def test_symmetric_rows_are_symmetric(self, name, components):
        """Turning the sign of rows of A − μ, and Σ with them, leaves the joint density as it is; a guide where it does
        not must say so."""
        model, guide = make(name, components)
        values = draw(move(guide))
        signs = torch.tensor([1.0, -1.0])
        factor = values["sigma_tril_r2_in16"]
        turned = {"sigma_tril_r2_in16": signs.unsqueeze(-1) * factor * signs}
        if components == "explicit":
            turned["S_r2_in16"] = signs * values["S_r2_in16"]
        else:
            mean = model.mean(model.groups[0])
            turned["A_r2_in16"] = mean + signs * (values["A_r2_in16"] - mean)

        def density(values):
            recorder = Recorder(values)
            guide.run(recorder)
            return sum(node["fn"].log_prob(node["value"]).sum() for node in recorder.nodes.values())

        assert guide.symmetric_rows == bool((density(values) - density(values | turned)).abs() < 1e-3)


@every_case
class TestObjective:
    def test_gradients_reach_every_parameter(self, name, components):
        """From the data alone, and from the KL alone."""
        for options in ({"kl_weight": 0.0}, {"kl_weight": 1.0}):
            bayes = bayes_with(name, components=components, cooperation=0.0, **options)
            bayes(**tiny_batch()).loss.backward()
            gradients = {n: p.grad for n, p in bayes.guide.named_parameters()}
            if name == "amortized":  # its last layer starts at zero, so nothing passes to the one before
                gradients = {n: g for n, g in gradients.items() if n.startswith("output")}
            assert gradients
            for parameter, gradient in gradients.items():
                assert gradient is not None, parameter
                assert torch.isfinite(gradient).all()
                assert gradient.abs().max() > 0

    def test_the_exact_kl_is_the_mean_of_the_sampled_one(self, name, components):
        model, guide = make(name, components)
        move(guide)
        model.num_examples = 10
        exact, sampled = (CooperativeELBO(1.0, 0.0, "elbo", exact=flag) for flag in (True, False))
        differences = []
        for seed in range(100):
            nodes = Recorder()
            prior = prior_nodes(model, draw(guide, seed, nodes))
            kl = [
                sum(elbo._batched_kl(prior[s], nodes.nodes[s]).expand(prior[s]["fn"].batch_shape).sum() for s in prior)
                for elbo in (exact, sampled)
            ]
            differences.append((kl[0] - kl[1]).detach())
        differences = torch.stack(differences)
        assert differences.mean().abs() <= 5 * differences.std() / math.sqrt(len(differences)) + 1e-3

    def test_a_step_through_pyros_handlers_is_the_same_step(self, name, components):
        """A guide whose ``forward`` is its own is run as any Pyro program."""
        plain = bayes_with(name, components=components, noise="shared", kl_weight=0.1)
        other = copy.deepcopy(plain)
        cls = type(other.guide)
        other.guide.__class__ = type("Own", (cls,), {"forward": lambda self, *args, **kwargs: self.run(pyro)})
        steps = []
        for bayes in (plain, other):
            torch.manual_seed(3)
            bayes(**tiny_batch()).loss.backward()
            gradients = {n: p.grad for n, p in bayes.named_parameters() if p.requires_grad}
            steps.append((bayes.elbo.parts.to_floats(), gradients))
        assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-4)
        for parameter, gradient in steps[0][1].items():
            torch.testing.assert_close(steps[1][1][parameter], gradient, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("normalization", ["paper", "elbo"])
    def test_svi_drives_model_and_guide_as_they_are(self, name, components, normalization):
        model, guide = make(name, components)
        model.num_examples = 50
        before = {n: p.detach().clone() for n, p in [*model.network.named_parameters(), *guide.named_parameters()]}
        elbo = CooperativeELBO(kl_weight=1e-3, normalization=normalization)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
        losses = [svi.step(**tiny_batch()) for _ in range(3)]
        assert all(math.isfinite(loss) for loss in losses)
        after = {n: p.detach() for n, p in [*model.network.named_parameters(), *guide.named_parameters()]}
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        frozen = {n for n, p in model.network.named_parameters() if not p.requires_grad}
        assert moved.isdisjoint(frozen)
        assert any("lora_B" in n for n in moved)
        assert any(n.startswith(("log_", "output")) for n in moved)
        assert svi.evaluate_loss(**tiny_batch()) == pytest.approx(elbo.loss(model, guide, **tiny_batch()), rel=0.5)

    def test_stock_pyro_elbos_agree_with_ours(self, name, components):
        """Trace_ELBO, TraceMeanField_ELBO and ours (η = 1, λ_C = 0) estimate one number."""
        model, guide = make(name, components, target_modules=["query"])
        model.num_examples = 60
        batch, losses = tiny_batch(), {}
        for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), CooperativeELBO(1.0, 0.0, "elbo")):
            scale = 60 if isinstance(elbo, CooperativeELBO) else 1
            with pyro.validation_enabled(name != "own"):  # Pyro's check wants the guide's columns outside the event
                values = torch.tensor([elbo.loss(model, guide, **batch) * scale for _ in range(40)])
            losses[type(elbo).__name__] = (values.mean(), values.std() / math.sqrt(len(values)))
        ours, error = losses["CooperativeELBO"]
        for mean, other_error in losses.values():
            assert abs(mean - ours) <= 5 * (error**2 + other_error**2).sqrt()
        if isinstance(guide, MixtureGuide):
            assert error <= losses["Trace_ELBO"][1]  # closed forms take noise away


@every_guide
class TestUse:
    def test_copies_draw_alike_and_train_apart(self, name):
        bayes = bayes_with(name)
        twin = copy.deepcopy(bayes)
        assert equal(draw(bayes.guide), draw(twin.guide))
        move(twin.guide)
        assert not equal(draw(bayes.guide), draw(twin.guide))

    def test_casting_the_network_keeps_the_posterior_in_float32(self, name):
        bayes = bayes_with(name).to(torch.bfloat16)
        assert {p.dtype for p in bayes.guide.parameters()} == {torch.float32}
        assert all(value.dtype == torch.float32 for value in bayes.guide().values())
        bayes(**tiny_batch()).loss.backward()
        assert {p.device.type for p in bayes.to("meta").guide.state_dict().values()} == {"meta"}

    def test_fit_resume_reopen_predict_and_arviz(self, name, tmp_path):
        """The whole way, with the guide as the only difference."""

        def start():
            return BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2, target_modules=["query"]), guide=ALL_GUIDES[name])

        data, options = tiny_dataset(16), {"batch_size": 8, "max_steps": 4, "progress": False, "save_steps": 2}
        torch.manual_seed(0)
        bayes = start()
        fit(bayes, data, output_dir=tmp_path / "whole", **options)

        class Stop(Exception):
            pass

        class StopAfter(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    raise Stop

        torch.manual_seed(0)
        with pytest.raises(Stop):
            fit(start(), data, output_dir=tmp_path / "run", callbacks=[StopAfter()], **options)
        torch.manual_seed(0)
        resumed = start()
        fit(resumed, data, output_dir=tmp_path / "run", resume=True, **options)
        assert equal(bayes.sample(2, seed=0), resumed.sample(2, seed=0))

        again = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", tiny_network(), guide=ALL_GUIDES[name])
        assert equal(bayes.sample(2, seed=0), again.sample(2, seed=0))
        np.testing.assert_array_equal(
            bayes.predict(data, num_samples=3).sample_probs, again.predict(data, num_samples=3).sample_probs
        )
        spread = to_arviz(bayes, data, num_samples=5)["posterior"]["noise_scale"].values
        assert spread.shape == (1, 5, 2)
        assert (spread > 0).all()

    def test_noise_variance_is_that_of_the_draws(self, name):
        bayes = bayes_with(name)
        move(bayes.guide)
        logs = posterior_logs(bayes)
        if name == "own":  # no formula, so no logs
            assert logs == {}
            return
        assert "posterior/noise_to_signal_mean" in logs
        measured = bayes.posterior_draws(num_samples=150).noise_scale ** 2  # (draws, adapters)
        expected = torch.cat([bayes.guide.noise_variance(group) for group in bayes.model.groups]).detach().numpy()
        error = measured.std(0) / math.sqrt(len(measured))
        assert (np.abs(measured.mean(0) - expected) < 5 * error).all()


@pytest.mark.parametrize("name", ["mean_field", "amortized"])
def test_registered_kl_of_the_mixtures_columns_is_the_conditional_one(name):
    """½(tr Σ − log|Σ| − r) of every column, given Σ."""
    model, guide = make(name)
    nodes = Recorder()
    values = guide.run(nodes)
    factor = values["sigma_tril_r2_in16"][:, 0]
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    expected = (factor.square().sum((-2, -1)) - 2) / 2 - log_det
    kl = kl_divergence(nodes.nodes["A_r2_in16"]["fn"], prior_nodes(model, values)["A_r2_in16"]["fn"])
    torch.testing.assert_close(kl, expected.unsqueeze(-1).expand(kl.shape), rtol=1e-3, atol=1e-3)


class TestGaussianGuide:
    def test_is_registered_under_its_name(self):
        bayes = BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2, guide="gaussian"))
        assert type(bayes.guide) is GaussianGuide

    def test_one_standard_deviation_an_entry(self):
        model, guide = make("gaussian")
        numbers = sum(a.lora_A.weight.numel() for group in model.groups for a in group.adapters)
        assert sum(p.numel() for p in guide.parameters()) == numbers

    @pytest.mark.parametrize("mixture", ["dense", "sparse"])
    def test_kl_given_the_weights_is_the_gaussians(self, mixture):
        """½ Σ_j (s²/(ε²c) − log s²/(ε²c) − 1) against torch's KL between the two normal distributions."""
        model, guide = make("gaussian", mixture=mixture)
        move(guide)
        recorder = Recorder()
        prior = prior_nodes(model, guide.run(recorder))["A_r2_in16"]["fn"]
        node = recorder.nodes["A_r2_in16"]
        variance = prior.scale_tril.square().sum(-1)[:, None]  # (adapters, 1, r)
        normal = torch.distributions.Normal(prior.loc, variance.sqrt())
        expected = kl_divergence(node["fn"].base_dist, normal).sum(-1)
        torch.testing.assert_close(node["infer"]["expected_kl"], expected, rtol=1e-4, atol=1e-5)

    def test_mixture_and_covariance_cost_nothing(self):
        model, guide = make("gaussian")
        elbo = CooperativeELBO(1.0, 0.0, "elbo")
        elbo.loss(model, guide, **tiny_batch())
        for name, kl in elbo.parts.kl.items():
            assert (float(kl) == pytest.approx(0, abs=1e-6)) == name.startswith(("pi_", "sigma_tril_"))

    def test_explicit_components_are_refused(self):
        with pytest.raises(InputError, match="components='collapsed'"):
            make("gaussian", "explicit")

    def test_each_standard_deviation_is_its_own(self):
        """It finds the mean-field optimum, 1/s² = 1/ε² + Σx²(sB)²/σ²; data on one column leave the others alone."""
        problem = low_rank_regression(50, columns=3, rank=2, noise=3.0, num_components=1)
        problem.features[:, 1:] = 0
        precision = 1 + problem.design(problem.features).square().sum((0, 1)).view(3, 2) / 3.0**2
        guide = GaussianGuide(problem.model)
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=200)
        elbo = CooperativeELBO(1.0, 0.0, "elbo")
        with pyro.validation_enabled(False):
            for _ in range(200):
                optimizer.zero_grad()
                elbo.differentiable_loss(problem.model.joint, guide.forward, **problem.batch).backward()
                optimizer.step()
                schedule.step()
        found = guide.log_scale(problem.group).detach()[0].exp()
        torch.testing.assert_close(found, precision.rsqrt().float(), rtol=0.15, atol=0.0)
        assert precision[0].min() > 4  # on the first column the data have a say
        torch.testing.assert_close(found[1:], torch.ones(2, 2), rtol=1e-3, atol=1e-3)


class ScaledByTheMean(Guide):
    """s = |μ|/2 for every entry: what a guide sees of μ decides its draws."""

    symmetric_rows = True

    def sample_group(self, group, program):
        mean = self.model.mean(group)
        adapters, columns = self.plates(group, program)
        with adapters:
            sites = self.sample_priors(group, program)
            with columns:
                normal = pyro.distributions.Normal(mean, mean.abs() / 2 + 1e-6).to_event(1)
                return sites | {f"A_{group.name}": program.sample(f"A_{group.name}", normal)}


class TestTheMeanOfAGuide:
    """``model.mean(group)`` is μ whenever a guide asks, in training too."""

    @pytest.mark.parametrize("noise", ["per_example", "shared"])
    def test_a_law_that_depends_on_mu_is_the_same_in_training(self, noise, monkeypatch):
        options = {"r": 2, "noise": noise, "target_modules": ["query"]}
        bayes = randomize_b(BayesLoRA(tiny_network(), MonteCLoRAConfig(**options), guide=ScaledByTheMean)).train()
        seen = []
        observe = bayes.model.observe

        def look(**batch):
            draws = [adapter.lora_A.draw for group in bayes.model.groups for adapter in group.adapters]
            seen.append([(draw.weight.detach(), draw.signs) for draw in draws])
            return observe(**batch)

        monkeypatch.setattr(bayes.model, "observe", look)
        torch.manual_seed(4)
        bayes(**tiny_batch()).loss.backward()
        torch.manual_seed(4)
        expected = bayes.model.matrices(bayes.guide.run(pyro))
        for group in bayes.model.groups:
            for adapter, columns, (weight, signs) in zip(group.adapters, expected[group.name], seen[0], strict=True):
                drawn = weight if signs is None else weight[:2] + weight[2:]
                torch.testing.assert_close(drawn, columns.mT.detach(), rtol=1e-5, atol=1e-7)
                assert (drawn - adapter.lora_A.weight).abs().mean() > 0.1 * adapter.lora_A.weight.abs().mean()

    def test_only_a_program_with_the_argument_is_given_a_mean(self):
        class Former(MixtureGuide):
            def sample_group(self, group, program):
                return super().sample_group(group, program)

        class FormerRun(GaussianGuide):
            def run(self, program):
                return super().run(program)

        assert not any(guide.takes_mean for guide in (Guide, ScaledByTheMean, Former, FormerRun))
        assert all(guide.takes_mean for guide in GUIDES.values())


class TestPyrosOwnGuides:
    """On the yardstick, where they are the usual way to approximate a posterior."""

    @pytest.mark.parametrize("auto", [AutoNormal, AutoLowRankMultivariateNormal, AutoDelta])
    def test_contract(self, auto):
        problem = low_rank_regression(12)
        guide = auto(problem.model)
        values = guide(**problem.batch)
        prior = prior_nodes(problem.model, values)
        assert set(prior) == set(values)
        for site, node in prior.items():
            assert values[site].shape == node["fn"].shape()
            assert node["fn"].support.check(values[site]).all()
        elbo = CooperativeELBO(1.0, 0.0, "elbo")
        elbo.differentiable_loss(problem.model.joint, guide.forward, **problem.batch).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in guide.parameters())
        assert any(p.grad.abs().max() > 0 for p in guide.parameters())
        twin = auto(problem.model)
        twin(**problem.batch)
        twin.load_state_dict(guide.state_dict())
        pyro.set_rng_seed(1)
        first = guide.forward(**problem.batch)
        pyro.set_rng_seed(1)
        assert equal(first, twin.forward(**problem.batch))

    @pytest.mark.parametrize("auto", [AutoNormal, AutoLowRankMultivariateNormal])
    def test_elbo_is_pyros(self, auto):
        problem = low_rank_regression(12)
        guide = auto(problem.model, init_scale=0.1)
        ours, theirs = [], []
        for values, elbo, scale in ((ours, CooperativeELBO(1.0, 0.0, "elbo"), 12), (theirs, Trace_ELBO(), 1)):
            values += [elbo.loss(problem.model, guide, **problem.batch) * scale for _ in range(150)]
        ours, theirs = torch.tensor(ours), torch.tensor(theirs)
        error = ((ours.var() + theirs.var()) / len(ours)).sqrt()
        assert (ours.mean() - theirs.mean()).abs() < 5 * error

    def test_bayeslora_trains_and_predicts_with_one(self):
        problem = low_rank_regression(12)
        bayes = BayesLoRA(problem.network, problem.model.config, guide=AutoNormal, likelihood=problem.model.likelihood)
        bayes.num_examples = 12
        bayes.train()(**problem.batch).loss.backward()
        prediction = bayes.predict(problem.dataset, num_samples=4)
        assert prediction.mean.shape == (12,)
        assert prediction.std.min() > problem.noise


def test_a_guide_without_a_program_says_what_is_missing():
    model = small_model()
    with pytest.raises(NotImplementedError, match=r"must define sample_group\(group, program\)"):
        Guide(model)()
    with pytest.raises(NotImplementedError, match=r"must define variational_parameters\(group\)"):
        MixtureGuide(model)()


@pytest.mark.parametrize("normalization", ["paper", "elbo"])
def test_a_joint_site_weighs_as_much_as_an_independent_one(normalization):
    """The same density at the same draw, once with the columns in plates and once in the event: the same KL."""
    model, plain = make("gaussian", normalization=normalization)
    model.num_examples = 10
    observed = trace(model.observe, **tiny_batch()).nodes
    joint = ALL_GUIDES["own"](model)
    with torch.no_grad():
        for group in model.groups:
            getattr(joint, f"factor_{group.name}").zero_()
            shift = torch.randn_like(plain.log_scale(group))
            plain.log_scale(group).copy_(shift)
            getattr(joint, f"log_scale_{group.name}").copy_(shift.flatten(1))
    elbo = CooperativeELBO(1.0, 0.0, normalization, exact=False)
    values = draw(plain)
    kls = []
    for guide in (plain, joint):
        recorder = Recorder(values)
        guide.run(recorder)
        score = elbo.score({**prior_nodes(model, values), **observed}, recorder.nodes)
        kls.append(torch.stack([score.parts.kl[name] for name in values]))
    torch.testing.assert_close(*kls)
