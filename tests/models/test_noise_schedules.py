"""Schedules of ε: closed forms, the same ε in prior and posterior, and runs that go on exactly."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.config import NOISE_SCHEDULES
from bayeslora.data.batches import Collator
from bayeslora.guides import GaussianGuide
from bayeslora.models import ChoiceLikelihood, Likelihood, NextTokenLikelihood
from bayeslora.noise_schedules import SCHEDULES, NoiseScheduleCallback
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.language import tiny_language_model
from tests.runs import At, equal, interrupt, new, run, state

CHANGING = [name for name in NOISE_SCHEDULES if name != "constant"]


def module(schedule, **options):
    options = {"r": 2, "num_components": 3, "sample_scaler": 0.5} | options
    bayes = BayesLoRA(tiny_network(), MonteCLoRAConfig(noise_schedule=schedule, **options))
    for name, parameter in bayes.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return bayes


def spread(bayes, **options):
    return torch.as_tensor(bayes.posterior_draws(num_samples=4, seed=1, **options).noise_scale)


def test_each_name_has_a_schedule():
    assert set(SCHEDULES) == set(NOISE_SCHEDULES)


def test_a_constant_one_adds_nothing():
    assert not [name for name in module("constant").state_dict() if "noise_factor" in name]


@pytest.mark.parametrize(
    "options",
    [
        {"guide": "amortized"},
        {"guide": "mean_field"},
        {"guide": "gaussian"},
        {"components": "explicit"},
        {"mixture": "sparse"},
    ],
    ids=str,
)
def test_factors_multiply_every_adapters_noise(options):
    bayes = module("per_layer", **options)
    before, logged = spread(bayes), logged_variance(bayes)
    factors = torch.linspace(0.25, 2.0, len(bayes.adapter_names))
    bayes.noise_schedule.set(factors)
    assert torch.equal(bayes.noise_schedule.get(), factors)
    torch.testing.assert_close(spread(bayes), before * factors)
    torch.testing.assert_close(logged_variance(bayes), logged * factors**2)
    torch.testing.assert_close(prior_spread(bayes), prior_spread(bayes, torch.ones(())) * factors)


def test_epsilon_has_its_former_name_too():
    """Guides are written by others."""
    bayes = module("per_layer")
    bayes.noise_schedule.set(0.5)
    for group in bayes.model.groups:
        assert torch.equal(bayes.model.sample_scaler(group), torch.full((len(group),), 0.25))
        assert torch.equal(bayes.model.noise_scale(group), bayes.model.sample_scaler(group))


def logged_variance(bayes):
    """Of every adapter."""
    return torch.cat([bayes.guide.noise_variance(group) for group in bayes.model.groups])


def prior_spread(bayes, factors=None):
    before = bayes.noise_schedule.get()
    bayes.noise_schedule.set(before if factors is None else factors)
    found = torch.as_tensor(bayes.prior_draws(num_samples=4, seed=1).noise_scale)
    bayes.noise_schedule.set(before)
    return found


@pytest.mark.parametrize("guide", ["mean_field", "gaussian"])
def test_the_kl_does_not_depend_on_it(guide):
    """In closed form, and where it is estimated at the draw from the two densities."""
    bayes = module("per_layer", guide=guide, noise="shared").train()
    found = []
    for factors in (1.0, torch.linspace(0.25, 2.0, len(bayes.adapter_names))):
        for exact in (True, False):
            bayes.elbo.exact = exact
            bayes.noise_schedule.set(factors)
            torch.manual_seed(3)
            bayes(**tiny_batch())
            found.append(bayes.elbo.parts.to_floats()["kl"])
    assert found[2:] == pytest.approx(found[:2], rel=1e-5)


def test_pyro_runs_the_same_program():
    bayes = module("per_layer", noise="shared").train()
    bayes.network.eval()  # all randomness is the noise
    bayes.noise_schedule.set(torch.linspace(0.25, 2.0, len(bayes.adapter_names)))
    torch.manual_seed(5)
    direct = bayes(**tiny_batch()).loss
    torch.manual_seed(5)
    under_pyro = bayes.elbo.differentiable_loss(bayes.model.joint, bayes.guide.forward, **tiny_batch())
    torch.testing.assert_close(direct, under_pyro, rtol=1e-6, atol=0)


def test_cosine_rises_over_the_first_half():
    schedule = module("cosine").noise_schedule
    expected = {0.0: 1e-3, 0.125: (1 - math.sqrt(0.5)) / 2, 0.25: 0.5, 0.5: 1.0, 0.9: 1.0}
    for progress, factor in expected.items():
        schedule.begin_step(progress)
        assert schedule.get().tolist() == pytest.approx([factor] * len(schedule.get()))


def test_entropy_follows_certainty():
    schedule = module("entropy").noise_schedule
    assert schedule.get().tolist() == pytest.approx([1e-3] * len(schedule.get()))
    probs = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    certainty = 1 - (-(probs * probs.log()).sum() / 2 / math.log(2)).item()
    schedule.see_logits(probs.log() + 7)
    assert schedule.get()[0] == pytest.approx(0.95 * 1e-3 + 0.05 * certainty)
    for _ in range(400):
        schedule.see_logits(torch.tensor([[80.0, -80.0]]))
    assert schedule.get().min() == pytest.approx(1.0)
    for _ in range(400):
        schedule.see_logits(torch.zeros(3, 2))
    assert schedule.get().max() == pytest.approx(1e-3, rel=1e-4)


def along_an_s(share):
    return share**2 * (3 - 2 * share)


class TestLearned:
    """s²(3 − 2s), s = 1 − U/U₀."""

    def factor(self, bayes):
        return float(bayes.noise_schedule.get().max())

    def see(self, bayes, *losses):
        for loss in losses:
            bayes.noise_schedule.see_loss(torch.tensor(loss))

    def test_in_closed_form(self):
        bayes = module("learned")
        assert self.factor(bayes) == pytest.approx(1e-3)
        start = [2.0, 1.0, 1.5, 0.5, 2.5, 1.0, 2.0, 1.5, 1.0, 1.0]
        for loss in start:
            self.see(bayes, loss)
            assert bayes.noise_schedule.get().tolist() == pytest.approx([1e-3] * len(bayes.adapter_names))
        assert bayes.model.losses.tolist() == pytest.approx([10, 1.4, 1.4])
        self.see(bayes, 0.4, 0.2)
        running = 0.95 * (0.95 * 1.4 + 0.05 * 0.4) + 0.05 * 0.2
        assert self.factor(bayes) == pytest.approx(along_an_s(1 - running / 1.4))
        self.see(bayes, *[0.35] * 400)
        assert self.factor(bayes) == pytest.approx(along_an_s(0.75), rel=1e-4)
        self.see(bayes, *[0.0] * 800)
        assert 0.999 < self.factor(bayes) <= 1
        self.see(bayes, *[5.0] * 400)  # worse than at first
        assert self.factor(bayes) == pytest.approx(1e-3)

    def test_it_stays_between_none_and_all(self):
        for start, later in [(0.0, 0.0), (0.0, 1.0), (1e-30, 1e30), (1.0, -5.0), (1e30, 0.0)]:
            bayes = module("learned")
            self.see(bayes, *[start] * 10)
            assert self.factor(bayes) == pytest.approx(1e-3)
            for _ in range(50):
                self.see(bayes, later)
                assert 1e-3 * (1 - 1e-6) <= self.factor(bayes) <= 1

    @pytest.mark.parametrize("at", [0, 5, 11])
    def test_a_loss_that_is_no_number_is_passed_over(self, at):
        bayes, other = module("learned"), module("learned")
        losses = torch.linspace(2, 1, 30).tolist()
        self.see(bayes, *losses)
        for bad in (math.nan, math.inf):
            losses.insert(at, bad)
        self.see(other, *losses)
        assert torch.equal(other.model.losses, bayes.model.losses)
        assert self.factor(other) == self.factor(bayes) > 0.01

    @pytest.mark.parametrize("kind", ["classes", "numbers", "choices", "texts", "summed texts"])
    def test_of_every_kind_of_task(self, kind):
        """U is 1 − exp(−L) of what the batch's loss was, of texts a token's; of numbers the squared error."""
        bayes, batch = self.learner(kind)
        optimizer, seen = torch.optim.AdamW(bayes.parameters(), lr=1e-2), []
        for _ in range(12):
            output = bayes(**batch)
            error = (output.logits.squeeze(-1) - batch["labels"]).square().mean() if kind == "numbers" else None
            loss = float(bayes.elbo.parts.task) / (4 if kind == "summed texts" else 1)  # four tokens a text
            seen.append(1 - math.exp(-loss) if error is None else float(error))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        first = sum(seen[:10]) / 10
        running = first
        for loss in seen[10:]:
            running += 0.05 * (loss - running)
        assert bayes.model.losses.tolist() == pytest.approx([10, first, running], rel=1e-5)
        assert running < 0.99 * first

    @staticmethod
    def learner(kind):
        config = MonteCLoRAConfig(r=2, num_components=3, noise_schedule="learned", noise="shared", num_particles=2)
        if kind in ("classes", "numbers"):
            numbers = kind == "numbers"
            batch = tiny_batch()
            if numbers:
                batch["labels"] = torch.linspace(-1, 2, 6)
            return BayesLoRA(tiny_network(num_labels=1 if numbers else 2), config).train(), batch
        tokens = torch.randint(3, 60, (3, 2, 5) if kind == "choices" else (3, 5))
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        if kind == "choices":
            answer = torch.tensor([0, 0, 0, 1, 1]).expand(3, 2, 5)
            batch |= {"answer_mask": answer, "labels": torch.tensor([0, 1, 1])}
        likelihoods = {"choices": ChoiceLikelihood("AB"), "summed texts": NextTokenLikelihood("sum")}
        likelihood = likelihoods.get(kind)
        return BayesLoRA(tiny_language_model("llama", layers=1), config, likelihood=likelihood).train(), batch

    @pytest.mark.parametrize("accumulated", [1, 3])
    def test_in_a_stock_trainer(self, accumulated, tmp_path):
        """Batches count, whether a step has one or several."""
        bayes = new(noise_schedule="learned", sample_scaler=1e-3)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulated,
            num_train_epochs=12,
            learning_rate=2e-2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = NoiseScheduleCallback(bayes.noise_schedule)
        trainer = Trainer(bayes, arguments, Collator(), tiny_dataset(24), callbacks=[callback])
        assert trainer.train().global_step == 72 // accumulated
        seen, first, running = bayes.model.losses.tolist()
        assert seen == 10
        assert 0.4 < first < 1.0
        assert running < first
        assert self.factor(bayes) == pytest.approx(along_an_s(1 - running / first), rel=1e-3)
        assert self.factor(bayes) > 1.1e-3

    def test_others_do_not_look_at_the_loss(self, monkeypatch):
        """A likelihood of one's own need not say how far from learned a batch is."""
        monkeypatch.delattr(Likelihood, "unlearned")
        for schedule in set(NOISE_SCHEDULES) - {"learned"}:
            assert module(schedule).train()(**tiny_batch()).loss.isfinite()


