"""Point estimates: full fine-tuning, and what PEFT has to offer."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from peft import AdaLoraConfig, LoraConfig, MontecloraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import TrainerCallback

from bayeslora.adapters.inject import lora_config
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.files.writing import write_json
from bayeslora.module import BayesLoRA
from bayeslora.storage.run_folder import ADAPTER_FOLDER, RUN_FILE
from bayeslora.study.methods.base import TrainedMethod, register
from bayeslora.study.outcome import Predictor, Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment


@dataclass(frozen=True)
class PointEstimate(TrainedMethod):
    """One network, and its softmax."""

    def predictors(self, trained: Trained, experiment: "Experiment") -> Iterator[Predictor]:
        yield Predictor(self.label, cache(lambda split: experiment.predict(trained.network, experiment.data(split))))


@register
@dataclass(frozen=True)
class FullFineTuning(PointEstimate):
    """Every weight is trained; consider a ``learning_rate_scale`` well below 1."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "full fine-tuning"

    def train(self, experiment: "Experiment") -> Trained:
        network = experiment.network()
        network.requires_grad_(True)
        return experiment.train(network, learning_rate_scale=self.learning_rate_scale)


@register
@dataclass(frozen=True)
class LoRA(PointEstimate):
    """PEFT's LoRA; its variants change the configuration or the optimizer. Options that are None are the study's."""

    target_modules: str | tuple[str, ...] | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"

    def train(self, experiment: "Experiment") -> Trained:
        network = self.adapted(experiment)
        return experiment.train(
            network, learning_rate_scale=self.learning_rate_scale, **self.training(network, experiment)
        )

    def adapted(self, experiment: "Experiment") -> PeftModel:
        """The network with its adapter, as training starts."""
        network = experiment.network()
        return get_peft_model(network, self.adapter(lora_config(network, self.configuration(experiment)), experiment))

    def configuration(self, experiment: "Experiment") -> MonteCLoRAConfig:
        """Plain LoRA's, as a posterior without noise."""
        own = {option: getattr(self, option) for option in ("target_modules", "lora_alpha", "lora_dropout")}
        given = {option: value for option, value in own.items() if value is not None}
        return MonteCLoRAConfig(**{**experiment.lora_options(), **given, "sample_scaler": 0.0})

    def adapter(self, lora: LoraConfig, experiment: "Experiment") -> LoraConfig:
        """The adapter's configuration, from plain LoRA's."""
        return lora

    def training(self, network: nn.Module, experiment: "Experiment") -> dict[str, Any]:
        """Further arguments of :meth:`bayeslora.study.experiment.Experiment.train`."""
        return {}

    def save(self, trained: Trained, experiment: "Experiment") -> None:
        if type(self) is not LoRA:
            return super().save(trained, experiment)
        bayes = BayesLoRA(trained.network, self.configuration(experiment), likelihood=experiment.task.likelihood())
        bayes.num_examples = len(experiment.train_data)
        bayes.save_pretrained(experiment.folder / ADAPTER_FOLDER)
        write_json(experiment.folder / RUN_FILE, experiment.record(bayes, trained))


@register
@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """B and vectors learn ``ratio`` times as fast as A (Hayou et al. 2024)."""

    ratio: float = 16.0

    name: ClassVar[str] = "lora_plus"
    title: ClassVar[str] = "LoRA+"

    def training(self, network: nn.Module, experiment: "Experiment") -> dict[str, Any]:
        decay = experiment.budget().weight_decay

        def optimizer(cls: type, options: dict[str, Any]) -> Any:
            made = create_loraplus_optimizer(
                network, cls, loraplus_lr_ratio=self.ratio, loraplus_weight_decay=decay, **options
            )
            made.param_groups = [group for group in made.param_groups if group["params"]]
            return made

        return {"optimizer": optimizer}


