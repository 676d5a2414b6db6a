"""How close is each guide to the posterior that it approximates?

Fits MonteCLoRA to a regression of 20 examples whose posterior is known, holds the μ that it found (the prior's mean
too), and compares guides fitted by SVI, and importance weights on one of them, with NUTS on the same model.

    python studies/compare_with_nuts.py
"""

import math
from pathlib import Path

import arviz as az
import matplotlib
import numpy as np
import pyro
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

from bayeslora import CooperativeELBO
from bayeslora.guides import GUIDES
from bayeslora.inference.mcmc import run_nuts
from bayeslora.models import low_rank_regression

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    **GUIDES,
    "AutoNormal": AutoNormal,
    "AutoLowRankMVN": AutoLowRankMultivariateNormal,
    "AutoMVN": AutoMultivariateNormal,
}
WEIGHTED = ("mean_field", "gaussian")  # those whose draws are importance-weighted too
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000"]  # Okabe and Ito


def fit_by_svi(problem, guide, steps):
    """Maximise the ELBO over whatever is trainable, with a learning rate that falls from 0.1 to 0.001."""
    pyro.clear_param_store()
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(problem.model, guide, optimizer, loss=CooperativeELBO(1.0, 0.0, "elbo"))
    for _ in range(steps):
        svi.step(**problem.batch)


@torch.no_grad()
def weighted_draws(problem, guide, count):
    """Draws of the sites, name to ``(count, *shape)``, and log p(sites, labels) − log q(sites), ``(count,)``."""
    draws, log_weights = {name: [] for name in problem.truth}, []
    for _ in range(count):
        ours = pyro.poutine.trace(guide).get_trace(**problem.batch)
        theirs = pyro.poutine.trace(pyro.poutine.replay(problem.model, trace=ours)).get_trace(**problem.batch)
        log_weights.append(theirs.log_prob_sum() - ours.log_prob_sum())
        for name, values in draws.items():
            values.append(ours.nodes[name]["value"])
    return {name: torch.stack(values) for name, values in draws.items()}, torch.stack(log_weights)