def test_per_layer_is_the_fisher_informations():
    """Gradients of a constant size each: the factors become their inverses over the geometric mean."""
    bayes = module("per_layer")
    weights = [adapter.lora_A.weight for group in bayes.model.groups for adapter in group.adapters]
    sizes = torch.linspace(0.5, 2.0, len(weights))
    bayes.noise_schedule.see_gradients()  # there are none
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    bayes.noise_schedule.see_gradients()  # B is zero
    assert torch.equal(bayes.noise_schedule.get(), torch.ones(len(weights)))
    for weight, size in zip(weights, sizes, strict=True):
        weight.grad = size * torch.randn_like(weight).sign()
    expected = (sizes.log().mean() - sizes.log()).exp()
    bayes.noise_schedule.see_gradients()
    torch.testing.assert_close(bayes.noise_schedule.get(), expected**0.05)
    for _ in range(400):
        bayes.noise_schedule.see_gradients()
    torch.testing.assert_close(bayes.noise_schedule.get(), expected, rtol=1e-4, atol=0)


class TestFit:
    @pytest.mark.parametrize("schedule", CHANGING)
    def test_it_moves_and_is_saved(self, schedule, tmp_path):
        bayes = new(noise_schedule=schedule)
        for name, parameter in bayes.network.named_parameters():
            if "classifier" in name and "lora" not in name:
                parameter.data.mul_(50.0)  # a head that is sure of something
        run(tmp_path / "run", bayes, epochs=8 if schedule == "learned" else 2)
        factors = bayes.noise_schedule.get()
        start = new(noise_schedule=schedule).noise_schedule.get()
        assert torch.equal(factors, start) == (schedule == "cosine")  # which ends at 1
        again = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", tiny_network(layers=1))
        assert torch.equal(again.noise_schedule.get(), factors)
        assert torch.equal(spread(again), spread(bayes))

    @pytest.mark.parametrize("schedule", CHANGING)
    def test_resumed_it_is_the_run_that_never_stopped(self, schedule, tmp_path):
        options = {"epochs": 2, "evaluations": 4, "evaluate": tiny_dataset(8, seed=1)}
        whole = new(noise_schedule=schedule)
        run(tmp_path / "whole", whole, **options)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", new(noise_schedule=schedule), callbacks=[At(8, interrupt)], **options)
        resumed = new(5, noise_schedule=schedule)
        run(tmp_path / "cut", resumed, resume=True, **options)
        assert equal(state(resumed), state(whole))


