"""Ours: MonteCLoRA in any configuration, trained jointly or on a finished LoRA, and all its ways to predict."""

import copy
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bayeslora.analysis import apply_temperature, fit_temperature, mixture_entropy
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.guides import MixtureGuide
from bayeslora.module import BayesLoRA
from bayeslora.storage.run_folder import ADAPTER_FOLDER, RUN_FILE
from bayeslora.study.bench import curve
from bayeslora.study.methods.base import Method, PostHocMethod, TrainedMethod, register
from bayeslora.study.outcome import Predicted, Predictor, Trained
from bayeslora.study.spec import suggest
from bayeslora.training.fit import fit
from bayeslora.training.monitor import components_in_use, noise_to_signal

if TYPE_CHECKING:
    from bayeslora.study.bench import Bench

WAYS = ("mean", "draws", "mean_temperature", "draws_temperature", "scale_tuned")
FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0)  # of the noise, tried on validation
TUNING_DRAWS = 4
CONFIG_WORDS = {f.name for f in dataclasses.fields(MonteCLoRAConfig)} - {"r"}


@dataclass(frozen=True)
class Posterior:
    """The options of both methods here.

    ``preset`` and ``config``: :class:`bayeslora.MonteCLoRAConfig`'s; a study writes the configuration's words next to
    the others. ``predictions``: ways to predict, of :data:`WAYS`; those with a temperature and ``scale_tuned``, which
    multiplies the noise by the one of :data:`FACTORS` with the lowest negative log-likelihood, tune on validation
    examples and are left out where there are none. ``num_samples``: draws, the study's if ``None``;
    ``antithetic``: in mirrored pairs (:func:`bayeslora.inference.predict.predict`).
    """

    preset: str = "calibrated"
    config: Mapping[str, Any] = field(default_factory=dict)
    predictions: tuple[str, ...] = WAYS
    num_samples: int | None = None
    antithetic: bool = False

    title: ClassVar[str]

    def default_label(self) -> str:
        preset = [] if self.preset == "calibrated" else [self.preset]
        changed = [*preset, *(f"{name}={value}" for name, value in self.config.items())]
        return f"{self.title} ({', '.join(changed)})" if changed else self.title

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Any:
        own = [f.name for f in dataclasses.fields(cls) if f.name != "config"]
        for word in options:
            if word not in own and word not in CONFIG_WORDS:
                raise InputError(f"method {cls.name!r} has no option {word!r}; "  # type: ignore[attr-defined]
                                 f"{suggest(str(word), [*own, *sorted(CONFIG_WORDS)])}")  # fmt: skip
        config = {word: tuple(value) if isinstance(value, list) else value
                  for word, value in options.items() if word in CONFIG_WORDS}  # fmt: skip
        rest = {word: value for word, value in options.items() if word in own}
        if "predictions" in rest:
            rest["predictions"] = tuple(rest["predictions"])
            for way in rest["predictions"]:
                if way not in WAYS:
                    raise InputError(f"method {cls.name!r}: no way to predict {way!r}; "  # type: ignore[attr-defined]
                                     f"{suggest(str(way), WAYS)}")  # fmt: skip
        made = cls(config=config, **rest)
        MonteCLoRAConfig.preset(made.preset, **config)  # a mistake is found before anything is trained
        return made

    def configuration(self, bench: "Bench", **changes: Any) -> MonteCLoRAConfig:
        return MonteCLoRAConfig.preset(self.preset, **{**bench.lora_words(), **self.config, **changes})

    def fit(self, bayes: BayesLoRA, bench: "Bench", scale: float) -> Trained:
        """Within the study's budget."""
        folder = bench.folder / "training"
        keeper = bench.keeper(bayes.network)
        evaluating: dict[str, Any] = (
            {"eval_strategy": "steps", "load_best_model_at_end": False} if bench.curve_data else {}
        )
        started = time.perf_counter()
        result = fit(
            bayes, bench.train_data, bench.curve_data, output_dir=folder, progress=bench.progress,
            metadata=bench.metadata, callbacks=[keeper], save_strategy="no", **evaluating,
            **bench.budget(scale), **bench.study.trainer,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        facts = posterior_facts(bayes) if bayes.sampling else {}
        return Trained(bayes.network, result.steps, seconds, curve(result.history), keeper.kept, facts, bayes)

    def ways(self, bayes: BayesLoRA, bench: "Bench", label: str) -> Iterator[tuple[str, Predictor]]:
        """The ways to predict with a fitted posterior."""
        count = self.num_samples or bench.study.num_samples
        mean = cache(lambda split: predict(bayes, bench.data(split), 0))
        draws = cache(lambda split: predict(bayes, bench.data(split), count, antithetic=self.antithetic))
        these = f"{count} antithetic draws" if self.antithetic else f"{count} draws"
        wanted = self.predictions if bayes.sampling else ("mean",)
        tuned = bench.has_validation
        if "mean" in wanted:
            yield f"{label}, mean" if bayes.sampling else label, mean
        if "draws" in wanted:
            yield f"{label}, {these}", draws
        if "mean_temperature" in wanted and tuned:
            yield f"{label}, mean + temperature*", tempered(mean)
        if "draws_temperature" in wanted and tuned:
            yield f"{label}, {these} + temperature*", tempered(draws)
        if "scale_tuned" in wanted and tuned:
            factor = best_factor(bayes, bench.tuning_data(), self.antithetic)
            scaled = draws if factor == 1 else cache(
                lambda split: predict(bayes, bench.data(split), count, factor, self.antithetic)
            )  # fmt: skip
            yield f"{label}, {these}, scale tuned*", scaled


@register
@dataclass(frozen=True)
class MonteCLoRA(Posterior, TrainedMethod):
    """A posterior trained jointly with the adapter."""

    name: ClassVar[str] = "monteclora"
    title: ClassVar[str] = "MonteCLoRA"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        if options.get("mode") == "post_hoc" and cls is MonteCLoRA:
            return PostHocMonteCLoRA.from_options({k: v for k, v in options.items() if k != "mode"})
        return super().from_options(options)

    def train(self, bench: "Bench") -> Trained:
        bayes = BayesLoRA(bench.network(), self.configuration(bench), likelihood=bench.task.likelihood())
        return self.fit(bayes, bench, self.learning_rate_scale)

    def predictors(self, trained: Trained, bench: "Bench") -> Iterator[tuple[str, Predictor]]:
        return self.ways(trained.bayes, bench, self.label)

    def save(self, trained: Trained, bench: "Bench") -> None:
        for name in (ADAPTER_FOLDER, RUN_FILE):
            shutil.move(bench.folder / "training" / name, bench.folder / name)


@register
@dataclass(frozen=True)
class GaussianPosterior(MonteCLoRA):
    """A standard deviation for every entry of A, BLoB's family."""

    name: ClassVar[str] = "gaussian"
    title: ClassVar[str] = "Gaussian guide"

    def configuration(self, bench: "Bench", **changes: Any) -> MonteCLoRAConfig:
        return super().configuration(bench, guide="gaussian", **changes)


@register
@dataclass(frozen=True)
class PostHocMonteCLoRA(Posterior, PostHocMethod):
    """A posterior around a finished LoRA: a second training of the same budget moves v and α only."""

    name: ClassVar[str] = "monteclora_post_hoc"
    title: ClassVar[str] = "MonteCLoRA post-hoc"

    def predictors(self, trained: Trained, bench: "Bench", predict: Predictor) -> Iterator[tuple[str, Predictor]]:
        config = self.configuration(bench, mode="post_hoc")
        bayes = BayesLoRA(copy.deepcopy(trained.network), config, likelihood=bench.task.likelihood())
        bayes.eval()
        self.fit(bayes, bench, 1.0)
        shutil.rmtree(bench.folder / "training")
        for label, predictor in self.ways(bayes, bench, self.label):
            if not label.startswith(f"{self.label}, mean"):  # the mean is the LoRA itself
                yield label, predictor


def predict(bayes: BayesLoRA, data: Any, num_samples: int, factor: float = 1.0, antithetic: bool = False) -> Predicted:
    """The posterior predictive; at the mean with no samples."""
    started = time.perf_counter()
    found = bayes.predict(data, num_samples=num_samples, noise_factor=factor, antithetic=antithetic, keep_draws=False,
                          progress=False)  # fmt: skip
    information = found.mutual_information if num_samples else None
    return Predicted(found.probs, found.labels, information, time.perf_counter() - started)


def tempered(base: Predictor) -> Predictor:
    """The same with a temperature that is fitted to the labels of the validation split, and to no other."""
    held_out = base("validation")
    temperature = fit_temperature(held_out.probs, held_out.labels)

    def predictor(split: str) -> Predicted:
        found = base(split)
        return dataclasses.replace(found, probs=apply_temperature(found.probs, temperature))

    return predictor


def best_factor(bayes: BayesLoRA, data: Any, antithetic: bool = False) -> float:
    """Of :data:`FACTORS`, the one whose noise gives the validation examples the lowest negative log-likelihood."""
    found = {factor: predict(bayes, data, TUNING_DRAWS, factor, antithetic) for factor in FACTORS}
    return min(found, key=lambda factor: _nll(found[factor]))


def posterior_facts(bayes: BayesLoRA) -> dict[str, float]:
    """Means over adapters: effective components, entropy of π in nats, noise relative to the mean of A."""
    facts = {}
    if isinstance(bayes.guide, MixtureGuide):
        facts["effective_components"] = float(components_in_use(bayes).mean())
        weights = bayes.posterior_draws(num_samples=16).mixture_weights
        facts["mixture_entropy"] = float(np.mean(mixture_entropy(weights)))
    ratio = noise_to_signal(bayes)
    return facts if ratio is None else {**facts, "noise_to_signal": float(ratio.mean())}


def _nll(found: Predicted) -> float:
    at_label = found.probs[np.arange(len(found.labels)), found.labels.astype(int)]
    return float(-np.log(np.maximum(at_label, 1e-300)).mean())
