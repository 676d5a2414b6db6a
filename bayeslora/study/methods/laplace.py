"""Laplace approximations around a finished training: of the head's last layer, and of all A and B."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from bayeslora.data.batches import Collator, batches_by_length
from bayeslora.errors import InputError
from bayeslora.study.experiment import PREDICTION_BATCH
from bayeslora.study.methods.base import PostHocMethod, register
from bayeslora.study.methods.draws import seeded
from bayeslora.study.outcome import Predict, Predictor, Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment


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


@register
@dataclass(frozen=True)
class LaplaceLoRA(PostHocMethod):
    """Laplace-LoRA (Yang et al. 2024, ICLR): a Gaussian over all A and B, through laplace-torch.

    Its precision is the generalised Gauss-Newton matrix over the training examples, as Kronecker factors or its
    diagonal (``hessian_structure`` ``"kron"`` or ``"diag"``), and a prior's, which maximises the marginal likelihood
    of the training data (``prior_structure``: one for all, ``"scalar"``, or one a matrix, ``"layerwise"``). Logits
    are those of the network linearised in A and B, Gaussian; probabilities are the mean over ``num_logits`` draws of
    them. The head stays as trained. K-FAC is laplace-torch's, through curvlinops: the factor of a layer's inputs and
    that of the gradients at its outputs, each token counted as an example.

    The Jacobian is that of one example at a time, by a backward pass for each class.
    """

    hessian_structure: str = "kron"
    prior_structure: str = "scalar"
    num_logits: int = 1000

    name: ClassVar[str] = "laplace_lora"
    title: ClassVar[str] = "Laplace-LoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(hessian_structure=("kron", "diag"), prior_structure=("scalar", "layerwise"))

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        network = trained.network
        posterior = self.posterior(network, experiment)

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad(), only_lora(network), _for_laplace():
                given = {name: value.clone() for name, value in inputs.items()}
                count = len(next(iter(given.values())))
                parts = [{name: value[i : i + 1] for name, value in given.items()} for i in range(count)]
                options = {"pred_type": "glm", "link_approx": "mc", "n_samples": self.num_logits}
                return torch.cat([posterior(part, **options).detach() for part in parts])[None]

        def predictor(split: str) -> Any:
            with seeded(experiment.cell.seed):
                return experiment.predict(network, experiment.data(split), run)

        yield Predictor(experiment.on_top(self.label), cache(predictor))

    def posterior(self, network: nn.Module, experiment: "Experiment") -> Any:
        """laplace-torch's, fitted to the training examples."""
        collate, device = Collator.for_network(network), next(network.parameters()).device
        size = 8 if self.hessian_structure == "kron" else 1  # a Jacobian of n examples takes n times as long for each
        batches, _ = batches_by_length(experiment.train_data, size)  # where little is padded
        examples: Any = [example for batch in batches for example in batch]
        data: DataLoader[Any] = DataLoader(examples, size, collate_fn=lambda rows: dict(collate(rows).to(device)))
        with only_lora(network), _for_laplace():
            found = _laplace(
                _Outputs(network, experiment),
                "classification",
                subset_of_weights="all",
                hessian_structure=self.hessian_structure,
            )
            found.fit(data)
            found.optimize_prior_precision(method="marglik", prior_structure=self.prior_structure)
        return found


class _Outputs(nn.Module):
    """A network that takes a batch as one argument, as laplace-torch calls it."""

    def __init__(self, network: nn.Module, experiment: "Experiment"):
        super().__init__()
        self.network, self.outputs = network, experiment.outputs

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.outputs(self.network, {name: value for name, value in batch.items() if name != "labels"})


@contextmanager
def only_lora(network: nn.Module) -> Iterator[None]:
    """Inside, nothing but A and B has gradients."""
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    others = [parameter for name, parameter in trained.items() if ".lora_" not in name]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def _for_laplace() -> Iterator[None]:
    """Without warnings about what laplace-torch uses and does, and with an attention that it can vectorize over."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="By default `link_approx` is `probit`")
        yield


def _laplace(*args: Any, **options: Any) -> Any:
    try:
        from laplace import Laplace as make
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch breaks with a RuntimeError
        raise InputError(
            "laplace needs laplace-torch (pip install 'bayeslora[laplace]'); a torchvision, which it lists but does "
            f"not need here, must be from where torch came, or not be installed: {error}"
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
    with _for_laplace():
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
