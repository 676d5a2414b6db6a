"""A variational posterior that an optimizer learns: IVON."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from bayeslora.errors import InputError
from bayeslora.study.methods.base import register
from bayeslora.study.methods.draws import DrawingOptions, mean_and_draws, over_members, seeded
from bayeslora.study.methods.peft import LoRA
from bayeslora.study.outcome import Predictor, Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment


@register
@dataclass(frozen=True)
class IVONLoRA(DrawingOptions, LoRA):
    """Improved variational online Newton (Shen et al. 2024, ICML), for LoRA (Cong et al. 2024), through ivon-opt.

    q is N(θ, 1 / (``ess`` · (h + weight decay))) for every trained number, h the optimizer's running Hessian. Each
    training pass runs one draw. The defaults are those of Cong et al. for Llama-2, without rescaled rates; they took
    a rate of 0.03 where AdamW had 5e-5, hence ``learning_rate_scale`` 600, and ``ess`` 1e6, ``hess_init`` 1e-3 for
    their smallest tasks. An ``ess`` above the number of training examples is a cold posterior. A step of an entry is at
    most the rate times ``clip_radius``, which takes the place of the study's ``max_grad_norm``.
    """

    learning_rate_scale: float = 600.0
    ess: float = 1e7
    hess_init: float = 3e-4
    clip_radius: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99999

    name: ClassVar[str] = "ivon"
    title: ClassVar[str] = "IVON"

    def train(self, experiment: "Experiment") -> Trained:
        make = _ivon()
        if experiment.budget().gradient_accumulation > 1:
            raise InputError(f"{self.label!r} draws once a step: it takes no gradient_accumulation above 1")
        network = self.adapted(experiment)
        made: list[Any] = []  # once the network lies where it is trained
        given = {name: getattr(self, name) for name in ("ess", "hess_init", "clip_radius", "beta1", "beta2")}
        decay = experiment.budget().weight_decay

        def optimizer(cls: type, options: Mapping[str, Any]) -> Any:
            trained = [p for p in network.parameters() if p.requires_grad]
            made.append(make(trained, lr=options["lr"], weight_decay=decay, rescale_lr=False, **given))
            return made[0]

        def draw(batch: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
            return made[0].sampled_params(train=True)

        rate = self.learning_rate_scale
        trained = experiment.train(network, learning_rate_scale=rate, optimizer=optimizer, drawing=draw)
        return replace(trained, posterior=made[0])

    def predictors(self, trained: Trained, experiment: "Experiment") -> Iterator[Predictor]:
        network, optimizer, count = trained.network, trained.posterior, self.draws(experiment)
        members = []
        with seeded(experiment.cell.seed):
            for _ in range(count):
                with optimizer.sampled_params():
                    members.append({n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad})

        def mean(split: str) -> Any:
            return experiment.predict(network, experiment.data(split))

        draws = over_members(network, members, experiment)
        return mean_and_draws(self.label, mean, {f"{count} draws": draws}, experiment)


def _ivon() -> Any:
    try:
        from ivon import IVON
    except ImportError as error:
        raise InputError(f"ivon needs ivon-opt (pip install 'bayeslora[ivon]'): {error}") from error
    return IVON
