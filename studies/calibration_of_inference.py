"""Is each guide right about its own uncertainty?

Simulation-based calibration on the yardstick: draw adapters from the prior and labels from each of them, infer each
adapter back, and ask where the truth lies among the draws. Guides are fitted to all data sets at once, as adapters of
one network: given the data they are independent. `docs/calibration_of_inference.md` discusses what this prints.

    python studies/calibration_of_inference.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pyro
import torch
from matplotlib import pyplot
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeslora import BayesLoRA
from bayeslora.analysis.metrics.simulation_based_calibration import coverage, ecdf_test, ranks
from bayeslora.analysis.plots.inference import plot_rank_ecdf
from bayeslora.guides import AmortizedGuide, GaussianGuide, MeanFieldGuide
from bayeslora.models import low_rank_regression
from bayeslora.models.low_rank_regression import KnownNoise, LinearNetwork

DRAWS = 99
QUANTITIES = ("entry of A", "prediction", "mixture balance")


class Copies(nn.Module):
    """As many linear layers as there are data sets, all on the same features; ``logits`` (examples, copies)."""

    def __init__(self, weight, count):
        super().__init__()
        self.copies = nn.ModuleList(LinearNetwork(weight.clone()) for _ in range(count))
        self.device = weight.device

    def forward(self, features):
        return SequenceClassifierOutput(logits=torch.cat([copy(features).logits for copy in self.copies], dim=1))


def quantities(problem, A, pi):
    """One entry of A, the adapted output at a new x, and Σπ²: A (..., columns, r), π (..., N) to (..., 3)."""
    new = torch.ones(1, A.shape[-2])
    output = torch.einsum("d,...d->...", problem.design(new)[0, 0], A.double().flatten(-2))
    return torch.stack([A[..., 0, 0].double(), output, pi.double().square().sum(-1)], dim=-1)


def exact(problem, simulations, *, stretch=1.0, shift=0.0):
    """Draws from the closed form, (simulations, draws, 3); stretched and shifted in its standard deviations."""
    distorted = []
    for seed, simulation in enumerate(simulations):
        sites = simulation.posterior_draws(DRAWS, seed=seed)
        draws = quantities(problem, sites[f"A_{problem.group.name}"][:, 0], sites[f"pi_{problem.group.name}"][:, 0, 0])
        distorted.append(draws.mean(0) + stretch * (draws - draws.mean(0)) + shift * draws.std(0))
    return torch.stack(distorted)


def together(problem, simulations, guide):
    """One network with a copy of the yardstick's layer for each data set, and the labels of all."""
    labels = torch.stack([simulation.labels for simulation in simulations], dim=1)
    layer, key = problem.group.adapters[0].layer, problem.group.adapters[0].key
    network = Copies(layer.get_base_layer().weight.detach(), len(simulations))
    bayes = BayesLoRA(network, problem.model.config, guide=guide, likelihood=KnownNoise(problem.noise))
    bayes.num_examples = len(labels)
    for adapter in bayes.model.groups[0].adapters:
        adapter.lora_A.weight.data.copy_(layer.lora_A[key].weight)
        adapter.layer.lora_B[adapter.key].weight.data.copy_(layer.lora_B[key].weight).requires_grad_(False)
    return bayes.train(), {"features": problem.features, "labels": labels}


def fitted(problem, simulations, guide, *, steps):
    """Draws from a guide fitted by SVI; μ is trained with a guide that has none of its own."""
    bayes, batch = together(problem, simulations, guide)
    learns_mean = issubclass(guide, (AutoNormal, AutoLowRankMultivariateNormal))
    bayes.network.requires_grad_(False)
    for adapter in bayes.model.groups[0].adapters:
        adapter.lora_A.weight.requires_grad_(not learns_mean)
    bayes(**batch)  # an autoguide makes its parameters at the first call
    trained = [p for p in bayes.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        bayes(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    return of_sites(problem, bayes, bayes.sample(DRAWS, seed=0))


def nuts(problem, simulations, *, thinning=2):
    """The same by NUTS on the joint density of all data sets."""
    bayes, batch = together(problem, simulations, GaussianGuide)
    bayes.network.requires_grad_(False)
    pyro.set_rng_seed(0)
    kernel = NUTS(bayes.model.joint, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=6)
    sampler = MCMC(kernel, num_samples=thinning * DRAWS, warmup_steps=100, disable_progbar=True)
    sampler.run(**batch)
    return of_sites(problem, bayes, {name: value[::thinning] for name, value in sampler.get_samples().items()})


def of_sites(problem, bayes, sites):
    """Site values (draws, copies, ...) to (copies, draws, 3)."""
    name = bayes.model.groups[0].name
    return quantities(problem, sites[f"A_{name}"], sites[f"pi_{name}"][..., 0, :]).transpose(0, 1)


def main(folder: str = "runs/calibration_of_inference", *, simulations: int = 100, steps: int = 600, chains: int = 20):
    """Print the table, draw the figure, and return the ranks: name of a method to (simulations, 3)."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    problem = low_rank_regression(20, columns=3, rank=2, noise=0.5)
    simulated = [problem.simulate(seed) for seed in range(1, simulations + 1)]
    name = problem.group.name
    truth = torch.stack([quantities(problem, s.truth[f"A_{name}"][0], s.truth[f"pi_{name}"][0, 0]) for s in simulated])
    draws = {
        "exact": exact(problem, simulated),
        "exact, half the scale": exact(problem, simulated, stretch=0.5),
        "exact, shifted by 0.5 sd": exact(problem, simulated, shift=0.5),
        "AutoNormal": fitted(problem, simulated, AutoNormal, steps=steps),
        "GaussianGuide": fitted(problem, simulated, GaussianGuide, steps=steps),
        "MeanFieldGuide": fitted(problem, simulated, MeanFieldGuide, steps=steps),
        "AmortizedGuide": fitted(problem, simulated, AmortizedGuide, steps=steps),
    }
    if chains:
        draws["NUTS"] = nuts(problem, simulated[:chains])
    all_ranks = {method: ranks(truth[: len(values)], values) for method, values in draws.items()}
    print_table(all_ranks)
    draw_figure(all_ranks, Path(folder))
    return all_ranks


def print_table(all_ranks):
    print(f"{'method':26}{'quantity':17}{'data sets':>9}{'p (ECDF)':>10}   coverage of 50, 80, 90 % intervals (%)")
    for method, values in all_ranks.items():
        for column, quantity in enumerate(QUANTITIES):
            shares = 100 * coverage(values[:, column], DRAWS).share
            p = ecdf_test(values[:, column], DRAWS)
            print(f"{method:26}{quantity:17}{len(values):9}{p:10.4f}   {'  '.join(f'{s:3.0f}' for s in shares)}")


def draw_figure(all_ranks, folder):
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(2, 1, figsize=(3.3, 5.4), layout="constrained")
    many = {method: values[:, 1] for method, values in all_ranks.items() if method != "NUTS"}
    plot_rank_ecdf({m: v for m, v in many.items() if m.startswith("exact")}, DRAWS, axes[0])
    plot_rank_ecdf({m: v for m, v in many.items() if not m.startswith("exact")}, DRAWS, axes[1])
    figure.savefig(folder / "calibration_of_inference.png", dpi=200)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
