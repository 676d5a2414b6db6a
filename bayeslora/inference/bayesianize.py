"""A posterior over a finished adapter: the mean is the adapter as it is, and only the noise around it is found."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from bayeslora.adapters.groups import active_adapter, lora_layers
from bayeslora.config import MonteCLoRAConfig
from bayeslora.data.rows import check_kind
from bayeslora.errors import InputError
from bayeslora.inference.shapes import SHAPES, Shape, curvature_shape, isotropic_shape, output_shape
from bayeslora.inference.tuning import check_tunable, tune
from bayeslora.models.likelihoods import UNLABELLED
from bayeslora.models.tuning import Tuning
from bayeslora.posterior import Posterior

Module = TypeVar("Module", bound=Posterior)

AGREEMENT = 0.97


def from_adapter(
    cls: Callable[..., Module],
    network: nn.Module,
    dataset: Any,
    *,
    shape: str = "isotropic",
    width: float | str | None = None,
    agreement: float = AGREEMENT,
    with_temperature: bool = False,
    config: MonteCLoRAConfig | None = None,
    likelihood: Any = None,
    num_samples: int = 16,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Module:
    """Put a posterior on a trained LoRA adapter, without training.

    The mean is the adapter, bit for bit. A − μ has a shape (:mod:`bayeslora.inference.shapes`) and one width, which is
    found on examples that the adapter was not trained on. What it knows by heart no noise changes, so training examples
    ask for far too much of it.

    Args:
        cls: What to make: the class of the posterior.
        network: A ``PeftModel`` with one active, trained LoRA adapter; whatever trained it.
        dataset: Encoded examples that it was not trained on, 20 or more, as for ``predict``. Labels are optional.
        shape: ``"isotropic"``, ``"output"`` or ``"curvature"``, which takes a gradient for each example too.
        width: ``"labels"``: the width that predicts the labels best, zero included. ``"agreement"``: the largest that
            leaves ``agreement`` of the network's answers alone, of classes, without labels. A number: this width; 1 is
            noise as large as A itself. ``None``: by labels where ``dataset`` has them, else by agreement.
        agreement: As in :func:`bayeslora.inference.tuning.tune`.
        with_temperature: As there: choose a temperature too, by labels.
        config: Hyperparameters of the noise (``num_components``, ``degrees_of_freedom``, ``mixture``, ``guide``, ...);
            what is said of its size, units, schedule and mode is set here.
        likelihood: See :class:`bayeslora.models.MonteCLoRA`.
        num_samples, batch_size, seed, progress: As in ``predict``.

    Returns:
        The posterior, in evaluation mode, with its width in ``tuning``.

    Raises:
        InputError: for a network without a trained adapter (B is zero), no data or too little, a shape or a width that
            there is not, and what cannot be sampled.
    """
    _check(network, shape, width, with_temperature)
    fixed = {
        "mode": "post_hoc",
        "sample_scaler": 1.0,
        "noise_units": "trained",
        "noise_schedule": "constant",
        "wishart_scale": "diagonal" if shape == "isotropic" else "full",
    }
    bayes = cls(network, (config or MonteCLoRAConfig()).replace(**fixed), likelihood=likelihood)
    check_kind(dataset)
    set_shape(bayes, _shape(bayes, shape, dataset, batch_size, seed))
    bayes.eval()
    if isinstance(width, int | float):
        bayes.model.tuning = Tuning(float(width))
    else:
        find_width(
            bayes,
            dataset,
            rule=width,
            agreement=agreement,
            with_temperature=with_temperature,
            num_samples=num_samples,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    return bayes


def find_width(
    bayes: Posterior, dataset: Any, *, rule: str | None, agreement: float, with_temperature: bool, **options: Any
) -> None:
    """Tune by ``rule``, as ``width`` of :func:`from_adapter` has it."""
    check_tunable(bayes, dataset)
    if (rule or ("labels" if _are_labelled(bayes, dataset) else "agreement")) == "labels":
        tune(bayes, dataset, with_temperature=with_temperature, **options)
    elif with_temperature:
        raise InputError("a temperature is found by labels, and these examples have none: leave with_temperature out")
    else:
        tune(bayes, dataset, agreement=agreement, **options)


def _check(network: nn.Module, shape: str, width: Any, with_temperature: bool) -> None:
    if not isinstance(network, PeftModel):
        raise InputError(
            f"from_adapter takes a PeftModel with a trained adapter, such as peft.PeftModel.from_pretrained gives, got "
            f"a {type(network).__name__}"
        )
    if shape not in SHAPES:
        raise InputError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    number = isinstance(width, int | float) and not isinstance(width, bool)
    if not (number or width in (None, "labels", "agreement")):
        raise InputError(f"width must be 'labels', 'agreement' or a number of at least 0, got {width!r}")
    if with_temperature and (number or width == "agreement"):
        raise InputError("a temperature is found by labels, with the width: leave width out, or with_temperature")
    key = active_adapter(network)
    trained = [layer.lora_B[key].weight for _, layer in lora_layers(network) if key in layer.lora_B]
    if trained and not any(bool(matrix.any()) for matrix in trained):
        raise InputError(
            "every lora_B of this adapter is zero, as PEFT starts it: nothing was trained, and no noise in lora_A "
            "would reach the network; give the adapter that training saved"
        )


def _shape(bayes: Posterior, shape: str, dataset: Any, batch_size: int, seed: int) -> Shape:
    if shape == "curvature":
        return curvature_shape(bayes.model, dataset, batch_size=batch_size, seed=seed)
    return output_shape(bayes.model.groups) if shape == "output" else isotropic_shape(bayes.model.groups)


def set_shape(bayes: Posterior, shape: Shape) -> None:
    """Give the noise this shape, and the size that goes with it at width 1."""
    if bayes.monteclora_config.wishart_scale == "full":
        bayes.model.set_wishart_factors(shape.factors)
    bayes.model.set_noise_units(getattr(bayes.guide, "noise_variance", lambda group: None), shape.deviations)


def _are_labelled(bayes: Posterior, dataset: Any) -> bool:
    """Whether every example has a label that is one."""
    if bayes.model.labelling.evaluates_labels:
        return True
    labels = [dataset[index].get("labels", UNLABELLED) for index in range(len(dataset))]
    return not any((np.asarray(label) == UNLABELLED).any() for label in labels)


@torch.no_grad()
def absorb_width(bayes: Posterior) -> None:
    """Make the tuned width part of the noise's own size, for the guide to be trained from there.

    Raises:
        InputError: where the width is 0: there is no noise to train.
    """
    tuning = bayes.model.tuning
    if tuning is None:
        return
    if tuning.width == 0:
        raise InputError("the width that was found is 0, the adapter as it is: there is no noise to train")
    bayes.model.tuning = None
    for group in bayes.model.groups:
        units = bayes.model.noise_units(group)
        assert units is not None  # a posterior of from_adapter has them
        units.mul_(tuning.width)
