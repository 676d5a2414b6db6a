"""Draw every picture of ``bayeslora.analysis`` from made-up numbers, and list them in ``docs/gallery.md``.

The numbers come from small generators with known properties (an overconfident forecaster beside a calibrated one, a
network of four layers), so the pictures show what each diagnostic looks like, not what bayeslora achieves.

    python docs/make_gallery.py            # writes docs/gallery.md and docs/gallery/*.png
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import xarray
from matplotlib import pyplot

from bayeslora import analysis

NAMES = [
    f"encoder.layer.{layer}.{kind}"
    for layer in range(4)
    for kind in ("attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense")
]
DRAWS, RANK, COMPONENTS = 64, 8, 4
DEFERRAL_COSTS = [[0, 1, 1], [1, 0, 1], [4, 4, 0]]  # to miss the third class costs four times as much


Picture = tuple[str, str, Callable[[], Any]]  # its name, its caption, and how it is drawn


def forecasts(temperature: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of 800 examples over three classes, calibrated at temperature 1, and labels."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(800, 3))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    powers = np.exp(logits / temperature)
    return powers / powers.sum(axis=1, keepdims=True), labels


def numbers(scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """400 labels, and predictions of their mean and standard deviation, right at scale 1."""
    rng = np.random.default_rng(7)
    mean, std = rng.normal(size=400), rng.uniform(0.5, 1.5, size=400)
    return mean + std * rng.normal(size=400), mean, scale * std


def draws_of_forecasts(spread: float, *, seed: int = 0) -> np.ndarray:
    """Probabilities under 32 draws of 300 examples: ``(draws, examples, classes)``."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(300, 2)) + spread * rng.normal(size=(32, 300, 2))
    powers = np.exp(logits)
    return powers / powers.sum(axis=-1, keepdims=True)


def posterior(*, wide: float = 1.0, seed: int = 0) -> dict[str, xarray.Dataset]:
    """Draws of sixteen adapters as the groups of ArviZ data that the pictures need."""
    rng = np.random.default_rng(seed)
    depth = np.array([int(name.split(".")[2]) for name in NAMES])
    scale = wide * (0.4 + 0.25 * depth + 0.5 * np.array(["dense" in name for name in NAMES]))
    factors = rng.normal(size=(1, DRAWS, len(NAMES), RANK, RANK + 2)) * np.sqrt(scale)[:, None, None]
    covariance = factors @ np.swapaxes(factors, -1, -2) / RANK
    noise = 0.01 * np.sqrt(np.trace(covariance, axis1=-2, axis2=-1) / RANK)
    weights = rng.dirichlet(np.full(COMPONENTS, 2.0), size=(1, DRAWS, len(NAMES)))
    mean = 0.012 * np.exp(0.35 * rng.normal(size=len(NAMES)))
    dims = ("chain", "draw", "adapter")
    variables = {
        "noise_scale": (dims, noise),
        "noise_to_signal": (dims, noise / mean),
        "mixture_weights": ((*dims, "component"), weights),
        "covariance": ((*dims, "rank", "rank_other"), covariance),
    }
    coords = {"adapter": NAMES}
    return {
        "posterior": xarray.Dataset(variables, coords=coords),
        "constant_data": xarray.Dataset({"mean_scale": ("adapter", mean)}, coords=coords),
    }


def variance_parts() -> Any:
    """Shares of four layers in the variance of the logits; together they move it a tenth less than one by one."""
    rng = np.random.default_rng(3)
    layers = rng.normal(size=(DRAWS, 4, 50)) * np.array([0.2, 0.3, 0.6, 1.0])[:, None]
    whole = 0.95 * layers.sum(axis=1, keepdims=True)
    return analysis.variance_shares(
        [f"layer {layer}" for layer in range(4)], np.square(np.concatenate([layers, whole], axis=1)).mean(axis=-1)
    )


def people() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Uncertainty of two methods about 600 sentences, and how their raters' votes differ."""
    rng = np.random.default_rng(4)
    ambiguity = rng.beta(1, 3, size=600) / 2
    disagreement = analysis.vote_entropy(rng.binomial(15, ambiguity) / 15)
    noise = rng.normal(size=(2, 600))
    weights = zip(("LoRA", "posterior predictive"), (0.5, 0.25), noise, strict=True)
    return {name: np.log(2) * np.clip(2 * ambiguity + w * e, 0, 1) for name, w, e in weights}, disagreement


