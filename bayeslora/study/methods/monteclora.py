"""Ours: MonteCLoRA in any configuration, trained jointly or on a finished LoRA, and all its predictors."""

import copy
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bayeslora.analysis import mixture_entropy
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.guides import MixtureGuide
from bayeslora.inference.tuning import LEAST_EXAMPLES, as_tuned
from bayeslora.models import Tuning
from bayeslora.module import BayesLoRA
from bayeslora.storage.run_folder import ADAPTER_FOLDER, RUN_FILE
from bayeslora.study.entries import suggest
from bayeslora.study.experiment import curve
from bayeslora.study.methods.base import Method, PostHocMethod, TrainedMethod, register
from bayeslora.study.methods.post_hoc import tempered
from bayeslora.study.outcome import Predict, Predicted, Predictor, Trained
from bayeslora.training.fit import fit
from bayeslora.training.monitor import components_in_use, noise_to_signal

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment

TUNED: dict[str, dict[str, Any]] = {
    "agreement": {"agreement": 0.95},
    "tuned": {},
    "tuned_temperature": {"with_temperature": True},
}
PREDICTORS = ("mean", "draws", "mean_temperature", "draws_temperature", *TUNED)
CONFIG_FIELDS = {f.name for f in dataclasses.fields(MonteCLoRAConfig)} - {"r"}


@dataclass(frozen=True)
class PosteriorOptions:
    """The options of both methods here.

    ``preset`` and ``config``: :class:`bayeslora.MonteCLoRAConfig`'s; a study writes the configuration's fields next to
    the others. ``predictions``: which of :data:`PREDICTORS`. Those with a temperature, and ``tuned`` (the width that
    :meth:`bayeslora.BayesLoRA.tune` finds) and ``tuned_temperature`` (both at once), use the labels of validation
    examples; ``agreement`` is a width that leaves 95 % of the answers to them as they are. They are left out where
    there are no such examples, for a width fewer than 20. ``num_samples``: draws, the study's if ``None``;
    ``antithetic``: in mirrored pairs (:func:`bayeslora.inference.predict.predict`).
    """

    preset: str = "learned"
    config: Mapping[str, Any] = field(default_factory=dict)
    predictions: tuple[str, ...] = ("mean", "draws", "mean_temperature", "draws_temperature", "tuned")
    num_samples: int | None = None
    antithetic: bool = False

    title: ClassVar[str]

    def default_label(self) -> str:
        usual = next(f.default for f in dataclasses.fields(self) if f.name == "preset")
        preset = [] if self.preset == usual else [self.preset]
        changed = [*preset, *(f"{name}={value}" for name, value in self.config.items())]
        return f"{self.title} ({', '.join(changed)})" if changed else self.title

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Any:
        own = [f.name for f in dataclasses.fields(cls) if f.name != "config"]
        for option in options:
            if option not in own and option not in CONFIG_FIELDS:
                raise InputError(
                    f"method {cls.name!r} has no option {option!r}; "  # type: ignore[attr-defined]
                    f"{suggest(str(option), [*own, *sorted(CONFIG_FIELDS)])}"
                )
        config = {
            option: tuple(value) if isinstance(value, list) else value
            for option, value in options.items()
            if option in CONFIG_FIELDS
        }
        rest = {option: value for option, value in options.items() if option in own}
        if "predictions" in rest:
            rest["predictions"] = tuple(rest["predictions"])
            for predictor in rest["predictions"]:
                if predictor not in PREDICTORS:
                    raise InputError(
                        f"method {cls.name!r} has no predictor {predictor!r}; "  # type: ignore[attr-defined]
                        f"{suggest(str(predictor), PREDICTORS)}"
                    )
        made = cls(config=config, **rest)
        MonteCLoRAConfig.preset(made.preset, **config)  # a mistake is found before anything is trained
        return made

    def configuration(self, experiment: "Experiment", **changes: Any) -> MonteCLoRAConfig:
        return MonteCLoRAConfig.preset(self.preset, **{**experiment.lora_options(), **self.config, **changes})

    def fit(self, bayes: BayesLoRA, experiment: "Experiment", scale: float) -> Trained:
        """Within the study's budget."""
        folder = experiment.folder / "training"
        checkpoints = experiment.checkpoint_callback(bayes.network)
        evaluating: dict[str, Any] = (
            {"eval_strategy": "steps", "load_best_model_at_end": False} if experiment.curve_data else {}
        )
        started = time.perf_counter()
        result = fit(
            bayes,
            experiment.train_data,
            experiment.curve_data,
            output_dir=folder,
            progress=experiment.progress,
            metadata=experiment.metadata,
            callbacks=[checkpoints],
            save_strategy="no",
            **evaluating,
            **dataclasses.asdict(experiment.budget(scale)),
            evaluations=experiment.evaluations,
            eval_samples=0,
            **experiment.study.trainer,
        )
        seconds = time.perf_counter() - started
        facts = posterior_facts(bayes) if bayes.sampling else {}
        return Trained(bayes.network, result.steps, seconds, curve(result.history), checkpoints.kept, facts, bayes)

    def fitted_predictors(self, bayes: BayesLoRA, experiment: "Experiment", label: str) -> Iterator[Predictor]:
        """The predictors of a fitted posterior."""
        count = self.num_samples or experiment.study.num_samples
        these = f"{count} antithetic draws" if self.antithetic else f"{count} draws"
        wanted = self.predictions if bayes.sampling else ("mean",)

        def predictor(num_samples: int, tuning: Tuning | None = None) -> Predict:
            return cache(lambda split: predict(bayes, experiment.data(split), num_samples, self.antithetic, tuning))

        mean, draws = predictor(0), predictor(count)
        if "mean" in wanted:
            yield Predictor(f"{label}, mean" if bayes.sampling else label, mean)
        if "draws" in wanted:
            yield Predictor(f"{label}, {these}", draws, draws=True)
        if not experiment.has_validation:
            return
        if "mean_temperature" in wanted:
            yield Predictor(f"{label}, mean + temperature*", tempered(mean))
        if "draws_temperature" in wanted:
            yield Predictor(f"{label}, {these} + temperature*", tempered(draws), draws=True)
        for name, options in TUNED.items():
            if name in wanted and len(experiment.data("validation")) >= LEAST_EXAMPLES:
                found = self.tune(bayes, experiment, count, **options)
                title = name.replace("_", " + ") + ("" if name == "agreement" else "*")  # which needs no labels
                yield Predictor(f"{label}, {these}, {title}", predictor(count, found), draws=True)

    def tune(self, bayes: BayesLoRA, experiment: "Experiment", num_samples: int, **options: Any) -> Tuning:
        """What is found on the validation examples; the posterior stays as it was fitted."""
        with as_tuned(bayes, None):
            return bayes.tune(
                experiment.data("validation"),
                num_samples=num_samples,
                antithetic=self.antithetic,
                progress=False,
                **options,
            )


