"""A tuned width: never worse than the mean on the tuning set, in whatever draws, and gone when it is taken back."""

import json
import math

import numpy as np
import pytest
import torch
import transformers

from bayeslora import BayesLoRA, BayesTrainer, CooperativeELBO, InputError, MonteCLoRAConfig, diagnose
from bayeslora.analysis import to_arviz
from bayeslora.guides import MeanFieldGuide
from bayeslora.inference import tuning
from bayeslora.inference.attribution import attribute_variance
from bayeslora.inference.diagnostics import log_importance_weights
from bayeslora.inference.generation import token_uncertainty
from bayeslora.inference.mcmc import run_nuts
from bayeslora.inference.predict import predict
from bayeslora.inference.tuning import BISECTIONS, Widths
from bayeslora.models import ChoiceLikelihood, Tuning
from bayeslora.storage.manifest import _is_tuning
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.language import questions, tiny_language_model
from tests.modules import module, randomize_b

DATA = tiny_dataset(24, rule="random")
QUICK = {"num_samples": 4, "progress": False}


def noisy(**options):
    return randomize_b(module(**{"sample_scaler": 0.3} | options)).eval()


def numbers(seed=0):
    bayes = noisy(seed=seed, network_options={"num_labels": 1})
    labels = np.random.default_rng(seed).normal(size=len(DATA)).round(3).tolist()
    return bayes, [example | {"labels": label} for example, label in zip(DATA, labels, strict=True)]


def written(likelihood=None, seed=0):
    torch.manual_seed(seed)
    config = MonteCLoRAConfig(r=2, sample_scaler=0.3, target_modules=["q_proj", "down_proj"])
    return randomize_b(BayesLoRA(tiny_language_model(), config, likelihood=likelihood)).eval()


def texts():
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in DATA]


KINDS = {
    "classes": lambda: (noisy(), DATA),
    "numbers": numbers,
    "texts": lambda: (written(), texts()),
    "choices": lambda: (written(ChoiceLikelihood(tuple("abcd"))), questions() * 7),
}


class TestNegativeLogLikelihood:
    @pytest.mark.parametrize("with_temperature", [False, True])
    @pytest.mark.parametrize("seed", range(8))
    def test_is_no_higher_than_without(self, seed, with_temperature):
        bayes, data = noisy(seed=seed), tiny_dataset(24, rule="random", seed=seed)
        before = [bayes.predict(data, num_samples=n, seed=seed, progress=False).nll for n in (0, 4)]
        tuning = bayes.tune(data, seed=seed, with_temperature=with_temperature, **QUICK)
        after = bayes.predict(data, seed=seed, **QUICK).nll
        assert after == pytest.approx(tuning.nll, rel=1e-6)
        assert after <= min(before) * (1 + 1e-6)
        if not with_temperature:
            assert (tuning.nll_at_mean, tuning.nll_untuned) == tuple(before)
        assert (tuning.examples, tuning.num_samples) == (24, 4)

    @pytest.mark.parametrize("with_temperature", [False, True])
    @pytest.mark.parametrize("kind", ["classes", "choices"])
    def test_conformal_sets_hold_as_many_of_the_tuning_labels_as_they_promise(self, kind, with_temperature):
        """k of the n, and no more: the threshold is the probability of one of them."""
        bayes, data = KINDS[kind]()
        tuning = bayes.tune(data, with_temperature=with_temperature, **QUICK)
        predicted = bayes.predict(data, **QUICK)
        of_labels = predicted.probs[np.arange(len(data)), predicted.labels.astype(int)]
        for coverage, threshold in tuning.conformal.items():
            k = math.ceil(round((len(data) + 1) * float(coverage), 9))
            held = int((of_labels >= threshold - 1e-6).sum())
            assert threshold == 0 if k > len(data) else k <= held <= k + (np.isclose(of_labels, threshold).sum() - 1)

    def test_what_has_no_labelled_classes_has_no_sets(self):
        for kind in ("numbers", "texts"):
            bayes, data = KINDS[kind]()
            assert bayes.tune(data, **QUICK).conformal is None
        bayes, data = KINDS["classes"]()
        assert bayes.tune(data, agreement=0.9, **QUICK).conformal is None

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_every_kind(self, kind):
        bayes, data = KINDS[kind]()
        before = [bayes.predict(data, num_samples=n, progress=False).nll for n in (0, 4)]
        tuning = bayes.tune(data, **QUICK)
        assert bayes.predict(data, **QUICK).nll == pytest.approx(tuning.nll, rel=1e-6)
        assert tuning.nll <= min(before)
        assert before[0] != before[1]

    def test_temperature_alone_is_found(self):
        """Without effect of the noise, what is left is a temperature: that of the mean's logits."""
        bayes = noisy()
        with torch.no_grad():
            for name, parameter in bayes.network.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
                if "modules_to_save" in name and parameter.dim() == 2:
                    parameter.mul_(30)
        tuning = bayes.tune(DATA, with_temperature=True, **QUICK)
        mean = bayes.predict(DATA, num_samples=0, progress=False)
        bayes.tuning = None
        logits = bayes.predict(DATA, num_samples=0, progress=False).sample_log_probs[0]
        by_hand = torch.tensor(logits / tuning.temperature).log_softmax(-1).numpy()
        np.testing.assert_allclose(mean.sample_log_probs[0], by_hand, atol=1e-5)
        assert tuning.temperature != 1
        assert tuning.nll == pytest.approx(mean.nll, rel=1e-5)
        for factor in (0.9, 1.1):
            other = torch.tensor(logits / (tuning.temperature * factor)).log_softmax(-1)
            assert tuning.nll < -other[range(24), mean.labels].mean()

    def test_options_that_are_not_there_stay_impossible(self):
        bayes, data = KINDS["choices"]()
        bayes.tuning = Tuning(width=1.0, temperature=10.0)
        assert (bayes.predict(data[1:2] + data[:1], **QUICK).probs[0, 2:] == 0).all()


