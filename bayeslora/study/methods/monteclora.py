"""Ours: MonteCLoRA in any configuration, trained jointly or on a finished LoRA, and all its predictors."""

import copy
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bayeslora.analysis import mixture_entropy
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.guides import GUIDES, MixtureGuide
from bayeslora.inference.draws import as_tuned
from bayeslora.inference.tuning import LEAST_EXAMPLES, Widths
from bayeslora.models import Tuning
from bayeslora.module import BayesLoRA
from bayeslora.storage.run_folder import ADAPTER_FOLDER, RUN_FILE
from bayeslora.study.entries import suggest
from bayeslora.study.experiment import curve
from bayeslora.study.methods.base import Method, PostHocMethod, TrainedMethod, register
from bayeslora.study.methods.recalibration import tempered
from bayeslora.study.outcome import Predict, Predicted, Predictor, Stopwatch, Trained
from bayeslora.training.fit import fit
from bayeslora.training.held_out import hold_out
from bayeslora.training.monitor import components_in_use, noise_to_signal

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment

logger = logging.getLogger(__name__)

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
    decided: ClassVar[Mapping[str, Any]] = {}  # fields of the configuration that are the method's own

    def default_label(self) -> str:
        usual = next(f.default for f in dataclasses.fields(self) if f.name == "preset")
        preset = [] if self.preset == usual else [self.preset]
        changed = [*preset, *(f"{name}={value}" for name, value in self.config.items())]
        return f"{self.title} ({', '.join(changed)})" if changed else self.title

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Any:
        own = [f.name for f in dataclasses.fields(cls) if f.name != "config"]
        for option, value in cls.decided.items():
            if options.get(option, value) != value:
                raise InputError(f"method {cls.name!r} is {option}={value!r}: leave {option} out")  # type: ignore[attr-defined]
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
        made.check()
        return made

    @classmethod
    def untuned(cls, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Without predictors of a tuned width."""
        default = next(f.default for f in dataclasses.fields(cls) if f.name == "predictions")
        left = [predictor for predictor in options.get("predictions", default) if predictor not in TUNED]
        return {**options, "predictions": left} if left else None

    def check(self) -> None:
        """Raise ``InputError`` for a mistake, and for what would do nothing."""
        name = self.name  # type: ignore[attr-defined]
        chosen = MonteCLoRAConfig.preset(self.preset, **{**self.config, **self.decided})
        if chosen.guide not in GUIDES:
            raise InputError(f"method {name!r} has no guide {chosen.guide!r}; {suggest(chosen.guide, sorted(GUIDES))}")
        drawn = [predictor for predictor in self.predictions if not predictor.startswith("mean")]
        if not (drawn if isinstance(self, PostHocMethod) else self.predictions):
            raise InputError(f"method {name!r} predicts nothing new with predictions={[*self.predictions]}")
        if not drawn:
            for option in ("num_samples", "antithetic"):
                if getattr(self, option):
                    raise InputError(f"method {name!r}: {option} does nothing where predictions are at the mean")

    def configuration(self, experiment: "Experiment") -> MonteCLoRAConfig:
        return MonteCLoRAConfig.preset(self.preset, **{**experiment.lora_options(), **self.config, **self.decided})

    def fit(self, bayes: BayesLoRA, experiment: "Experiment", scale: float, tune: float | None = None) -> Trained:
        """Within the study's budget; ``tune`` is the share of the examples to hold out, and to choose the width by."""
        train_data, held_out = hold_out(experiment.train_data, tune, experiment.cell.seed)
        folder = experiment.folder / "training"
        checkpoints = experiment.checkpoint_callback(bayes.network)
        evaluating: dict[str, Any] = (
            {"eval_strategy": "steps", "load_best_model_at_end": False} if experiment.curve_data else {}
        )
        watch = Stopwatch()
        result = fit(
            bayes,
            train_data,
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
            **{"train_sampling_strategy": "random", **experiment.study.trainer},  # as of all methods
        )
        if held_out is not None:
            widths = Widths(bayes, held_out, num_samples=self.draws(experiment), antithetic=self.antithetic)
            bayes.model.tuning = widths.choose(progress=experiment.progress)
            bayes.save_pretrained(folder / ADAPTER_FOLDER)
        spent = watch.read()
        return Trained(
            bayes.network,
            result.steps,
            curve=curve(result.history),
            checkpoints=checkpoints.kept,
            facts=posterior_facts(bayes) if bayes.sampling else {},
            bayes=bayes,
            **spent,
        )

    def draws(self, experiment: "Experiment") -> int:
        return self.num_samples or experiment.study.num_samples

    def fitted_predictors(self, bayes: BayesLoRA, experiment: "Experiment", label: str) -> Iterator[Predictor]:
        """The predictors of a fitted posterior."""
        count = self.draws(experiment)
        kept = bayes.model.tuning
        these = f"{count} antithetic draws" if self.antithetic else f"{count} draws"
        wanted = self.predictions if bayes.sampling else ("mean",)

        def predictor(num_samples: int, tuning: Tuning | None = None) -> Predict:
            return cache(lambda split: predict(bayes, experiment.data(split), num_samples, self.antithetic, tuning))

        mean, draws = predictor(0), predictor(count, kept)
        if "mean" in wanted:
            yield Predictor(f"{label}, mean" if bayes.sampling else label, mean)
        if "draws" in wanted:
            numbers = {} if kept is None else {"width": kept.width}
            yield Predictor(f"{label}, {these}", draws, draws=True, tuned=numbers)
        if not experiment.has_validation:
            return
        if "mean_temperature" in wanted:
            yield tempered(f"{label}, mean + temperature*", mean)
        if "draws_temperature" in wanted:
            yield tempered(f"{label}, {these} + temperature*", draws, draws=True)
        tuned = [name for name in TUNED if name in wanted]
        if not tuned or len(experiment.data("validation")) < LEAST_EXAMPLES:
            return
        widths = Widths(
            bayes,
            experiment.data("validation"),
            num_samples=count,
            antithetic=self.antithetic,
            temperatures="tuned_temperature" in tuned,
        )
        for name in tuned:
            try:
                found = widths.choose(**TUNED[name], progress=experiment.progress)
            except InputError as error:
                if name != "agreement":
                    raise
                logger.warning("%s is left out of %s: %s", name, experiment.cell, error)
                continue
            title = name.replace("_", " + ") + ("" if name == "agreement" else "*")  # which needs no labels
            numbers = {"width": found.width}
            if "with_temperature" in TUNED[name]:
                numbers["temperature"] = found.temperature
            yield Predictor(f"{label}, {these}, {title}", predictor(count, found), draws=True, tuned=numbers)


@register
@dataclass(frozen=True)
class MonteCLoRAMethod(PosteriorOptions, TrainedMethod):
    """A posterior trained jointly with the adapter.

    ``tune``: this share of the training examples is not trained on; the width of ``draws`` is chosen by its labels, as
    ``fit(tune=...)`` does. No further labels are needed.
    """

    tune: float | None = None

    name: ClassVar[str] = "monteclora"
    title: ClassVar[str] = "MonteCLoRA"

    def default_label(self) -> str:
        usual = super().default_label()
        return usual if self.tune is None else f"{usual}, tuned on {self.tune:.0%} of its training set"

    def check(self) -> None:
        super().check()
        if self.tune is not None and not any(name.startswith("draws") for name in self.predictions):
            raise InputError(f"method {self.name!r}: tune is for the width of draws, which predictions does not have")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        if options.get("mode") == "post_hoc" and cls is MonteCLoRAMethod:
            return PostHocMonteCLoRA.from_options({k: v for k, v in options.items() if k != "mode"})
        return super().from_options(options)

    def train(self, experiment: "Experiment") -> Trained:
        bayes = BayesLoRA(experiment.network(), self.configuration(experiment), likelihood=experiment.task.likelihood())
        return self.fit(bayes, experiment, self.learning_rate_scale, self.tune)

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
    decided: ClassVar[Mapping[str, Any]] = {"guide": "gaussian"}


@register
@dataclass(frozen=True)
class PostHocMonteCLoRA(PosteriorOptions, PostHocMethod):
    """A posterior around a finished LoRA: a second training of the same budget moves v and α only."""

    preset: str = "calibrated"  # nothing is left to learn

    shows_base: ClassVar[bool] = False
    name: ClassVar[str] = "monteclora_post_hoc"
    title: ClassVar[str] = "MonteCLoRA post-hoc"
    decided: ClassVar[Mapping[str, Any]] = {"mode": "post_hoc"}

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        config = self.configuration(experiment)
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
    watch = Stopwatch()
    with as_tuned(bayes, tuning):
        prediction = bayes.predict(
            data, num_samples=num_samples, antithetic=antithetic, keep_draws=False, progress=False
        )
    information = prediction.mutual_information if num_samples else None
    return Predicted(prediction.probs, prediction.labels, information, **watch.read())


def posterior_facts(bayes: BayesLoRA) -> dict[str, float]:
    """Means over adapters: effective components, entropy of π in nats, noise relative to the mean of A."""
    facts = {}
    if isinstance(bayes.guide, MixtureGuide):
        facts["effective_components"] = float(components_in_use(bayes).mean())
        weights = bayes.posterior_draws(num_samples=16).mixture_weights
        facts["mixture_entropy"] = float(np.mean(mixture_entropy(weights)))
    ratio = noise_to_signal(bayes)
    return facts if ratio is None else {**facts, "noise_to_signal": float(ratio.mean())}
