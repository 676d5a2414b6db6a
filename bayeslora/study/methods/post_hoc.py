"""What can be made of a finished training without another one: temperature, dropout, ensembles, Laplace."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayeslora.analysis import apply_temperature, fit_temperature
from bayeslora.data.batches import batches_by_length
from bayeslora.errors import InputError
from bayeslora.study.experiment import PREDICTION_BATCH
from bayeslora.study.methods.base import AcrossSeeds, PostHocMethod, register
from bayeslora.study.outcome import Predict, Predicted, Predictor, Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment


@register
@dataclass(frozen=True)
class Temperature(PostHocMethod):
    """One number that divides the logits (Guo et al. 2017), fitted to validation labels only."""

    name: ClassVar[str] = "temperature"
    title: ClassVar[str] = "temperature*"

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        if not experiment.has_validation:
            raise InputError(
                f"{self.label!r} needs a labelled validation split besides what is scored; "
                "set hold_out to take one from the training examples"
            )
        yield tempered(experiment.on_top(self.label), predict)


@register
@dataclass(frozen=True)
class MCDropout(PostHocMethod):
    """The mean over passes with every dropout layer at work that was at work in training (Gal and Ghahramani 2016):
    those of the network, of its head, and LoRA's own where ``lora_dropout`` is positive, each at its trained rate."""

    num_samples: int | None = None

    name: ClassVar[str] = "mc_dropout"
    title: ClassVar[str] = "MC dropout"

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        network = trained.network
        if not any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules()):
            raise InputError(
                f"{type(network).__name__} has no dropout at a positive rate, so MC dropout would repeat "
                "one prediction: set lora_dropout in the study's lora options"
            )
        count = self.num_samples or experiment.study.num_samples

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([experiment.outputs(network, inputs).double().softmax(-1) for _ in range(count)])

        def predictor(split: str) -> Any:
            with torch.random.fork_rng():
                torch.manual_seed(experiment.cell.seed)
                network.train()
                try:
                    return experiment.predict(network, experiment.data(split), run)
                finally:
                    network.eval()

        yield Predictor(experiment.on_top(self.label), cache(predictor))


@register
@dataclass(frozen=True)
class CheckpointEnsemble(PostHocMethod):
    """The mean over ``count`` checkpoints, spread evenly over the second half of one training."""

    count: int = 5

    name: ClassVar[str] = "checkpoint_ensemble"
    title: ClassVar[str] = "checkpoint ensemble"

    def checkpoints(self) -> int:
        return self.count

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        members = list(trained.checkpoints)
        if not members:
            raise InputError(f"{self.label!r}: training kept no checkpoint")

        def predictor(split: str) -> Any:
            return _ensemble(trained.network, members, experiment, split)

        yield Predictor(experiment.on_top(self.label), cache(predictor))


@register
@dataclass(frozen=True)
class DeepEnsemble(AcrossSeeds):
    """The mean over the trainings of all seeds (Lakshminarayanan et al. 2017); costs as many trainings."""

    name: ClassVar[str] = "deep_ensemble"
    title: ClassVar[str] = "deep ensemble"

    def combine(self, probs: np.ndarray) -> np.ndarray:
        return probs.mean(0)


@register
@dataclass(frozen=True)
class Laplace(PostHocMethod):
    """A Gaussian from the curvature at the end of training, through laplace-torch.

    It covers the head's last linear layer, with the full generalised Gauss-Newton matrix; everything below stays as
    trained. The prior's precision maximises the marginal likelihood of the training data; predictions are those of the
    linearised layer, with the probit approximation.
    """

    name: ClassVar[str] = "laplace"
    title: ClassVar[str] = "Laplace (last layer)"

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        run = _last_layer_laplace(trained.network, experiment)
        yield Predictor(
            experiment.on_top(self.label),
            cache(lambda split: experiment.predict(trained.network, experiment.data(split), run)),
        )


def tempered(label: str, base: Predict, *, draws: bool = False) -> Predictor:
    """The same with a temperature that is fitted to the labels of the validation split, and to no other."""
    held_out = base("validation")
    temperature = fit_temperature(held_out.probs, held_out.labels)

    def predict(split: str) -> Predicted:
        predicted = base(split)
        return replace(predicted, probs=apply_temperature(predicted.probs, temperature))

    return Predictor(label, predict, draws, {"temperature": temperature})


def _ensemble(network: nn.Module, members: Sequence[Mapping[str, Tensor]], experiment: "Experiment", split: str) -> Any:
    """The mean prediction with each member's values in turn; the network's own are put back."""
    parameters = dict(network.named_parameters())
    own = {name: parameters[name].detach().clone() for name in members[0]}

    def use(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        probs = []
        for member in members:
            use(member)
            probs.append(experiment.outputs(network, inputs).double().softmax(-1))
        return torch.stack(probs)

    try:
        return experiment.predict(network, experiment.data(split), run)
    finally:
        use(own)


def _laplace(*args: Any, **options: Any) -> Any:
    try:
        from laplace import Laplace as make
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch breaks with a RuntimeError
        raise InputError(
            "laplace needs laplace-torch (pip install 'bayeslora[laplace]'), and a torchvision from where "
            f"torch came: {error}"
        ) from error
    return make(*args, **options)


def _last_layer_laplace(network: nn.Module, experiment: "Experiment") -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Laplace on the last linear layer alone, whose inputs the rest of the network computes once."""
    head = _last_linear(network, experiment)
    features: list[Tensor] = []
    seen: list[Tensor] = []

    def remember(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [inputs[0].detach()]

    handle = head.register_forward_pre_hook(remember)

    def run_features(inputs: Mapping[str, Tensor]) -> Tensor:
        logits = experiment.outputs(network, inputs)
        features.append(seen[0])
        return logits.softmax(-1)[None]

    try:
        experiment.predict(network, experiment.train_data, run_features)
        batches, _ = batches_by_length(experiment.train_data, PREDICTION_BATCH)
        labels = torch.tensor([example["labels"] for batch in batches for example in batch])
    finally:
        handle.remove()
    alone = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device=head.weight.device)
    alone.load_state_dict(head.state_dict())
    data = DataLoader(TensorDataset(torch.cat(features).clone(), labels), batch_size=256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what laplace-torch uses
        warnings.filterwarnings("ignore", message="By default `link_approx` is `probit`")
        posterior = _laplace(alone, "classification", subset_of_weights="all", hessian_structure="full")
        posterior.fit(data)
        posterior.optimize_prior_precision(method="marglik")

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        handle = head.register_forward_pre_hook(remember)
        try:
            experiment.outputs(network, inputs)
        finally:
            handle.remove()
        with torch.inference_mode(False), torch.enable_grad():
            return posterior(seen[0].clone(), pred_type="glm", link_approx="probit").detach()[None]

    return run


def _last_linear(network: nn.Module, experiment: "Experiment") -> nn.Linear:
    """The linear layer whose output are the logits."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, _, output: outputs.append((m, output)))
        for module in network.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        probs = experiment.predict(network, experiment.train_data[:2]).probs
    finally:
        for handle in handles:
            handle.remove()
    module, output = outputs[-1]
    if not isinstance(module, nn.Linear) or output.shape != probs.shape:
        raise InputError(
            "laplace on the last layer needs a network that ends in a linear layer on one vector for each "
            f"example; {type(network).__name__} does not"
        )
    return module