def test_cosine_starts_nearly_as_plain_lora():
    for schedule in ("constant", "cosine"):
        bayes = module(schedule).train()
        bayes.network.eval()
        bayes.noise_schedule.begin_step(0.0)
        with bayes.without_sampling():
            mean = bayes(**tiny_batch()).logits
        away = (bayes(**tiny_batch()).logits - mean).norm() / mean.norm()
        assert (away < 1e-2) == (schedule == "cosine")


class TestRefused:
    def test_unknown(self):
        with pytest.raises(InputError, match="noise_schedule must be one of constant, cosine"):
            MonteCLoRAConfig(noise_schedule="linear")

    def test_guides_that_do_not_follow(self):
        from pyro.infer.autoguide import AutoNormal

        class Fixed(GaussianGuide):
            follows_noise_schedule = False

        for guide in (AutoNormal, Fixed):
            with pytest.raises(InputError, match=f"a {guide.__name__} does not follow"):
                BayesLoRA(tiny_network(), MonteCLoRAConfig(noise_schedule="cosine"), guide=guide)

    def test_entropy_of_a_regression(self):
        with pytest.raises(InputError, match="this network has none"):
            BayesLoRA(tiny_network(num_labels=1), MonteCLoRAConfig(noise_schedule="entropy"))

    @pytest.mark.parametrize("schedule", ["learned", "per_layer"])
    def test_what_a_frozen_mean_does_not_have(self, schedule):
        with pytest.raises(InputError, match=f"noise_schedule='{schedule}' .* mode='post_hoc'"):
            BayesLoRA(tiny_network(), MonteCLoRAConfig(noise_schedule=schedule, mode="post_hoc"))
