"""How much do more draws of the preset "calibrated" help, and mirrored pairs, on movies and on Amazon's reviews?

python studies/more_draws.py    # some ten minutes on one free core
"""

import tempfile

import numpy as np
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task
from bayeslora.analysis import area_under_risk_coverage, predictive_entropy

SEED, SUBSETS = 2, 20


def scores(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Accuracy (%), NLL (nats per example) and AURC (%) of probabilities (n, C)."""
    right = probs.argmax(-1) == labels
    nll = -np.log(probs[np.arange(len(labels)), labels]).mean()
    return np.array([100 * right.mean(), nll, 100 * area_under_risk_coverage(predictive_entropy(probs), ~right)])


def main(
    *, model: str = "demo", train_examples: int = 300, test_examples: int = 300, draws: int = 64, epochs: float = 5
) -> dict[tuple[str, str], np.ndarray]:
    """Fit, print a line for each split and way to predict, and return their :func:`scores`."""
    set_seed(SEED)
    task = load_task("sentiment")
    network, tokenizer = task.load_network(model)
    bayes = BayesLoRA(network, MonteCLoRAConfig.preset("calibrated"))
    train = task.encode(tokenizer, "train", limit=train_examples, max_length=64)
    options = {"batch_size": 8, "learning_rate": 1e-3, "train_sampling_strategy": "group_by_length"}
    fit(bayes, train, output_dir=tempfile.mkdtemp(), epochs=epochs, seed=SEED, save_strategy="no", **options)
    rows = {}
    for split in ("test", "amazon"):
        data = task.encode(tokenizer, split, limit=test_examples, max_length=64)
        mean = bayes.predict(data, num_samples=0)
        rows[split, "the mean"] = scores(mean.probs, mean.labels)
        probs = bayes.predict(data, num_samples=2 * draws, antithetic=True).sample_probs
        independent, pairs = probs[::2], (probs[::2] + probs[1::2]) / 2
        rng = np.random.default_rng(0)
        for count in (1, 8, 16, 32, draws):
            for name, members, picked in (("draws", independent, count), ("antithetic draws", pairs, count // 2)):
                if 0 < picked <= draws:
                    subsets = [rng.choice(draws, picked, replace=False) for _ in range(SUBSETS)]
                    averaged = [scores(members[some].mean(0), mean.labels) for some in subsets]
                    rows[split, f"{count} {name}"] = np.mean(averaged, axis=0)
    for (split, name), (accuracy, nll, aurc) in rows.items():
        print(f"{split:7s} {name:19s} accuracy {accuracy:4.1f} %   NLL {nll:.3f}   AURC {aurc:5.2f} %", flush=True)
    return rows


if __name__ == "__main__":
    main()
