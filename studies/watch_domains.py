"""Does watching predictions notice other domains?

Fits posteriors to movie sentences, and compares sets of sentences of each domain with movies that were not trained on,
as ``bayeslora watch`` does. Prints the share of the sets that are said to differ: of test, movies too, at most the
level is wanted, and elsewhere as much as possible.

    python studies/watch_domains.py
"""

from collections.abc import Sequence

import numpy as np
from transformers import set_seed

from bayeslora import BayesLoRA, fit, load_task
from bayeslora.analysis import shift_tests
from bayeslora.prediction import Prediction

DOMAINS = ("test", "amazon", "nytimes", "tweets")


def main(
    output_dir: str = "runs/watch_domains",
    *,
    model: str = "demo",
    train_examples: int = 500,
    reference_examples: int = 300,
    domain_examples: int = 800,
    set_size: int = 200,
    sets: int = 20,
    level: float = 0.01,
    seeds: Sequence[int] = (0, 1, 2),
    num_samples: int = 8,
    max_steps: int | None = None,
) -> dict[str, np.ndarray]:
    """Print the table; returns the shares of sets that differ, one for each seed, by domain."""
    task = load_task("sentiment")
    found: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
    for seed in seeds:
        set_seed(seed)
        network, tokenizer = task.load_network(model)
        bayes = BayesLoRA(network)
        train = task.encode(tokenizer, "train", limit=train_examples, max_length=64, seed=seed)
        budget = {"max_steps": max_steps} if max_steps else {"epochs": 5}
        fit(bayes, train, output_dir=f"{output_dir}/{seed}", seed=seed, progress=False, **budget)

        def said(split: str, limit: int, bayes: BayesLoRA = bayes, tokenizer: object = tokenizer) -> Prediction:
            examples = task.encode(tokenizer, split, limit=limit, max_length=64, labelled=False)
            return bayes.predict(examples, num_samples=num_samples, progress=False)

        reference = said("validation", reference_examples)
        rng = np.random.default_rng(seed)
        for domain in DOMAINS:
            stream = said(domain, domain_examples)
            differs = []
            for _ in range(sets):
                rows = rng.choice(len(stream.probs), set_size, replace=False)
                tests = shift_tests(
                    (reference.probs, reference.mutual_information),
                    (stream.probs[rows], stream.mutual_information[rows]),
                    num_resamples=999,
                )
                differs.append(min(test.p_value for test in tests) <= level)
            found[domain].append(float(np.mean(differs)))
            print(f"seed {seed}, {domain}: {found[domain][-1]:.2f} of {sets} sets differ", flush=True)
    print("\n| domain | sets that differ (%), mean over seeds |\n|---|---:|")
    for domain, shares in found.items():
        print(f"| {domain} | {100 * np.mean(shares):.0f} |")
    return {domain: np.array(shares) for domain, shares in found.items()}


if __name__ == "__main__":
    main()