class TestAgreement:
    """Without labels: the widest noise that leaves the answers alone."""

    @pytest.mark.parametrize("kind", ["classes", "choices"])
    @pytest.mark.parametrize("least", [0.6, 0.9, 1.0])
    def test_holds_and_is_kept(self, kind, least):
        bayes, data = KINDS[kind]()
        unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in data]
        tuning = bayes.tune(unlabelled, agreement=least, **QUICK)
        tuned, mean = (bayes.predict(data, num_samples=n, progress=False).probs.argmax(-1) for n in (4, 0))
        assert (tuned == mean).mean() == tuning.agreement >= least
        assert tuning.nll is None
        assert bayes.tuning == tuning

    def test_a_wider_step_does_not_hold(self):
        bayes = noisy()
        width = bayes.tune(DATA, agreement=0.9, **QUICK).width
        mean = bayes.predict(DATA, num_samples=0, progress=False).probs.argmax(-1)
        bayes.tuning = Tuning(width + max(width, 1) / 2**BISECTIONS)
        assert (bayes.predict(DATA, num_samples=4, progress=False).probs.argmax(-1) == mean).mean() < 0.9

    @pytest.mark.parametrize("bad", [0, 1.1, -0.5, True, "all", float("nan")])
    def test_a_share_is_a_share(self, bad):
        with pytest.raises(InputError, match="agreement is a share"):
            noisy().tune(DATA, agreement=bad, **QUICK)

    @pytest.mark.parametrize("kind", ["numbers", "texts"])
    def test_between_answers(self, kind):
        bayes, data = KINDS[kind]()
        with pytest.raises(InputError, match="agreement is between answers"):
            bayes.tune(data, agreement=0.9, **QUICK)

    def test_a_temperature_needs_labels(self):
        with pytest.raises(InputError, match="a temperature needs labels"):
            noisy().tune(DATA, agreement=0.9, with_temperature=True, **QUICK)

    def test_comes_back_from_disk(self, tmp_path):
        bayes = noisy()
        tuning = bayes.tune(DATA, agreement=0.9, **QUICK)
        bayes.save_pretrained(tmp_path / "adapter")
        assert BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network()).tuning == tuning
        manifest = json.loads((tmp_path / "adapter" / "bayeslora.json").read_text())
        del manifest["tuning"]["agreement"]  # as before there was one
        assert _is_tuning(manifest["tuning"])