def history() -> list[dict[str, float]]:
    """Logs of a run of 300 steps that learns, and then learns by heart."""
    rng = np.random.default_rng(6)
    steps = np.arange(1, 301)
    task = 0.15 + 0.55 * np.exp(-steps / 60) + 0.05 * rng.normal(size=300)
    log = [
        {"step": s, "elbo/task": t, "elbo/cooperation": 0.25 + 0.1 * np.exp(-s / 90)}
        for s, t in zip(steps.tolist(), task.tolist(), strict=True)
    ]
    return log + [{"step": s, "eval_loss": 0.4 + 0.3 * np.exp(-s / 50) + s / 4000} for s in range(30, 301, 30)]


def ranks() -> dict[str, np.ndarray]:
    """Ranks of the truth among 99 draws, 200 times: of a right posterior, a narrow one, and one that lies too high."""
    rng = np.random.default_rng(7)
    truth = rng.normal(size=(200, 1))
    draws = rng.normal(size=(200, 99))
    variants = {"right": draws, "half as wide": draws / 2, "shifted": draws + 0.7}
    return {name: (values < truth).sum(axis=1) for name, values in variants.items()}


def grid() -> pd.DataFrame:
    """A study's table: two methods over five learning rates, two batch sizes and three seeds, one of them steadier."""
    rng = np.random.default_rng(8)
    rows = []
    for method, seconds, width in (("LoRA", 60.0, 1.0), ("posterior predictive", 66.0, 0.4)):
        for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2):
            off = width * (np.log10(rate) + 3) ** 2
            for batch in (8, 32):
                for seed in range(3):
                    accuracy = 0.8 - 0.05 * off + 0.01 * rng.normal()
                    nll = 0.45 + 0.25 * width + 0.2 * off + 0.02 * rng.normal()
                    common = {
                        "task": "made up",
                        "method": method,
                        "learning_rate": rate,
                        "batch_size": batch,
                        "rank": 8,
                        "seed": seed,
                        "accuracy": accuracy,
                        "nll": nll,
                        "brier": 0.3,
                        "ece": 0.02 + 0.1 * width + 0.03 * off,
                        "train_seconds": seconds * (2 if batch == 8 else 1),
                        "predict_seconds": seconds * (0.02 if method == "LoRA" else 0.3),
                        "examples": 300,
                    }
                    rows += [{**common, "split": split} for split in ("validation", "test")]
    return pd.DataFrame(rows)


def of_the_posterior() -> list[Picture]:
    """Of one adapter's draws, and the training that led to them."""
    data, prior = posterior(), posterior(wide=2.0, seed=1)
    group = data["posterior"]
    noise, before = group["noise_scale"].values[0], prior["posterior"]["noise_scale"].values[0]
    mean = data["constant_data"]["mean_scale"].values
    return [
        (
            "training",
            "What the loss was made of, step by step; it starts to learn by heart where validation rises.",
            lambda: analysis.plot_history(history()),
        ),
        (
            "posterior_spread",
            "Noise over mean of each adapter, draw by draw.",
            lambda: analysis.plot_posterior_spread(data),
        ),
        (
            "effective_components",
            "How many of the four components carry each adapter's mixture, 1/Σπ².",
            lambda: analysis.plot_adapters(
                NAMES,
                analysis.effective_components(group["mixture_weights"].values[0]),
                quantity="effective components  (of 4)",
            ),
        ),
        (
            "contraction",
            "How much narrower than the prior each posterior is.",
            lambda: analysis.plot_contraction(NAMES, noise, before),
        ),
        (
            "layer_map",
            "One number per adapter over the whole network: layers from left to right.",
            lambda: analysis.plot_layer_map(
                NAMES, np.median(noise, axis=0) / mean, quantity="median noise / mean of A  (ratio of RMS)"
            ),
        ),
        (
            "spread_against_mean",
            "Is the noise large because the mean is?",
            lambda: analysis.plot_spread_against_mean(NAMES, mean, noise),
        ),
        (
            "eigenvalues",
            "The column covariance Σ, from its widest direction down.",
            lambda: analysis.plot_eigenvalues(NAMES, analysis.eigenvalues(group["covariance"].values[0])),
        ),
        (
            "draws_needed",
            "How many draws of the posterior are enough for a stated error?",
            lambda: analysis.plot_draws_needed(analysis.draws_needed(draws_of_forecasts(0.6), tolerance=0.02)),
        ),
        (
            "variance_shares",
            "Which layers cause the uncertainty? Bars are shares, lines their intervals.",
            lambda: analysis.plot_variance_shares(variance_parts()),
        ),
    ]