@register
@dataclass(frozen=True)
class RsLoRA(LoRA):
    """Scaled by alpha / √r (Kalajdzievski 2023)."""

    name: ClassVar[str] = "rslora"
    title: ClassVar[str] = "rsLoRA"

    def adapter(self, lora: LoraConfig, experiment: "Experiment") -> LoraConfig:
        return _changed(lora, use_rslora=True)


@register
@dataclass(frozen=True)
class FrozenALoRA(LoRA):
    """A stays as it starts, and B and the head are trained (Zhang et al. 2023, LoRA-FA): how much of a method's
    robustness is only that A cannot fit."""

    name: ClassVar[str] = "frozen_a"
    title: ClassVar[str] = "frozen-A LoRA"

    def training(self, network: nn.Module, experiment: "Experiment") -> dict[str, Any]:
        for name, parameter in network.named_parameters():
            if ".lora_A." in name or ".lora_embedding_A." in name:
                parameter.requires_grad_(False)
        return {}


@register
@dataclass(frozen=True)
class DoRA(LoRA):
    """Magnitude and direction of the weights apart (Liu et al. 2024)."""

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"

    def adapter(self, lora: LoraConfig, experiment: "Experiment") -> LoraConfig:
        return _changed(lora, use_dora=True)


@register
@dataclass(frozen=True)
class AdaLoRA(LoRA):
    """Ranks from ``initial_factor`` times the cell's rank down to it, where they matter (Zhang et al. 2023).

    The budget shrinks between ``warmup`` and 1 − ``final`` of the steps.
    """

    initial_factor: float = 1.5
    warmup: float = 0.1
    final: float = 0.3

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"

    def adapter(self, lora: LoraConfig, experiment: "Experiment") -> LoraConfig:
        steps, rank = experiment.total_steps, experiment.cell.rank
        if steps < 4:
            raise InputError(f"AdaLoRA needs at least 4 steps to shrink its ranks, but the budget is {steps}")
        return AdaLoraConfig(
            init_r=max(round(self.initial_factor * rank), rank + 1),
            target_r=rank,
            total_step=steps,
            tinit=int(self.warmup * steps),
            tfinal=max(int(self.final * steps), 1),
            task_type=lora.task_type,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.target_modules,
            modules_to_save=lora.modules_to_save,
            fan_in_fan_out=lora.fan_in_fan_out,
            layers_to_transform=lora.layers_to_transform,
        )

    def training(self, network: nn.Module, experiment: "Experiment") -> dict[str, Any]:
        return {"callbacks": [_Allocate(network)]}


class _Allocate(TrainerCallback):
    """Shrinks AdaLoRA's ranks after each step, before the gradients go."""

    def __init__(self, network: Any):
        self.network = network

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.network.base_model.update_and_allocate(state.global_step)


@register
@dataclass(frozen=True)
class PeftMonteCLoRA(LoRA):
    """PEFT's own MonteCLoRA at PEFT's defaults; it predicts at the mean only."""

    num_samples: int = MontecloraConfig.num_samples
    sample_scaler: float = MontecloraConfig.sample_scaler
    kl_loss_weight: float = MontecloraConfig.kl_loss_weight
    dirichlet_prior: float = MontecloraConfig.dirichlet_prior
    use_entropy: bool = MontecloraConfig.use_entropy
    buffer_size: int = MontecloraConfig.buffer_size

    name: ClassVar[str] = "peft_monteclora"
    title: ClassVar[str] = "PEFT MonteCLoRA"

    def adapter(self, lora: LoraConfig, experiment: "Experiment") -> LoraConfig:
        options = {f.name: getattr(self, f.name) for f in fields(MontecloraConfig)}
        return _changed(lora, monteclora_config=MontecloraConfig(**options))

    def training(self, network: Any, experiment: "Experiment") -> dict[str, Any]:
        return {"penalty": lambda _: network.base_model._get_monteclora_loss()}


def _changed(lora: LoraConfig, **options: Any) -> LoraConfig:
    for name, value in options.items():
        setattr(lora, name, value)
    return lora