class TestSharedPredictions:
    """Several searches of one posterior: what each finds alone, from fewer predictions."""

    SEARCHES = ({"agreement": 0.9}, {}, {"with_temperature": True})

    @pytest.fixture
    def predicted(self, monkeypatch):
        """The widths that are predicted, in order."""
        widths = []

        def counting(bayes, *args, **options):
            widths.append(bayes.model.tuning.width)
            return predict(bayes, *args, **options)

        monkeypatch.setattr(tuning, "predict", counting)
        return widths

    @pytest.mark.parametrize("kind", ["classes", "choices"])
    @pytest.mark.parametrize("antithetic", [False, True])
    def test_the_same_is_found_bit_for_bit(self, kind, antithetic, predicted):
        bayes, data = KINDS[kind]()
        alone = [bayes.tune(data, antithetic=antithetic, **options, **QUICK) for options in self.SEARCHES]
        apart = len(predicted)
        bayes.tuning, predicted[:] = None, []
        widths = Widths(bayes, data, num_samples=4, antithetic=antithetic, temperatures=True)
        assert [widths.choose(**options, progress=False) for options in self.SEARCHES] == alone
        assert len(set(predicted)) == len(predicted) < apart
        assert bayes.tuning is None

    def test_no_draws_are_held(self):
        """Of a width there is an answer for each example, and two or three numbers."""
        widths = Widths(noisy(), DATA, num_samples=4, temperatures=True)
        widths.choose(with_temperature=True, progress=False)
        for tried in widths._tried.values():
            assert tried.answers.shape == (len(DATA),)
            assert all(np.ndim(number) == 0 for number in (tried.nll, *tried.tempered))

    def test_a_temperature_is_asked_for_at_the_start(self):
        with pytest.raises(InputError, match="temperatures=True"):
            Widths(noisy(), DATA).choose(with_temperature=True)