def of_predictions() -> list[Picture]:
    """Of what is predicted, and how right it is."""
    methods = {"LoRA": forecasts(0.45), "posterior predictive": forecasts(1.0)}
    entropies = {
        "LoRA": [draws_of_forecasts(0.0, seed=seed)[0] for seed in (5, 6)],
        "posterior predictive": [draws_of_forecasts(spread, seed=5).mean(axis=0) for spread in (0.2, 1.5)],
    }
    uncertain = {
        name: (analysis.predictive_entropy(probs), probs.argmax(axis=1) != labels)
        for name, (probs, labels) in methods.items()
    }
    parts = {
        name: (analysis.expected_entropy(drawn), analysis.mutual_information(drawn))
        for name, drawn in (("test", draws_of_forecasts(0.4)), ("another domain", draws_of_forecasts(1.5)))
    }
    return [
        (
            "calibration",
            "Reliability diagram with exact binomial intervals.",
            lambda: analysis.plot_calibration(methods),
        ),
        (
            "calibration_equal_mass",
            "The same in bins of equally many examples, with bootstrap intervals.",
            lambda: analysis.plot_calibration(methods, binning="mass", interval="bootstrap"),
        ),
        (
            "interval_coverage",
            "Predicted numbers: how often intervals hold the label, against how often they should.",
            lambda: analysis.plot_interval_coverage({"LoRA": numbers(0.5), "posterior predictive": numbers(1.0)}),
        ),
        ("brier_parts", "What a Brier score is made of.", lambda: analysis.plot_brier_parts(methods)),
        (
            "risk_coverage",
            "Answer only where sure: how many errors are left?",
            lambda: analysis.plot_risk_coverage(uncertain),
        ),
        (
            "deferral",
            "Hand the dearest to a person: what do errors cost then? A marker is where the person's price is.",
            lambda: analysis.plot_deferral(methods, DEFERRAL_COSTS, person=0.5),
        ),
        (
            "detection",
            "Foreign inputs found by their entropy, against false alarms.",
            lambda: analysis.plot_detection(
                {name: tuple(map(analysis.predictive_entropy, pair)) for name, pair in entropies.items()}
            ),
        ),
        (
            "entropy_parts",
            "Noise that stays, and what the draws disagree about.",
            lambda: analysis.plot_entropy_parts(parts),
        ),
        (
            "agreement",
            "Is the model unsure where people disagree?",
            lambda: analysis.plot_agreement(*people(), unit="entropy of the raters' votes  (nats)"),
        ),
    ]


def of_studies() -> list[Picture]:
    """Of many trainings compared."""
    return [
        (
            "grid_spread",
            "Robustness: each method over all settings of a grid.",
            lambda: analysis.plot_grid_spread(grid(), metric="nll"),
        ),
        (
            "learning_rates",
            "How much a method asks of its learning rate: mean and range over batch sizes and seeds.",
            lambda: analysis.plot_learning_rates(grid()),
        ),
        (
            "accuracy_calibration",
            "Each method at its own best setting on validation; best is the lower right corner.",
            lambda: analysis.plot_accuracy_calibration(grid()),
        ),
        ("cost", "What a better likelihood costs in training.", lambda: analysis.plot_cost(grid())),
        (
            "pareto",
            "What a better likelihood costs in prediction: methods that no other beats in both.",
            lambda: analysis.plot_pareto(grid()),
        ),
        (
            "rank_ecdf",
            "Simulation-based calibration: is the posterior right over many data sets?",
            lambda: analysis.plot_rank_ecdf(ranks(), 99),
        ),
    ]


def main(folder: Path) -> list[Path]:
    """Write ``gallery.md`` and its pictures into ``folder``; returns the pictures."""
    pictures = [*of_the_posterior(), *of_predictions(), *of_studies()]
    (folder / "gallery").mkdir(parents=True, exist_ok=True)
    lines = [
        "# Gallery",
        "",
        "Made-up numbers, drawn by `python docs/make_gallery.py`; the functions are those of",
        "`bayeslora.analysis`.",
        "",
    ]
    written = []
    for name, caption, draw in pictures:
        path = folder / "gallery" / f"{name}.png"
        ax = draw()
        ax.figure.savefig(path, dpi=150)
        pyplot.close(ax.figure)
        lines += [f"## {name.replace('_', ' ').capitalize()}", "", caption, "", f"![{caption}](gallery/{name}.png)", ""]
        written.append(path)
    (folder / "gallery.md").write_text("\n".join(lines), encoding="utf-8")
    return written


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    print("\n".join(str(path) for path in main(target)))