def importance_bound(log_weights, size):
    """The bound of Burda et al. (2016) with ``size`` draws, averaged over as many disjoint sets as there are."""
    sets = log_weights[: len(log_weights) // size * size].view(-1, size)
    return float((sets.logsumexp(1) - math.log(size)).mean())


def summary(problem, test, reference, draws):
    """One row of the table: draws against the reference draws of the posterior."""
    A, truth = (sites[f"A_{problem.group.name}"].flatten(1).double() for sites in (draws, reference))
    ratio = A.std(0) / truth.std(0)
    low, high = A.quantile(0.05, dim=0), A.quantile(0.95, dim=0)
    outputs = {"A": problem.outputs(A, test.features), "truth": problem.outputs(truth, test.features)}
    likelihood = torch.distributions.Normal(outputs["A"], problem.noise).log_prob(test.labels.double()).sum(-1)
    factor = draws[f"sigma_tril_{problem.group.name}"].double()
    return {
        "mean error": float(((A.mean(0) - truth.mean(0)) / truth.std(0)).square().mean().sqrt()),
        "sd ratio": float(ratio.log().mean().exp()),
        "lowest": float(ratio.min()),
        "highest": float(ratio.max()),
        "mass of 90 %": float(((truth >= low) & (truth <= high)).double().mean()),
        "sd of f": float((outputs["A"].std(0) / outputs["truth"].std(0)).log().mean().exp()),
        "log density": float((likelihood.logsumexp(0) - math.log(len(A))).mean()),
        "E c": float(problem.squared_weights(draws[f"pi_{problem.group.name}"]).mean()),
        "E tr Σ": float(factor.square().sum((-2, -1)).mean()),
    }


def main(
    figure: str = "runs/compare_with_nuts.png",
    *,
    steps: int = 400,
    num_draws: int = 200,
    num_warmup: int = 120,
    max_tree_depth: int = 10,
    guide_draws: int = 400,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Fit, sample, print the table and write the figure; returns the table, a row a method."""
    pyro.set_rng_seed(seed)
    problem = low_rank_regression(20, outputs=2, seed=seed, scale_init=0.05)  # near where it ends: fewer steps
    test = problem.with_features(torch.randn(200, 3), seed=seed)

    guides = {"mean_field": GUIDES["mean_field"](problem.model)}
    start = problem.mean
    fit_by_svi(problem, guides["mean_field"], steps)  # μ too
    problem.network.requires_grad_(False)
    print(f"μ moved by {float((problem.mean - start).norm()):.2f}; everything below is given the μ it has now")
    for name, make in METHODS.items():
        if name not in guides:
            guides[name] = make(problem.model)
            fit_by_svi(problem, guides[name], steps)

    sites, divergences = run_nuts(
        problem.model,
        problem.batch,
        num_draws=num_draws,
        num_warmup=num_warmup,
        max_tree_depth=max_tree_depth,
        seed=seed,
    )
    A = sites[f"A_{problem.group.name}"].flatten(2).numpy()
    print(
        f"NUTS: 2 chains of {num_draws}, {divergences} divergences, R-hat of A at most "
        f"{max(float(az.rhat(a)) for a in A.transpose(2, 0, 1)):.3f}, ESS at least "
        f"{min(float(az.ess(a)) for a in A.transpose(2, 0, 1)):.0f}"
    )

    reference = {name: values.flatten(0, 1) for name, values in sites.items()}
    draws = {"exact": problem.posterior_draws(5000, seed=seed), "NUTS": reference}
    evidence, error = problem.log_evidence()
    gaps, lines = {}, [f"log evidence {evidence:.3f} ± {error:.3f}"]
    for name, guide in guides.items():
        draws[name], log_weights = weighted_draws(problem, guide, guide_draws)
        gaps[name] = evidence - float(log_weights.mean())
        if name in WEIGHTED:
            weights = log_weights.softmax(0)
            resampled = torch.multinomial(weights, guide_draws, replacement=True)
            draws[f"{name}, weighted"] = {site: values[resampled] for site, values in draws[name].items()}
            sizes = [size for size in (1, 10, 100, guide_draws) if size <= guide_draws]
            bounds = ", ".join(f"{size} draws {importance_bound(log_weights, size):.3f}" for size in sizes)
            effective = float(1 / weights.square().sum())
            lines.append(f"{name}: bounds by {bounds}; effective sample size {effective:.0f} of {guide_draws}")

    table = {name: summary(problem, test, reference, values) for name, values in draws.items()}
    columns = [*next(iter(table.values())), "gap (nats)"]
    print(f"\n{'':22}" + "".join(f"{column:>14}" for column in columns))
    for name, row in table.items():
        row["gap (nats)"] = gaps.get(name, math.nan)
        print(f"{name:22}" + "".join(f"{value:14.3f}" for value in row.values()))
    print("\n" + "\n".join(lines))
    _plot(problem, draws, figure)
    return table


def _plot(problem, draws, path):
    """How wide each guide is, entry by entry, and the shape of two entries' joint posterior."""
    names = [name for name in draws if name not in ("exact", "NUTS") and "weighted" not in name]
    A = {name: values[f"A_{problem.group.name}"].flatten(1).numpy() for name, values in draws.items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
    right.plot(*A["NUTS"][:, :2].T, ".", color="0.8", markersize=3, zorder=0)
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = math.sqrt(2 * math.log(10)) * np.stack([np.cos(angle), np.sin(angle)])
    styles = ["-", "--", ":", "-.", (0, (6, 2)), (0, (1, 3)), (0, (3, 1, 1, 1, 1, 1))]
    for row, (name, color, style) in enumerate(zip(names, COLORS, styles, strict=False)):
        ratio = A[name].std(0) / A["NUTS"].std(0)
        left.plot(ratio, np.full(len(ratio), row), "o", color=color, alpha=0.7)
        root = np.linalg.cholesky(np.cov(A[name][:, :2].T))
        right.plot(*(A[name][:, :2].mean(0)[:, None] + root @ circle), color=color, linestyle=style, linewidth=1.5)
        left.plot([], [], color=color, linestyle=style, label=name)
    left.axvline(1, color="0.4", linewidth=1)
    left.set_xlim(0.3, 1.15)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("sd of an entry of A, relative to NUTS")
    right.set_xlabel("$A_{11}$")
    right.set_ylabel("$A_{21}$")
    right.set_title("draws of NUTS; 90 % ellipses of the guides", fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    main()
