"""Is the model unsure where people disagree?

Fits LoRA and a posterior to 500 movie sentences, and ranks the sentences of two domains by how unsure each is. Every
sentence was rated by 15 or more people: their disagreement is the standard deviation of the ratings, or the entropy of
their votes for positive and negative. Spearman's correlations, their mean over seeds, with 95 % bootstrap intervals.

    python studies/against_people.py
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task
from bayeslora.analysis import expected_entropy, plot_agreement, rank_correlation, vote_entropy
from bayeslora.analysis.metrics.bootstrap import Interval

SPLITS = ("test", "tweets")
PEOPLE = ("spread of ratings", "entropy of votes")


def main(
    output_dir: str = "runs/against_people",
    *,
    model: str = "demo",
    seeds: Sequence[int] = (0, 1, 2),
    train_examples: int = 500,
    test_examples: int = 500,
    num_samples: int = 8,
    max_steps: int | None = None,
) -> dict[tuple[str, str, str], Interval]:
    """Print the table, write ``against_people.png``, and return the intervals by (split, uncertainty, people)."""
    task = load_task("sentiment")
    runs: dict[tuple[str, str], list[np.ndarray]] = {}  # (split, uncertainty) to that of every sentence, by seed

    def run(method: str, config: MonteCLoRAConfig, seed: int) -> None:
        set_seed(seed)
        network, tokenizer = task.load_network(model)
        bayes = BayesLoRA(network, config)
        train = task.encode(tokenizer, "train", limit=train_examples, max_length=64)
        fit(bayes, train, output_dir=Path(output_dir) / f"{method}-{seed}", epochs=5, max_steps=max_steps, seed=seed)
        for split in SPLITS:
            data = task.encode(tokenizer, split, limit=test_examples, max_length=64)
            prediction = bayes.predict(data, num_samples=num_samples)
            measures = {"LoRA, entropy": prediction.entropy}
            if method == "posterior":
                measures = {
                    "posterior, entropy": prediction.entropy,
                    "posterior, aleatoric part": expected_entropy(prediction.sample_probs),
                    "posterior, mutual information": prediction.mutual_information,
                }
            for name, values in measures.items():
                runs.setdefault((split, name), []).append(values)

    for seed in seeds:
        run("LoRA", MonteCLoRAConfig(sample_scaler=0.0), seed)
        run("posterior", MonteCLoRAConfig(), seed)

    table = {}
    print(f"{'':38}{PEOPLE[0]:>26}{PEOPLE[1]:>26}")
    for split in SPLITS:
        rows = task.split(split, limit=test_examples)
        votes = vote_entropy(rows["share_positive"][:])
        people = dict(zip(PEOPLE, (np.array(rows["rating_sd"][:]), votes), strict=True))
        methods = {name: np.stack(values, axis=1) for (where, name), values in runs.items() if where == split}
        for name, uncertainty in methods.items():
            cells = []
            for kind, disagreement in people.items():
                correlation = table[split, name, kind] = rank_correlation(uncertainty, disagreement)
                cells.append(f"{correlation.estimate:.3f} ({correlation.lower:.3f} to {correlation.upper:.3f})")
            print(f"{split:8}{name:30}{cells[0]:>26}{cells[1]:>26}")
        if split == "test":
            ax = plot_agreement(
                methods, votes, unit="entropy of the raters' votes  (nats)", quantity="uncertainty  (nats)"
            )
            ax.figure.savefig(Path(output_dir) / "against_people.png", dpi=200)
    return table


if __name__ == "__main__":
    main()
