"""How far is MonteCLoRA's estimate from full Bayesian inference, for N components and M draws?

Regressions whose posterior is known; the prior's mean is the adapter before training. The estimate of f(x) at new
inputs is the average of M draws of a guide trained with N components; the reference is the exact posterior mean under
the same N. M is also the number of draws a training step averages: a second table varies both together. Then the
variance of A against N, and the entropy of the mixture against λ_C.

    python studies/finite_mixture_bias.py
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pyro
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.distributions import expected_cooperation
from bayeslora.models import low_rank_regression
from bayeslora.models.low_rank_regression import KnownNoise

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS, OUTPUTS, RANK = 3, 2, 2
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"]  # Okabe and Ito


class SideBySide(nn.Module):
    """Independent regressions in one network, a layer each: one step of training is a step of them all.

    ``features`` of shape ``(examples, regressions, columns)`` to ``(examples, regressions·outputs)``.
    """

    def __init__(self, problems):
        super().__init__()
        self.config = PretrainedConfig()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, OUTPUTS, bias=False) for _ in problems)
        for layer, problem in zip(self.layers, problems, strict=True):
            layer.weight = problem.group.adapters[0].layer.get_base_layer().weight

    @property
    def device(self):
        return self.layers[0].weight.device

    def forward(self, features):
        outputs = [layer(x) for layer, x in zip(self.layers, features.unbind(1), strict=True)]
        return SequenceClassifierOutput(logits=torch.cat(outputs, 1))


def side_by_side(problems, config):
    """MonteCLoRA over all problems, an adapter each, and their data as one batch."""
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r"layers\.\d+")
    bayes = BayesLoRA(get_peft_model(SideBySide(problems), lora), config, likelihood=KnownNoise(problems[0].noise))
    bayes.num_examples = len(problems[0].features)
    with torch.no_grad():
        for adapter, problem in zip(bayes.model.groups[0].adapters, problems, strict=True):
            own = problem.group.adapters[0]
            adapter.lora_A.weight.copy_(own.lora_A.weight)
            adapter.layer.lora_B["default"].weight.copy_(own.layer.lora_B["default"].weight).requires_grad_(False)
    features = torch.stack([problem.features for problem in problems], 1)
    labels = torch.cat([problem.labels for problem in problems], 1)
    return bayes, {"features": features, "labels": labels}


def fit_all(problems, steps, *, cooperation=0.0, kl_weight=1.0, normalization="elbo", **options):
    """Adam on μ, v and α of every problem at once.

    Averages over adapters are sums over the problems here: with ``normalization="paper"``, weights are multiplied by
    their number.
    """
    times = len(problems) if normalization == "paper" else 1
    scale_init = 0.2 / len(problems[0].features)  # near where it ends, so that gradients are quiet from the start
    config = MonteCLoRAConfig(
        sample_scaler=1.0,
        kl_weight=kl_weight * times,
        cooperation=cooperation * times,
        normalization=normalization,
        noise="shared",
        guide="mean_field",
        scale_init=scale_init,
        **options,
    )
    bayes, batch = side_by_side(problems, config)
    optimizer = torch.optim.Adam([p for p in bayes.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        bayes(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    return bayes


@torch.no_grad()
def sample(bayes, count):
    """A of every problem, ``(count, problems, columns·r)``, and π, ``(count, problems, N)``."""
    name = bayes.model.groups[0].name
    draws = [bayes.guide.forward() for _ in range(count)]
    A = torch.stack([draw[f"A_{name}"] for draw in draws])
    return A.flatten(-2), torch.stack([draw[f"pi_{name}"] for draw in draws])[..., 0, :]


@torch.no_grad()
def distance_from_optimum(bayes, problems):
    """Median of v over the v that maximises the expected objective: (ν + n_in) / (ν + ν·n_in + ν·E[c]·t/σ²), t the sum
    of ΦᵀΦ over a row of A (:mod:`bayeslora.guides.mixture` derives the rest)."""
    log_v, log_alpha = bayes.guide.variational_parameters(bayes.model.groups[0])
    squares = expected_cooperation(pyro.distributions.Dirichlet(log_alpha.exp()))
    design = [problem.design(problem.features) for problem in problems]
    curvature = torch.stack([d.square().sum((0, 1)).view(COLUMNS, RANK).sum(0) for d in design])
    data = squares.unsqueeze(-1) * curvature / problems[0].noise ** 2
    return float((log_v.exp() * RANK * (1 + COLUMNS + data) / (RANK + COLUMNS)).median())


def errors(problems, new_features, A, num_particles, num_seeds):
    """Bias, standard deviation and root mean squared error of averages of M draws, and the draws' own spread.

    Of the outputs at new inputs, in units of their exact posterior standard deviation. ``problems`` holds each data set
    ``num_seeds`` times, one after another; variance is over training seeds and draws.
    """
    squared, variance, log_spread = [], [], []
    for first in range(0, len(problems), num_seeds):
        problem = problems[first]
        posterior = problem.posterior()
        exact = problem.outputs(posterior.mean.unsqueeze(0), new_features)[0]
        design = problem.design(new_features)
        deviation = torch.einsum("nod,de,noe->no", design, posterior.covariance, design).sqrt()
        fits = [problem.outputs(A[:, first + k], new_features) for k in range(num_seeds)]
        draws = (torch.stack(fits) - exact) / deviation  # (seeds, draws, inputs, outputs)
        sets = draws.shape[1] // num_particles
        estimates = draws[:, : sets * num_particles].unflatten(1, (sets, num_particles)).mean(2)
        within = estimates.var(1).mean(0)
        between = (estimates.mean(1).var(0) - within / sets).clamp(min=0)
        squared.append(estimates.square().mean((0, 1)))
        variance.append(within + between)
        log_spread.append(draws.std(1).log().mean(0))
    squared, variance = torch.stack(squared).mean(), torch.stack(variance).mean()
    bias = (squared - variance).clamp(min=0)
    return {
        "bias": float(bias.sqrt()),
        "sd": float(variance.sqrt()),
        "rmse": float(squared.sqrt()),
        "spread": float(torch.stack(log_spread).mean().exp()),
    }


def bias_of_the_optimum(problems, new_features):
    """The bias of training that converges: KL does not see μ, so the best μ is the least-squares fit."""
    squared = []
    for problem in problems:
        design, target = problem.design(problem.features), problem.labels.reshape(len(problem.features), OUTPUTS)
        target = target - problem.outputs(torch.zeros(1, COLUMNS * RANK), problem.features)[0]
        fitted = torch.linalg.lstsq(design.flatten(0, 1), target.flatten()).solution
        posterior, design = problem.posterior(), problem.design(new_features)
        variance = torch.einsum("nod,de,noe->no", design, posterior.covariance, design)
        squared.append(((design @ (fitted - posterior.mean)).square() / variance).mean())
    return float(torch.stack(squared).mean().sqrt())


def same_data(num_examples, num_components, seed, noise):
    """A data set that does not depend on N (its adapter is drawn with N = 4), as a problem with N components."""
    sizes = {"columns": COLUMNS, "outputs": OUTPUTS, "rank": RANK, "seed": seed, "noise": noise}
    source = low_rank_regression(num_examples, num_components=4, **sizes)
    problem = low_rank_regression(num_examples, num_components=num_components, **sizes)
    return dataclasses.replace(problem, labels=source.labels, truth=source.truth, num_draws=20_000)


HEADER = f"{'n':>4}{'N':>4}{'M':>4}" + "".join(
    f"{name:>8}" for name in ("bias", "sd", "rmse", "spread", "limit", "E c", "var A", "v/best")
)


class Study(NamedTuple):
    """Sizes shared by all tables; each table starts from the same seed, so each can be made alone."""

    num_data_sets: int = 6
    num_seeds: int = 2
    num_draws: int = 200
    noise: float = 0.5

    @property
    def new_features(self):
        return torch.randn(25, COLUMNS, generator=torch.Generator().manual_seed(99))

    def problems(self, n, N):
        return [same_data(n, N, seed, self.noise) for seed in range(self.num_data_sets) for _ in range(self.num_seeds)]

    def rows(self, n, N, chosen, steps, **options):
        """One fit, and a row for each M in ``chosen``."""
        problems = self.problems(n, N)
        bayes = fit_all(problems, steps, num_components=N, **options)
        A, pi = sample(bayes, self.num_draws)
        common = {
            "limit": bias_of_the_optimum(problems, self.new_features),
            "E c": float(pi.square().sum(-1).mean()),
            "var A": float(A.var(0).mean()),
            "v/best": distance_from_optimum(bayes, problems),
        }
        results = {M: errors(problems, self.new_features, A, M, self.num_seeds) | common for M in chosen}
        for M, row in results.items():
            print(f"{n:4}{N:4}{M:4}" + "".join(f"{value:8.3f}" for value in row.values()), flush=True)
        return results

    def bias(self, sizes, components, particles, steps):
        """(n, N, M) to a row: one fit for each n and N, from which averages of M draws are taken."""
        pyro.set_rng_seed(0)
        print(f"Mean of f(x) against the exact posterior's, in posterior standard deviations\n{HEADER}")
        results = {(n, N): self.rows(n, N, particles, steps) for n in sizes for N in components}
        return {(*key, M): row for key, rows in results.items() for M, row in rows.items()}

    def training(self, n, particles, steps):
        """M to a row, with N = 4 and M draws in each training step as well."""
        pyro.set_rng_seed(0)
        print(f"\nTrained with M draws a step as well\n{HEADER}")
        return {M: self.rows(n, 4, [M], steps, num_particles=M)[M] for M in particles}

    def variance(self, components, table):
        """N to the measured variance of an entry of A − μ under the prior, over ε²; prints the fits' too."""
        pyro.set_rng_seed(0)
        print("\nVariance of an entry of A around μ: prior, π ~ Dir(1), measured and 2/(N + 1); after the fits above")
        variance = {}
        for N in components:
            pi = pyro.distributions.Dirichlet(torch.ones(N)).sample((2000,))
            variance[N] = float(torch.einsum("sk,sk->s", pi, torch.randn(2000, N)).var())
            fitted = {n: row["var A"] for (n, size, _), row in table.items() if size == N}
            print(
                f"N = {N:3}   {variance[N]:.3f}   {2 / (N + 1):.3f}"
                + "".join(f"   n = {n}: {value:.4f}" for n, value in fitted.items())
            )
        return variance

    def entropy(self, n, cooperations, steps):
        """(objective, λ_C) to the mean entropy of π over log N, N = 4."""
        pyro.set_rng_seed(0)
        print("\nEntropy of π, of log N = 1, against λ_C; and the draws' spread over the posterior's")
        problems, entropy = self.problems(n, 4), {}
        paper = {"normalization": "paper", "kl_weight": 1e-5}
        for objective, options in {"elbo": {}, "paper, η = 1e-5": paper}.items():
            for weight in cooperations:
                bayes = fit_all(problems, steps, num_components=4, cooperation=weight, **options)
                A, pi = sample(bayes, self.num_draws)
                entropy[objective, weight] = float(-(pi * pi.log()).sum(-1).mean() / math.log(4))
                spread = errors(problems, self.new_features, A, 1, self.num_seeds)["spread"]
                effective = float((1 / pi.square().sum(-1)).mean())
                print(
                    f"{objective:16} λ_C = {weight:5}: entropy {entropy[objective, weight]:.3f}, "
                    f"effective components {effective:.2f}, spread {spread:.3f}",
                    flush=True,
                )
        return entropy


