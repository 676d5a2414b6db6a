"""Posteriors on a finished LoRA without training: ours, and TFB as its paper has it."""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.inference.bayesianize import AGREEMENT
from bayeslora.inference.shapes import SHAPES
from bayeslora.inference.tuning import Widths
from bayeslora.models import Tuning
from bayeslora.module import BayesLoRA
from bayeslora.study.methods.base import PostHocMethod, register
from bayeslora.study.methods.monteclora import predict
from bayeslora.study.outcome import Predict, Predictor, Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment

NEXT_TO_CONSTANT = 1e6  # degrees of freedom of a Wishart


@dataclass(frozen=True)
class OnFinished(PostHocMethod):
    """``shape``: of the noise (:mod:`bayeslora.inference.shapes`). ``num_samples``: draws, the study's if ``None``."""

    shape: str = "isotropic"
    num_samples: int | None = None
    antithetic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(shape=SHAPES)

    def config(self) -> MonteCLoRAConfig:
        """Of the noise."""
        return MonteCLoRAConfig()

    def anchors(self, experiment: "Experiment") -> Any:
        """The examples that the width is found on."""
        if not experiment.has_validation:
            raise InputError(
                f"{self.label!r} finds its width on a validation split besides what is scored; "
                "set hold_out to take one from the training examples"
            )
        return experiment.data("validation")

    @classmethod
    def untuned(cls, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Nothing: the noise is as wide as the search says."""
        return None

    @abstractmethod
    def choose(self, widths: Widths, progress: bool) -> Tuning:
        """The width."""

    def predictors(self, trained: Trained, experiment: "Experiment", base: Predict) -> Iterator[Predictor]:
        count, anchors = self.num_samples or experiment.study.num_samples, self.anchors(experiment)
        bayes = BayesLoRA.from_adapter(
            copy.deepcopy(trained.network),
            anchors,
            shape=self.shape,
            width=1.0,
            config=self.config(),
            likelihood=experiment.task.likelihood(),
            progress=False,
        )
        bayes.tuning = None
        widths = Widths(bayes, anchors, num_samples=count, antithetic=self.antithetic)
        tuning = self.choose(widths, experiment.progress)
        yield Predictor(
            experiment.on_top(self.label),
            cache(lambda split: predict(bayes, experiment.data(split), count, self.antithetic, tuning)),
            draws=True,
            tuned={"width": tuning.width},
        )


@register
@dataclass(frozen=True)
class Bayesianized(OnFinished):
    """What ``bayeslora bayesianize`` makes of the LoRA. ``rule``: ``"labels"``, the width that predicts validation
    labels best, or ``"agreement"``, the largest that leaves ``agreement`` of the answers to them alone."""

    rule: str = "labels"
    agreement: float = AGREEMENT

    name: ClassVar[str] = "bayesianized"
    title: ClassVar[str] = "bayesianized"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(rule=("labels", "agreement"))

    def default_label(self) -> str:
        shape = "" if self.shape == "isotropic" else f", {self.shape}"
        return f"{self.title}{shape}" + ("*" if self.rule == "labels" else ", agreement")

    def choose(self, widths: Widths, progress: bool) -> Tuning:
        return widths.choose(agreement=self.agreement if self.rule == "agreement" else None, progress=progress)


@register
@dataclass(frozen=True)
class TFB(OnFinished):
    """Training-free Bayesianization (Shi et al. 2024): with B = U diag(d) Vᵀ, noise of standard deviation σ/d_i on row
    i of VᵀA, the same σ in all layers, and the largest σ with which the negative log-likelihood of labelled ``anchors``
    rises by at most ``tolerance``, found by bisection. Both public programs return the smallest σ that violates this;
    here it is the largest that was tried and does not.

    ``anchors_from``: ``"train"``, as published, or ``"validation"``: of what a network knows by heart the likelihood is
    next to 1, and a relative tolerance lets it have next to no noise.
    """

    shape: str = "output"
    anchors_from: str = "train"
    tolerance: float = 0.003

    name: ClassVar[str] = "tfb"
    title: ClassVar[str] = "TFB"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(anchors_from=("train", "validation"))

    def config(self) -> MonteCLoRAConfig:
        return MonteCLoRAConfig(num_components=1, degrees_of_freedom=NEXT_TO_CONSTANT)  # Gaussian

    def anchors(self, experiment: "Experiment") -> Any:
        return experiment.train_data if self.anchors_from == "train" else super().anchors(experiment)

    def choose(self, widths: Widths, progress: bool) -> Tuning:
        return widths.choose(rise=self.tolerance, progress=progress)
