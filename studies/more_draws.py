"""How much do more draws of the preset "calibrated" help, and mirrored pairs, on movies and on Amazon's reviews?

python studies/more_draws.py    # some ten minutes on one free core
"""

import tempfile

import numpy as np
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task
from bayeslora.analysis import area_under_risk_coverage, predictive_entropy

SEED, DRAWS, SUBSETS = 2, 64, 20


def scores(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Accuracy (%), NLL (nats per example) and AURC (%) of probabilities (n, C)."""
    right = probs.argmax(-1) == labels
    nll = -np.log(probs[np.arange(len(labels)), labels]).mean()
    return np.array([100 * right.mean(), nll, 100 * area_under_risk_coverage(predictive_entropy(probs), ~right)])


set_seed(SEED)
task = load_task("sentiment")
network, tokenizer = task.load_network("demo")
bayes = BayesLoRA(network, MonteCLoRAConfig.preset("calibrated"))
fit(bayes, task.encode(tokenizer, "train", limit=300, max_length=64), output_dir=tempfile.mkdtemp(), epochs=5,
    batch_size=8, learning_rate=1e-3, seed=SEED, save_strategy="no",
    train_sampling_strategy="group_by_length")  # fmt: skip
for split in ("test", "amazon"):
    data = task.encode(tokenizer, split, limit=300, max_length=64)
    found = {"the mean": scores((mean := bayes.predict(data, num_samples=0)).probs, mean.labels)}
    draws = bayes.predict(data, num_samples=2 * DRAWS, antithetic=True).sample_probs
    independent, pairs = draws[::2], (draws[::2] + draws[1::2]) / 2
    rng = np.random.default_rng(0)
    for count in (1, 8, 16, 32, DRAWS):
        for name, members, picked in (("draws", independent, count), ("antithetic draws", pairs, count // 2)):
            if picked:
                subsets = [rng.choice(DRAWS, picked, replace=False) for _ in range(SUBSETS)]
                averaged = [scores(members[some].mean(0), mean.labels) for some in subsets]
                found[f"{count} {name}"] = np.mean(averaged, axis=0)
    for name, (accuracy, nll, aurc) in found.items():
        print(f"{split:7s} {name:19s} accuracy {accuracy:4.1f} %   NLL {nll:.3f}   AURC {aurc:5.2f} %", flush=True)