@register
@dataclass(frozen=True)
class MonteCLoRAMethod(PosteriorOptions, TrainedMethod):
    """A posterior trained jointly with the adapter."""

    name: ClassVar[str] = "monteclora"
    title: ClassVar[str] = "MonteCLoRA"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        if options.get("mode") == "post_hoc" and cls is MonteCLoRAMethod:
            return PostHocMonteCLoRA.from_options({k: v for k, v in options.items() if k != "mode"})
        return super().from_options(options)

    def train(self, experiment: "Experiment") -> Trained:
        bayes = BayesLoRA(experiment.network(), self.configuration(experiment), likelihood=experiment.task.likelihood())
        return self.fit(bayes, experiment, self.learning_rate_scale)

    def predictors(self, trained: Trained, experiment: "Experiment") -> Iterator[Predictor]:
        return self.fitted_predictors(trained.bayes, experiment, self.label)

    def save(self, trained: Trained, experiment: "Experiment") -> None:
        for name in (ADAPTER_FOLDER, RUN_FILE):
            shutil.move(experiment.folder / "training" / name, experiment.folder / name)


@register
@dataclass(frozen=True)
class GaussianPosterior(MonteCLoRAMethod):
    """A standard deviation for every entry of A, BLoB's family."""

    name: ClassVar[str] = "gaussian"
    title: ClassVar[str] = "Gaussian guide"

    def configuration(self, experiment: "Experiment", **changes: Any) -> MonteCLoRAConfig:
        return super().configuration(experiment, guide="gaussian", **changes)


@register
@dataclass(frozen=True)
class PostHocMonteCLoRA(PosteriorOptions, PostHocMethod):
    """A posterior around a finished LoRA: a second training of the same budget moves v and α only."""

    preset: str = "calibrated"  # nothing is left to learn

    shows_base: ClassVar[bool] = False
    name: ClassVar[str] = "monteclora_post_hoc"
    title: ClassVar[str] = "MonteCLoRA post-hoc"

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        config = self.configuration(experiment, mode="post_hoc")
        bayes = BayesLoRA(copy.deepcopy(trained.network), config, likelihood=experiment.task.likelihood())
        bayes.eval()
        self.fit(bayes, experiment, 1.0)
        shutil.rmtree(experiment.folder / "training")
        for predictor in self.fitted_predictors(bayes, experiment, self.label):
            if predictor.draws or not bayes.sampling:  # at the mean it is the LoRA itself
                yield predictor


def predict(
    bayes: BayesLoRA, data: Any, num_samples: int, antithetic: bool = False, tuning: Tuning | None = None
) -> Predicted:
    """The posterior predictive with a tuned width and temperature; at the mean with no samples."""
    started = time.perf_counter()
    with as_tuned(bayes, tuning):
        prediction = bayes.predict(
            data, num_samples=num_samples, antithetic=antithetic, keep_draws=False, progress=False
        )
    information = prediction.mutual_information if num_samples else None
    return Predicted(prediction.probs, prediction.labels, information, time.perf_counter() - started)


def posterior_facts(bayes: BayesLoRA) -> dict[str, float]:
    """Means over adapters: effective components, entropy of π in nats, noise relative to the mean of A."""
    facts = {}
    if isinstance(bayes.guide, MixtureGuide):
        facts["effective_components"] = float(components_in_use(bayes).mean())
        weights = bayes.posterior_draws(num_samples=16).mixture_weights
        facts["mixture_entropy"] = float(np.mean(mixture_entropy(weights)))
    ratio = noise_to_signal(bayes)
    return facts if ratio is None else {**facts, "noise_to_signal": float(ratio.mean())}
