"""Does the model notice questions it was not made for?

Fits LoRA and a posterior to three tasks and asks whether their uncertainty tells foreign inputs from the task's own:
CLINC's out-of-scope questions from its 150 intents, tweets from movie sentences, and news (AG News) from SST-2. Prints
AUROC (0.5 is guessing), AUPR and FPR95, means over seeds. Takes about 40 minutes on one core.

    python studies/out_of_scope.py                     # data sets from the hub
    python studies/out_of_scope.py --data-dir DIR      # from DIR/clinc_oos, DIR/sst2, DIR/ag_news
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task
from bayeslora.analysis import detection_scores
from bayeslora.tasks.base import Task

# the task, training examples, and the split of its own and of foreign inputs; ag_news is added to sst2
SETTINGS = {
    "clinc_oos": (1500, "test", "out_of_scope"),
    "sentiment": (500, "test", "tweets"),
    "sst2": (1000, "validation", "ag_news"),
}


def tasks(data_dir: str | Path | None, names: Sequence[str]) -> dict[str, Task]:
    loaded = {name: load_task(name, None if name == "sentiment" else data_dir) for name in names}
    if "sst2" in loaded:
        loaded["sst2"] = loaded["sst2"].with_out_of_scope(load_task("ag_news", data_dir))
    return loaded


def main(
    output_dir: str = "runs/out_of_scope",
    *,
    model: str = "demo",
    data_dir: str | Path | None = None,
    names: Sequence[str] = tuple(SETTINGS),
    seeds: Sequence[int] = (0, 1),
    test_examples: int = 500,
    num_samples: int = 8,
    max_steps: int | None = None,
) -> dict[tuple[str, str], np.ndarray]:
    """Print the table; returns accuracy, AUROC, AUPR and FPR95, means over seeds, by (task, uncertainty)."""
    scores: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for name, task in tasks(data_dir, names).items():
        examples, inside, outside = SETTINGS[name]
        for seed in seeds:
            for method, config in {
                "LoRA": MonteCLoRAConfig(sample_scaler=0.0),
                "posterior": MonteCLoRAConfig(),
            }.items():
                set_seed(seed)
                network, tokenizer = task.load_network(model)
                bayes = BayesLoRA(network, config)
                train = task.encode(tokenizer, "train", limit=examples, max_length=48, seed=seed)
                run = Path(output_dir) / f"{name}-{method}-{seed}"
                fit(bayes, train, output_dir=run, epochs=5, batch_size=32, max_steps=max_steps, seed=seed)
                own, foreign = (
                    bayes.predict(
                        task.encode(tokenizer, split, limit=test_examples, max_length=48), num_samples=num_samples
                    )
                    for split in (inside, outside)
                )
                accuracy = float((own.probs.argmax(-1) == own.labels).mean())
                measures = {"entropy": (own.entropy, foreign.entropy)}
                if method == "posterior":
                    measures["mutual information"] = (own.mutual_information, foreign.mutual_information)
                for kind, (certain, unsure) in measures.items():
                    row = (accuracy, *detection_scores(certain, unsure))
                    scores.setdefault((name, f"{method}, {kind}"), []).append(row)

    table = {key: np.mean(rows, axis=0) for key, rows in scores.items()}
    print(f"{'task':12}{'uncertainty':32}{'accuracy (%)':>13}{'AUROC':>8}{'AUPR':>8}{'FPR95':>8}")
    for (name, kind), (accuracy, auroc, aupr, fpr95) in table.items():
        print(f"{name:12}{kind:32}{100 * accuracy:13.1f}{auroc:8.3f}{aupr:8.3f}{fpr95:8.3f}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir")
    main(data_dir=parser.parse_args().data_dir)
