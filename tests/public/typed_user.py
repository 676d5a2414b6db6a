"""What mypy says to a user of the installed package: ``make types`` checks this file, nothing runs it.

A call that is marked as wrong and is not reported fails it too, as an ignore that is not used.
"""

from pathlib import Path
from typing import assert_type

import numpy as np
from torch import nn

import bayeslora
from bayeslora import BayesLoRA, BayesTrainer, MonteCLoRAConfig
from bayeslora.analysis import accuracy, expected_calibration_error
from bayeslora.inference.predict import Prediction
from bayeslora.posterior import Posterior
from bayeslora.training.fit import FitResult


def use(network: nn.Module) -> None:
    bayes = BayesLoRA(network, MonteCLoRAConfig(r=4))
    result = bayeslora.fit(bayes, [], output_dir="run", epochs=1)
    assert_type(result, FitResult)
    assert_type(result.output_dir, Path)
    prediction = bayes.predict([], num_samples=4, antithetic=True)
    assert_type(prediction, Prediction)
    assert_type(accuracy(prediction.probs, np.array([0])), float)
    assert_type(bayeslora.BayesLoRA.from_pretrained("run/adapter", network), BayesLoRA)
    assert_type(BayesTrainer(bayes).bayes, Posterior)


def misuse(network: nn.Module) -> None:
    bayes = BayesLoRA(network)
    bayeslora.fit(bayes, [], output_dir="run", epochs="three")  # type: ignore[arg-type]
    bayeslora.fit(bayes, [])  # type: ignore[call-arg]
    bayes.predict([], draws=4)  # type: ignore[call-arg]
    MonteCLoRAConfig(normalization="other")  # type: ignore[arg-type]
    expected_calibration_error([[0.5, 0.5]], [0], bins=3)  # type: ignore[call-arg]
