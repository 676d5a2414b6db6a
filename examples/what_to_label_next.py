"""Which examples should people label next? Three rounds of annotation, by the posterior and at random.

A pool of sentences has no labels yet. Each round fits a posterior to what is labelled, chooses sentences of the pool as
``bayeslora predict RUN --input pool.csv --output next.jsonl --top-uncertain 60`` does, and gets their labels: here from
the ratings that are known, elsewhere from people. Draws the learning curve of each way to choose.

    python examples/what_to_label_next.py
"""

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task, open_run
from bayeslora.analysis import accuracy, negative_log_likelihood
from bayeslora.bulk.predicting import predict_file
from bayeslora.runs import FittedRun

Row = dict[str, str]
Config = MonteCLoRAConfig | None


def write(path: Path, rows: list[Row], *names: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def sentences(split: str, limit: int) -> list[Row]:
    task = load_task("sentiment")
    return [{"text": row["text"], "label": task.label_names[row["label"]]} for row in task.split(split, limit=limit)]


def fitted(folder: Path, labelled: list[Row], model: str, seed: int, config: Config, **budget: Any) -> FittedRun:
    """A run that was fitted to these rows."""
    folder.mkdir(parents=True)
    set_seed(seed)
    task = load_task(
        "opinions",
        write(folder / "train.csv", labelled, "text", "label"),
        text_columns="text",
        label_names=["negative", "positive"],
    )
    network, tokenizer = task.load_network(model)
    bayes = BayesLoRA(network, config)
    bayes.tokenizer = tokenizer
    train = task.encode(tokenizer, "train", max_length=64)
    about = {"model": model, "task": task.recipe, "max_length": 64}
    fit(bayes, train, output_dir=folder / "run", seed=seed, metadata=about, progress=False, **budget)
    return open_run(folder / "run")


def rounds(
    folder: Path, pool: list[Row], test: list[Row], by: str, seed: int, *, model: str, each: int, **how: Any
) -> list[dict[str, float]]:
    """Test scores with 1, 2, 3 and 4 times ``each`` labels; the first are drawn at random."""
    left, labelled, scores = pool.copy(), [], []
    random.Random(seed).shuffle(left)
    chosen = left[:each]
    for number in range(4):
        labelled += chosen  # people have labelled them
        left = [row for row in left if row not in chosen]
        place = folder / f"{by}-{seed}-{number}"
        run = fitted(place, labelled, model, seed, **how)
        probs = run.predict([row["text"] for row in test], num_samples=8, progress=False).probs
        truth = [int(row["label"] == "positive") for row in test]
        scores.append(
            {
                "labels": len(labelled),
                "accuracy": accuracy(probs, truth),
                "nll": negative_log_likelihood(probs, truth),
            }
        )
        print(f"{by}, seed {seed}: {scores[-1]}", flush=True)
        if by == "random":
            chosen = left[:each]
        elif number < 3:
            unlabelled = write(place / "pool.csv", left, "text")
            best = place / "next.jsonl"
            predict_file(run, unlabelled, best, num_samples=8, top_uncertain=each, by=by, progress=False)
            chosen = [left[json.loads(line)["row"]] for line in best.read_text(encoding="utf-8").splitlines()]
    return scores


def main(
    output_dir: str = "runs/what_to_label_next",
    *,
    model: str = "demo",
    pool_size: int = 1000,
    test_size: int = 500,
    each: int = 60,
    epochs: float = 10,
    config: Config = None,
    seeds: int = 3,
    measures: tuple[str, ...] = ("random", "mutual_information", "batchbald"),
) -> dict[str, list[list[dict[str, float]]]]:
    """Scores of every measure and seed, also in ``scores.json``; the picture is ``learning_curve.png``."""
    folder = Path(output_dir)
    pool, test = sentences("train", pool_size), sentences("test", test_size)
    how: dict[str, Any] = {"model": model, "each": each, "epochs": epochs, "batch_size": 8, "config": config}
    scores = {by: [rounds(folder, pool, test, by, seed, **how) for seed in range(seeds)] for by in measures}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    draw(scores, folder / "learning_curve.png")
    return scores


def draw(scores: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Means over the seeds, and each seed as a dot."""
    figure, panels = pyplot.subplots(1, 2, figsize=(6.6, 2.6), layout="constrained")
    for panel, (name, title) in zip(panels, {"accuracy": "accuracy", "nll": "NLL (nats)"}.items(), strict=True):
        for number, (by, of_seeds) in enumerate(scores.items()):
            labels = np.array([row["labels"] for row in of_seeds[0]])
            values = np.array([[row[name] for row in rows] for rows in of_seeds])
            colour = f"C{number}"
            panel.plot(labels, values.mean(0), color=colour, marker="o", markersize=4, label=by.replace("_", " "))
            shifted = np.broadcast_to(labels + 3 * (number - 1), values.shape)
            panel.plot(shifted.T, values.T, ".", color=colour, alpha=0.4, markersize=4)
        panel.set_xlabel("labelled sentences")
        panel.set_ylabel(title)
        panel.set_xticks(labels)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