class TestWhateverDraws:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"guide": "mean_field"},
            {"guide": "gaussian"},
            {"components": "explicit"},
            {"mixture": "sparse"},
            {"noise_units": "relative"},
            {"noise_schedule": "entropy"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("width", [0.0, 0.5, 3.0])
    def test_same_draws_at_every_width(self, options, width):
        bayes = noisy(**options)
        names = bayes.adapter_names
        before = bayes.posterior_draws(num_samples=2, adapters=names)
        prior = bayes.prior_draws(num_samples=2)
        bayes.tuning = Tuning(width=width)
        after = bayes.posterior_draws(num_samples=2, adapters=names)
        for group in bayes.model.groups:
            for adapter, mean in zip(group.adapters, group.mean(), strict=True):
                mean = mean.mT.detach().numpy()
                expected = width * (before.A[adapter.name] - mean)
                np.testing.assert_allclose(after.A[adapter.name] - mean, expected, atol=2e-6)
        np.testing.assert_allclose(after.noise_scale, width * before.noise_scale, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(
            bayes.prior_draws(num_samples=2).noise_scale, width * prior.noise_scale, rtol=1e-4, atol=1e-7
        )
        np.testing.assert_array_equal(after.mixture_weights, before.mixture_weights)

    def test_predictions_are_those_of_a_noise_factor(self):
        """Which multiplies on top."""
        bayes = noisy()
        half, quarter = (bayes.predict(DATA, noise_factor=f, **QUICK).sample_probs for f in (0.5, 0.25))
        bayes.tuning = Tuning(width=0.5)
        np.testing.assert_allclose(bayes.predict(DATA, **QUICK).sample_probs, half, atol=1e-6)
        np.testing.assert_allclose(bayes.predict(DATA, noise_factor=0.5, **QUICK).sample_probs, quarter, atol=1e-6)

    def test_networks_of_draws(self, tmp_path):
        bayes, tokens = noisy(), {"input_ids": tiny_batch()["input_ids"]}
        rows = [{"input_ids": row.tolist()} for row in tokens["input_ids"]]
        untuned = bayes.merge(draw=1).eval()(**tokens).logits
        bayes.tuning = Tuning(width=0.4, temperature=2.0)
        merged = bayes.merge(draw=1).eval()
        with torch.no_grad(), bayes.as_draw(1) as network:
            logits, of_merged = network(**tokens).logits, merged(**tokens).logits
        assert not torch.allclose(untuned, of_merged, atol=1e-4)
        torch.testing.assert_close(of_merged, logits, atol=1e-5, rtol=0)
        found = bayes.predict(rows, num_samples=2, progress=False).sample_probs[1]
        np.testing.assert_allclose(found, (logits / 2).softmax(-1), atol=1e-5)  # they leave the temperature to others
        folders = bayes.export_draws(tmp_path / "draws", 2)
        assert json.loads((tmp_path / "draws" / "draws.json").read_text())["temperature"] == 2.0
        from peft import PeftModel

        exported = PeftModel.from_pretrained(tiny_network(), folders[1]).eval()
        with torch.no_grad():
            torch.testing.assert_close(exported(**tokens).logits, logits, atol=1e-5, rtol=0)

    def test_at_width_0_everything_is_the_mean(self, tmp_path):
        bayes = noisy()
        mean = bayes.predict(DATA, num_samples=0, progress=False).probs
        bayes.tuning = Tuning(width=0.0)
        np.testing.assert_array_equal(bayes.predict(DATA, **QUICK).sample_probs, np.stack([mean] * 4))
        assert (bayes.posterior_draws(num_samples=3).noise_scale == 0).all()
        for refused in (lambda: bayes.export_draws(tmp_path / "draws", 2), lambda: attribute_variance(bayes, DATA)):
            with pytest.raises(InputError, match="every draw is the mean"):
                refused()
        assert not (tmp_path / "draws").exists()

    @pytest.mark.parametrize("width", [0.0, 0.5])
    def test_arviz(self, width):
        bayes = noisy()
        before = to_arviz(bayes, DATA, num_samples=3)
        bayes.tuning = Tuning(width=width, temperature=2.0)
        after = to_arviz(bayes, DATA, num_samples=3)
        for group in ("posterior", "prior"):
            ratio = after[group]["noise_scale"].to_numpy() / before[group]["noise_scale"].to_numpy()
            np.testing.assert_allclose(ratio, width, rtol=1e-4)
        found = after["posterior_predictive"]["class_probs"].to_numpy()[0]
        np.testing.assert_allclose(found, bayes.predict(DATA, num_samples=3, progress=False).sample_probs, atol=1e-6)
        assert json.loads(after.attrs["tuning"])["width"] == width
        assert "tuning" not in before.attrs

    def test_texts_are_written_with_it(self):
        bayes, options = written(), {"num_samples": 3, "max_new_tokens": 4, "progress": False}
        mean = bayes.generate([[5, 6, 7]], **options | {"num_samples": 0}).log_likelihood
        before = bayes.generate([[5, 6, 7]], **options).log_likelihood
        bayes.tuning = Tuning(width=1e-3)
        assert np.ptp(bayes.generate([[5, 6, 7]], **options).log_likelihood) < np.ptp(before) / 20
        bayes.tuning = Tuning(width=0.0)
        np.testing.assert_array_equal(bayes.generate([[5, 6, 7]], **options).log_likelihood, mean)
        at_mean, drawn = (token_uncertainty(bayes, texts()[:2], num_samples=n) for n in (0, 3))
        np.testing.assert_allclose(drawn.entropy[0], at_mean.entropy[0], atol=1e-6)

    def test_taken_back_bit_for_bit(self):
        bayes = noisy()
        before, sites = bayes.predict(DATA, **QUICK).sample_probs, bayes.sample(2, seed=1)
        bayes.tune(DATA, with_temperature=True, **QUICK)
        bayes.tuning = Tuning(width=2.5)
        assert not np.array_equal(bayes.predict(DATA, **QUICK).sample_probs, before)
        bayes.tuning = None
        np.testing.assert_array_equal(bayes.predict(DATA, **QUICK).sample_probs, before)
        assert all(torch.equal(value, sites[name]) for name, value in bayes.sample(2, seed=1).items())

    def test_a_second_tuning_starts_anew(self):
        bayes = noisy()
        first = bayes.tune(DATA, with_temperature=True, **QUICK)
        assert bayes.tune(DATA, with_temperature=True, **QUICK) == first


class TestRefused:
    def test_plain_lora(self):
        with pytest.raises(InputError, match="plain LoRA: it has no noise whose width could be tuned"):
            module(sample_scaler=0.0).tune(DATA)

    def test_too_few_examples(self):
        with pytest.raises(InputError, match="at least 20 examples to be tuned on, got 19"):
            noisy().tune(DATA[:19])

    @pytest.mark.parametrize("with_temperature", [False, True])
    @pytest.mark.parametrize(
        "unlabelled",
        [[{"input_ids": row["input_ids"]} for row in DATA], [row | {"labels": -1} for row in DATA]],
        ids=["absent", "all -1"],
    )
    def test_unlabelled(self, unlabelled, with_temperature):
        bayes = noisy()
        with pytest.raises(InputError, match="pass labelled examples"):
            bayes.tune(unlabelled, with_temperature=with_temperature, **QUICK)
        assert bayes.tuning is None

    @pytest.mark.parametrize("kind", ["numbers", "texts"])
    def test_temperature_without_classes(self, kind):
        bayes, data = KINDS[kind]()
        with pytest.raises(InputError, match="with_temperature=True is for probabilities of classes"):
            bayes.tune(data, with_temperature=True)

    def test_a_guide_that_does_not_follow(self):
        class OwnGuide(MeanFieldGuide):
            follows_noise_schedule = False

        bayes = BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2), guide=OwnGuide)
        with pytest.raises(InputError, match="a width multiplies ε, and a OwnGuide does not follow"):
            bayes.tune(DATA)
        with pytest.raises(InputError, match="a OwnGuide does not follow"):
            bayes.tuning = Tuning(width=0.5)

    def test_no_draws(self):
        for bad in (0, "auto", True, 2.5):
            with pytest.raises(InputError, match=f"num_samples must be a whole number of at least 1, got {bad!r}"):
                noisy().tune(DATA, num_samples=bad)

    def test_a_broken_network(self):
        bayes, data = numbers()
        with torch.no_grad():
            next(p for n, p in bayes.network.named_parameters() if "modules_to_save" in n).fill_(math.nan)
        with pytest.raises(InputError, match="outputs are not finite"):
            bayes.tune(data, **QUICK)
        assert bayes.tuning is None

    @pytest.mark.parametrize(
        "options",
        [
            {"width": -1},
            {"width": math.nan},
            {"width": math.inf},
            {"width": "1"},
            {"width": None},
            {"temperature": 0},
            {"temperature": -2.0},
            {"width": 1e9},
        ],
        ids=str,
    )
    def test_values_of_ones_own(self, options):
        with pytest.raises(InputError, match=f"{next(iter(options))} must be a number"):
            Tuning(**options)

    def test_something_else(self):
        with pytest.raises(InputError, match=r"such as Tuning\(width=0.5\), or None, got 0.5"):
            noisy().tuning = 0.5