def main(
    figure: str = "runs/finite_mixture_bias.png",
    *,
    sizes: tuple[int, ...] = (5, 20, 80),
    components: tuple[int, ...] = (1, 2, 4, 8, 16),
    particles: tuple[int, ...] = (1, 2, 4, 8),
    cooperations: tuple[float, ...] = (0, 0.1, 1, 10, 100),
    steps: int = 250,
    fewer_steps: int = 150,
    study: Study | None = None,
) -> dict:
    """Everything above, the last tables with ``fewer_steps``; writes the figure and returns the numbers."""
    study = study or Study()
    middle = sizes[len(sizes) // 2]
    table = study.bias(sizes, components, particles, steps)
    training = study.training(middle, particles, fewer_steps)
    variance = study.variance(components, table)
    entropy = study.entropy(middle, cooperations, fewer_steps)
    _plot(table, entropy, sizes, components, particles, figure)
    return {"table": table, "training": training, "variance": variance, "entropy": entropy}


def _plot(table, entropy, sizes, components, particles, path):
    figure, axes = plt.subplots(1, 3, figsize=(7.6, 3), layout="constrained")
    last = particles[-1]
    for color, n in zip(COLORS, sizes, strict=False):
        axes[0].plot(components, [table[n, N, last]["bias"] for N in components], "o", color=color, label=f"n = {n}")
        axes[0].plot(components, [table[n, N, last]["limit"] for N in components], "-", color=color)
        axes[1].plot(components, [table[n, N, last]["spread"] for N in components], "o-", color=color)
    axes[0].set_title("bias in posterior sds:\nmeasured (dots), converged (lines)", fontsize=8)
    axes[1].set_title("sd of f(x) over\nthe posterior's", fontsize=8)
    axes[1].axhline(1, color="0.5", linewidth=1)
    for axis in axes[:2]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(components, components)
        axis.set_xlabel("components N")
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    objectives = list(dict.fromkeys(objective for objective, _ in entropy))
    for color, marker, objective in zip(COLORS[3:], "D^", objectives, strict=False):
        points = [(weight, value) for (name, weight), value in entropy.items() if name == objective]
        axes[2].plot(range(len(points)), [value for _, value in points], marker + "-", color=color, label=objective)
        axes[2].set_xticks(range(len(points)), [f"{weight:g}" for weight, _ in points])
    axes[2].set_ylim(0.82, 1)
    axes[2].set_xlabel("λ_C")
    axes[2].set_title("entropy of π / log N,\nN = 4", fontsize=8)
    axes[2].legend(frameon=False, fontsize=8, loc="lower right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    main()
