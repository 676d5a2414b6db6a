"""Can I use a variational family of my own?

A low-rank Gaussian over all of A, so that its columns may depend on each other, used in `fit`, `predict` and `to_arviz`
as they are. `docs/write_a_guide.md` goes through it.

    python examples/your_own_guide.py
"""

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions.transforms import ReshapeTransform
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task
from bayeslora.analysis import calibration_summary, to_arviz
from bayeslora.guides import Guide


class LowRankGuide(Guide):
    """q(vec A) = N(μ, ε²(U Uᵀ + diag(s²))) for every adapter, with U of a few columns; π and Σ stay at their priors."""

    def __init__(self, model, directions=4):
        super().__init__(model)
        for group in model.groups:
            shape = (len(group), group.columns * group.rank)
            self.register_parameter(f"log_scale_{group.name}", nn.Parameter(torch.full(shape, -0.5)))
            self.register_parameter(f"factor_{group.name}", nn.Parameter(0.1 * torch.randn(*shape, directions)))

    def sample_group(self, group, program):
        adapters, _ = self.plates(group, program)
        with adapters:
            sites = self.sample_priors(group, program)
        epsilon = self.config.sample_scaler
        factor = epsilon * getattr(self, f"factor_{group.name}")
        variance = (epsilon * getattr(self, f"log_scale_{group.name}").exp()).square()
        mean = self.model.mean(group)  # μ, one column of A a row: (adapters, columns, r)
        vector = dist.LowRankMultivariateNormal(mean.flatten(1), factor, variance)
        matrix = dist.TransformedDistribution(vector, ReshapeTransform(mean[0].flatten().shape, mean[0].shape))
        # all entries depend on each other, so they belong to the event: no plates around this site
        return sites | {f"A_{group.name}": program.sample(f"A_{group.name}", matrix.to_event(1))}


def main(
    output_dir: str = "runs/own_guide",
    *,
    model: str = "demo",
    train_examples: int = 500,
    test_examples: int = 200,
    max_steps: int | None = None,
) -> dict:
    """Fit with this guide and with the library's; returns the test scores of both, by name of the guide."""
    scores = {}
    task = load_task("sentiment")
    for guide in (None, LowRankGuide):
        set_seed(0)
        network, tokenizer = task.load_network(model)
        bayes = BayesLoRA(network, MonteCLoRAConfig(), guide=guide)
        name = type(bayes.guide).__name__
        train = task.encode(tokenizer, "train", limit=train_examples, max_length=64)
        fit(bayes, train, output_dir=f"{output_dir}/{name}", epochs=5, max_steps=max_steps)
        test = task.encode(tokenizer, "test", limit=test_examples, max_length=64)
        prediction = bayes.predict(test, num_samples=8)
        scores[name] = calibration_summary(prediction.probs, prediction.labels)
        spread = to_arviz(bayes, num_samples=16)["posterior"]["noise_to_signal"]
        print(
            f"{name:16} accuracy {scores[name]['accuracy']:.3f}  NLL {scores[name]['nll']:.3f}  "
            f"ECE {scores[name]['ece']:.3f}  median noise over signal {float(spread.median()):.2f}"
        )
    return scores


if __name__ == "__main__":
    main()