class TestTraining:
    def tuned(self):
        bayes = noisy().train()
        bayes.tuning = Tuning(width=0.5)
        return bayes

    def test_refused_in_loops_of_ones_own(self):
        bayes = self.tuned()
        with pytest.raises(InputError, match=r"tuned width, 0\.5.*: set bayes.tuning = None .*to train it further"):
            bayes(**tiny_batch())
        with pytest.raises(InputError, match="to train it further"):
            CooperativeELBO().differentiable_loss(bayes.model, bayes.guide, **tiny_batch())
        bayes.tuning = None
        bayes(**tiny_batch()).loss.backward()
        bayes.eval()

    def test_refused_by_nuts(self):
        with pytest.raises(InputError, match="to draw from the posterior that was fitted"):
            run_nuts(self.tuned().model, tiny_batch())

    def test_evaluation_goes_on(self):
        assert torch.isfinite(self.tuned().eval()(**tiny_batch()).loss)

    def test_trainer_says_that_it_starts_without(self, tmp_path, caplog):
        options = {"max_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        arguments = transformers.TrainingArguments(tmp_path / "out", **options, dataloader_pin_memory=False)
        bayes = self.tuned()
        trainer = BayesTrainer(bayes, arguments, train_dataset=DATA, eval_dataset=DATA)
        trainer.evaluate()
        assert bayes.tuning == Tuning(width=0.5)  # as nothing was trained
        trainer.train()
        assert bayes.tuning is None
        assert "width tuned to 0.5: that is for the adapter as it was, so training goes on without" in caplog.text


def test_diagnoses_are_of_the_posterior_as_it_was_fitted():
    bayes, restart = noisy(), noisy(seed=1)
    answers = [answer.to_dict() for answer in diagnose(bayes, DATA, restarts=[restart], num_samples=25, steps=2)]
    weights = log_importance_weights(bayes, DATA, num_samples=3)
    bayes.tuning, restart.tuning = Tuning(width=0.0), Tuning(width=3.0, temperature=2.0)
    again = [answer.to_dict() for answer in diagnose(bayes, DATA, restarts=[restart], num_samples=25, steps=2)]
    assert again == answers
    np.testing.assert_array_equal(log_importance_weights(bayes, DATA, num_samples=3), weights)
    assert (bayes.tuning, restart.tuning) == (Tuning(width=0.0), Tuning(width=3.0, temperature=2.0))
